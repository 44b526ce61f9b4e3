"""A tiny model whose targets were decomposed: what installing, refining and refitting tests begin from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch

from actors.calibration import collect_moments
from actors.factors import FactorStore
from actors.models import list_targets, load_model
from actors.types import FactorSpec, ModelSource, TargetSpec


@dataclass(frozen=True)
class Decomposed:
    folder: Path
    targets: tuple[TargetSpec, ...]
    store: FactorStore

    def dense(self) -> Any:
        return load_model(self.folder, ModelSource(str(self.folder)))


def decomposed(folder: Path, place: Path, ids: torch.Tensor, spec: FactorSpec) -> Decomposed:
    """The model in `folder`, its factors at `place` from the moments of `ids` (windows, tokens)."""
    model = load_model(folder, ModelSource(str(folder)))
    targets = list_targets(model)
    moments = collect_moments(model, targets, ids)
    return Decomposed(folder, targets, tiny.tiny_store(place, model, targets, moments, spec))
