"""Refined factors on disk: one file for one allocation, whole or not there, its manifest in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actors.factors import whole
from actors.types import Allocation, RankfrontError

Tensor = torch.Tensor

# Of a target: A_r^T is kept as A_r (m, r), B_r (r, n), and what is added to the layer's own bias (m,).
LEFT, RIGHT, BIAS = "left", "right", "bias"
_MANIFEST = "rankfront"


def write(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Replace `path` by `tensors` and a JSON manifest at once.

    Raises:
        RankfrontError: the disk is full or refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        with whole(path) as partial:
            save_file(content, partial, {_MANIFEST: json.dumps(manifest)})
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
        raise RankfrontError(f"{path}: {error}") from error


def read(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the manifest of a file that `write` left.

    Raises:
        RankfrontError: there is none, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})[_MANIFEST])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RankfrontError(f"{path}: no refined factors can be read ({error}); remove it") from error
    return tensors, manifest


class RefinedFactors:
    """Has the `rank` of a factor store, for the one allocation it was refined at."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._path = path
        self._tensors, self.manifest = read(path, device)
        ranks, methods = self.manifest["ranks"], self.manifest["methods"]
        self.allocation = Allocation(tuple(ranks.items()), tuple(methods.items()))

    def rank(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A_r^T (r, m), B_r (r, n) and what is added to the layer's bias (m,), None where nothing is.

        Raises:
            RankfrontError: another rank or method than the refined one.
        """
        known = self.manifest["ranks"].get(name), self.manifest["methods"].get(name)
        if known != (rank, method):
            asked = f"rank {rank}" + (f" by {method}" if method else "")
            raise RankfrontError(
                f"{self._path}: {name} is refined at rank {known[0]}"
                + (f" by {known[1]}" if known[1] else "")
                + f", not at {asked}"
            )
        left, right = self._tensors[f"{name}.{LEFT}"], self._tensors[f"{name}.{RIGHT}"]
        return left.T, right, self._tensors.get(f"{name}.{BIAS}")
