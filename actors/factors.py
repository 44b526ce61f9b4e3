"""The factor store: factors of one (model, calibration, methods, precision), on disk, fingerprinted.

A store is a folder `<fingerprint>/` with one safetensors file per target and method, and `manifest.json`.
It is built in `<fingerprint>.partial/`, each file renamed into place when it is whole, and renamed as a whole
at the end: a store is there complete or not at all, and a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from actors.decompose import Factors, decompose
from actors.models import DTYPES
from actors.moments import Moments
from actors.node_cache import MANIFEST, locked, settle, sha256_of
from actors.shared_folder import no_store
from actors.types import FactorSpec, RankfrontError, TargetSpec, digest

Tensor = torch.Tensor

# Part of every fingerprint: raised when the meaning of the files changes, so old stores are rebuilt.
FORMAT = 3


def needing_gradients(spec: FactorSpec, targets: Sequence[TargetSpec]) -> tuple[str, ...]:
    """Names of the targets to measure the moment of output gradients of: all, if some method asks for it.

    What truncation costs is then predicted of every target, for the seeds and the sampler.
    """
    if not any("curvature" in spec.methods_of(target.name) for target in targets):
        return ()
    return tuple(target.name for target in targets)


def needing_spreads(spec: FactorSpec, targets: Sequence[TargetSpec]) -> tuple[str, ...]:
    """Names of the targets of which some method asks for the spread over all tokens alike."""
    return tuple(target.name for target in targets if "feature" in spec.methods_of(target.name))


def refuse_idle_patterns(patterns: Iterable[str], targets: Sequence[TargetSpec]) -> None:
    """Refuse patterns of `factors.methods` that decide the method of no target: the first that fits decides.

    Raises:
        RankfrontError: each such pattern, and the earlier ones that took all it fits.
    """
    names = [target.name for target in targets]
    left, mistakes = set(names), []
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            known = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
            mistakes.append(f"factors.methods: {pattern!r} fits no target of this model ({known})")
        elif not fitting & left:
            mistakes.append(
                f"factors.methods: patterns before {pattern!r} fit all of its targets; put it first"
            )
        left -= fitting
    if mistakes:
        raise RankfrontError("\n".join(mistakes))


def store_fingerprint(
    parts: Mapping[str, str], spec: FactorSpec, labels: str, targets: Sequence[TargetSpec]
) -> str:
    """Identity of a store: model, tokenizer and calibration text, targets, methods, bias and precision."""
    chosen = {key: parts[key] for key in ("model", "tokenizer", "calibration")}
    methods = [[target.name, spec.methods_of(target.name)] for target in targets]
    gradients = labels if needing_gradients(spec, targets) else None
    return digest(["factors", FORMAT, chosen, methods, gradients, spec.bias, spec.dtype])


class StoreBuilder:
    """Writes the store at `folder`, target by target. Several processes may share one partial folder as
    long as each target is written by one of them; one process, the holder of `locked`, finishes it."""

    def __init__(self, folder: Path, spec: FactorSpec, targets: Sequence[TargetSpec]) -> None:
        self.folder, self._spec, self._targets = folder, spec, tuple(targets)
        self.partial = folder.with_name(f"{folder.name}.partial")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Alone in building this store: another process waits here until the first is done or dead."""
        return locked(self.folder)

    def pending(self) -> tuple[TargetSpec, ...]:
        """The targets of which some file is still to be written."""
        return tuple(
            target
            for target in self._targets
            if not all((self.partial / file).exists() for file in self._files(target).values())
        )

    def _files(self, target: TargetSpec) -> dict[str, str]:
        """File names by method, the configured method first."""
        methods = self._spec.methods_of(target.name)
        return {method: f"{target.name}.{method}.safetensors" for method in methods}

    def write(self, target: TargetSpec, matrix: Tensor, moments: Moments | None) -> None:
        """Decompose a target, weight (m, n), by each of its methods and leave its files.

        Raises:
            RankfrontError: non-finite weight or moments, naming the target; a full disk.
        """
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            for method, file in self._files(target).items():
                if not (self.partial / file).exists():
                    factors = decompose(target.name, matrix, moments, method, self._spec.bias)
                    _save(self.partial / file, _tensors(factors, DTYPES[self._spec.dtype]))
        except (OSError, SafetensorError) as error:  # a full disk is the latter where safetensors writes
            raise RankfrontError(f"factor store {self.folder}: {error}") from error

    def finish(self, fingerprint: str) -> None:
        """Seal the store: checksum every file, write the manifest, move the whole into its place.

        Marks (`actors.shared_folder`) and what a process left that was killed as it wrote are removed.

        Raises:
            RankfrontError: the disk is full.
        """
        try:
            files = {}
            for target in self._targets:
                for method, file in self._files(target).items():
                    path = self.partial / file
                    files[file] = {
                        "target": target.name,
                        "method": method,
                        "bytes": path.stat().st_size,
                        "sha256": sha256_of(path),
                    }
            manifest = {
                "format": FORMAT,
                "fingerprint": fingerprint,
                "bias": self._spec.bias,
                "dtype": self._spec.dtype,
                "targets": [target.__dict__ for target in self._targets],
                "methods": {target.name: self._spec.methods_of(target.name) for target in self._targets},
                "files": files,
            }
            manifest["checksum"] = digest(manifest)
            with whole(self.partial / MANIFEST) as path:
                path.write_text(json.dumps(manifest, indent=1))
            for left_behind in self.partial.glob("*.tmp"):
                left_behind.unlink()
            if self.folder.exists():  # a damaged store: ours is whole
                shutil.rmtree(self.folder)
            self.partial.rename(self.folder)
        except OSError as error:
            raise RankfrontError(f"factor store {self.folder}: {error}") from error

    def discard(self) -> None:
        """Remove what was written: it can never become a store."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _tensors(factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """A is stored transposed: the first r ranks of both factors are then contiguous on disk."""
    optional = {"loss": factors.loss, "offset": factors.offset, "shift": factors.shift}
    return {
        "left": factors.left.T.to(dtype).contiguous().cpu(),
        "right": factors.right.to(dtype).contiguous().cpu(),
        "energy": factors.energy.cpu(),
        **{
            name: tensor.to(torch.float64 if name == "loss" else torch.float32).contiguous().cpu()
            for name, tensor in optional.items()
            if tensor is not None
        },
    }


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole(path) as partial:
        save_file(tensors, partial)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields where to write: the file then appears at `path` whole, and stays whole through a power cut."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        settle(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def store_problem(folder: Path, fingerprint: str) -> str | None:
    """Why the store at `folder` cannot be used, or None: every file is there, whole and unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = manifest.pop("checksum") == digest(manifest)
        known = manifest["format"] == FORMAT and manifest["fingerprint"] == fingerprint
        files = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
    except FileNotFoundError:
        return "there is none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error!r})"
    if not whole:
        return "its manifest fails its checksum"
    if not known:
        return "its fingerprint is another's"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_of(path) != checksum:
            return f"{name} fails its checksum"
    return None


