"""The factor store: factors of one (model, calibration, method, precision), on disk, fingerprinted.

A store is a folder `<fingerprint>/` with one safetensors file per block and `manifest.json`. It is
built beside its place and renamed into it, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from actors.decompose import Factors, Moments, decompose
from actors.models import DTYPES
from actors.types import FactorSpec, RankfrontError, TargetSpec, digest

Tensor = torch.Tensor

# Part of every fingerprint: raised when the meaning of the files changes, so old stores are rebuilt.
FORMAT = 1


def store_fingerprint(parts: Mapping[str, str], spec: FactorSpec, targets: Sequence[TargetSpec]) -> str:
    """Identity of a store: model, tokenizer and calibration text, targets, method, bias and precision."""
    chosen = {key: parts[key] for key in ("model", "tokenizer", "calibration")}
    names = [target.name for target in targets]
    return digest(["factors", FORMAT, chosen, names, spec.method, spec.bias, spec.dtype])


def build_store(
    folder: Path,
    fingerprint: str,
    model: nn.Module,
    targets: Sequence[TargetSpec],
    moments: Mapping[str, Moments],
    spec: FactorSpec,
) -> None:
    """Decompose every target and leave the store at `folder`.

    Raises:
        RankfrontError: non-finite weights or moments, naming the target; a full disk.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = {}
        for block in sorted({target.block for target in targets}):
            tensors: dict[str, Tensor] = {}
            for target in (target for target in targets if target.block == block):
                layer = model.get_submodule(target.name)
                assert isinstance(layer, nn.Linear)
                moment = moments.get(target.name)
                factors = decompose(target.name, layer.weight, moment, spec.method, spec.bias)
                tensors.update(_tensors(target.name, factors, DTYPES[spec.dtype]))
            path = partial / f"block-{block:05d}.safetensors"
            save_file(tensors, path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "method": spec.method,
            "bias": spec.bias,
            "dtype": spec.dtype,
            "targets": [target.__dict__ for target in targets],
            "files": files,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if folder.exists():  # a damaged store, or another run that was faster: ours is whole
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
        raise RankfrontError(f"factor store {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors(name: str, factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """A is stored transposed: the first r ranks of both factors are then contiguous on disk."""
    tensors = {
        f"{name}.left": factors.left.T.to(dtype).contiguous().cpu(),
        f"{name}.right": factors.right.to(dtype).contiguous().cpu(),
        f"{name}.energy": factors.energy.cpu(),
    }
    if factors.offset is not None and factors.shift is not None:
        tensors[f"{name}.offset"] = factors.offset.to(torch.float32).cpu()
        tensors[f"{name}.shift"] = factors.shift.to(torch.float32).cpu()
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def store_problem(folder: Path, fingerprint: str) -> str | None:
    """Why the store at `folder` cannot be used, or None: every file is there, whole and unchanged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        return "there is none"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    if manifest.get("format") != FORMAT or manifest.get("fingerprint") != fingerprint:
        return "its fingerprint is another's"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"{name} fails its checksum"
    return None


class FactorStore:
    """Read access to a store. Tensors are mapped from disk: replicas of a node share the pages."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        self.targets = tuple(TargetSpec(**target) for target in self.manifest["targets"])
        self._device = device
        self._files: dict[str, Any] = {}
        self._blocks = {target.name: target.block for target in self.targets}
        self._tensors: dict[str, Tensor] = {}

    def _read(self, name: str, part: str) -> Tensor | None:
        key = f"{name}.{part}"
        if key not in self._tensors:
            file = self._file(self._blocks[name])
            if key not in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                return None
            self._tensors[key] = file.get_tensor(key).to(self._device)
        return self._tensors[key]

    def _file(self, block: int) -> Any:
        name = f"block-{block:05d}.safetensors"
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return self._files[name]

    def _required(self, name: str, part: str) -> Tensor:
        tensor = self._read(name, part)
        if tensor is None:
            raise RankfrontError(f"factor store {self.folder}: {name} has no {part}")
        return tensor

    def rank(self, name: str, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A_r^T (r, m), B_r (r, n) and the mean bias (W - W_r) mu (m,), None where there is none."""
        left, right = self._required(name, "left")[:rank], self._required(name, "right")[:rank]
        offset, shift = self._read(name, "offset"), self._read(name, "shift")
        if offset is None or shift is None:
            return left, right, None
        bias = offset - shift[:rank] @ left.to(shift.dtype)
        return left, right, bias.to(left.dtype)

    def energy(self, name: str) -> Tensor:
        """Spectrum (k,) float64, non-increasing, in the method's own units."""
        return self._required(name, "energy")
