"""Factors that no model should get."""

from __future__ import annotations

from typing import Any

import torch

from actors.factors import FactorStore


class Infinite:
    """Factors of which one row is infinite."""

    def __init__(self, store: FactorStore) -> None:
        self._store = store

    def rank(self, name: str, rank: int, method: str | None = None) -> Any:
        left, right, bias = self._store.rank(name, rank, method)
        return left, right.clone().index_fill_(0, torch.tensor([0]), torch.inf), bias