class FactorStore:
    """Read access to a store. Tensors are mapped from disk: replicas of a node share the pages.

    Raises:
        RankfrontError: this node sees no store there.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text())
        except FileNotFoundError as error:
            raise RankfrontError(no_store(self.folder)) from error
        except ValueError as error:
            raise RankfrontError(f"factor store {self.folder}: its {MANIFEST} is damaged: {error}") from error
        self.targets = tuple(TargetSpec(**target) for target in self.manifest["targets"])
        self.methods: dict[str, list[str]] = self.manifest["methods"]
        self._device = device
        self._places: dict[str, str] = {}
        self._tensors: dict[tuple[str, str], dict[str, Tensor]] = {}

    def place(self, devices: Mapping[str, str]) -> None:
        """Read the factors of these targets to devices of their own from now on."""
        self._places = dict(devices)
        self._tensors.clear()

    def release(self) -> None:
        """Keep none in memory; they are read again when they are asked for."""
        self._tensors.clear()

    def bytes_of(self, name: str) -> int:
        """What the factors of a target take, by all methods together."""
        files = self.manifest["files"].values()
        return sum(int(entry["bytes"]) for entry in files if entry["target"] == name)

    def _read(self, name: str, method: str | None) -> dict[str, Tensor]:
        """The tensors of a target, by its configured method where none is named."""
        method = method or self.methods[name][0]
        if (name, method) not in self._tensors:
            if method not in self.methods[name]:
                held = ", ".join(self.methods[name])
                raise RankfrontError(
                    f"factor store {self.folder}: {name} has factors by {held}, not {method}"
                )
            with safe_open(self.folder / f"{name}.{method}.safetensors", framework="pt") as file:
                device = self._places.get(name, self._device)
                tensors = {part: file.get_tensor(part).to(device) for part in file.keys()}  # noqa: SIM118
            self._tensors[name, method] = tensors
        return self._tensors[name, method]

    def rank(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A_r^T (r, m), B_r (r, n) and the mean bias (W - W_r) mu (m,), None where there is none."""
        tensors = self._read(name, method)
        left, right = tensors["left"][:rank], tensors["right"][:rank]
        if "offset" not in tensors:
            return left, right, None
        shift = tensors["shift"]
        bias = tensors["offset"] - shift[:rank] @ left.to(shift.dtype)
        return left, right, bias.to(left.dtype)

    def rest(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor]:
        """What `rank` leaves out of A^T (k - r, m) and B (k - r, n): A_r B_r and theirs make W."""
        tensors = self._read(name, method)
        return tensors["left"][rank:], tensors["right"][rank:]

    def energy(self, name: str, method: str | None = None) -> Tensor:
        """Spectrum (k,) float64, in the method's own units, without damping."""
        return self._read(name, method)["energy"]

    def loss(self, name: str, method: str | None = None) -> Tensor | None:
        """Predicted loss increase (k,) float64 of losing each rank, nats/token; see `Factors`."""
        return self._read(name, method).get("loss")
