"""What is named by URL, as this node has it: copied once, however many processes ask for it. No torch.

A place is a local path, or a URL of any file system that fsspec has a driver for (s3://, gs://, hf://, ...).
A copy is made under a lock in `<name>.partial/`, file by file, each renamed when it is whole, and renamed as
a whole at the end: it is there complete or not at all, and one that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.utils import tokenize

from actors.sources import from_home
from actors.types import PreparationSpec, RankfrontError, digest

# Of a model's folder: weights, config and tokenizer, and what the card of an export needs. Never a pickle.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
CARD_FILES = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
MANIFEST = "manifest.json"  # of a factor store
READABLE = 0o644  # what a file takes of its folder's mode: nobody else may write to it

# What drivers raise for a storage that refuses or does not answer, and that is no OSError.
_DRIVER_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),  # s3
    ("google.auth.exceptions", "GoogleAuthError"),  # gs
    ("gcsfs.retry", "HttpError"),  # gs
    ("azure.core.exceptions", "AzureError"),  # abfs
    ("httpx2", "HTTPError"),  # hf
    ("aiohttp", "ClientError"),  # http
)


@dataclass(frozen=True)
class _File:
    """A remote file: its path in its file system, its name in the copy, its bytes, its sha256 where known."""

    path: str
    name: str
    bytes: int
    sha256: str | None = None

    def problem(self, copy: Path) -> str | None:
        """Why a copy is not this file, None where it is."""
        size = copy.stat().st_size
        if size != self.bytes:
            return f"{self.name}: {size:,} bytes arrived of {self.bytes:,}"
        if self.sha256 is not None and sha256_of(copy) != self.sha256:
            return f"{self.name} fails its sha256"
        return None


def is_url(place: str | None) -> bool:
    """Whether a place is a URL; else it is a path, or a name of another kind."""
    return place is not None and "://" in place


def url_problem(url: str) -> str | None:
    """Why a URL cannot be read from this machine, or must not be written down; None where it can.

    No network is asked.
    """
    if urlsplit(url).password is not None:
        shown = url.replace(urlsplit(url).netloc, urlsplit(url).netloc.rpartition("@")[2])
        return f"{shown!r} came with a password: give it by the variables of the file system's driver"
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ImportError, ValueError) as error:
        return _no_driver(url, error)
    return None


def _no_driver(url: str, error: Exception) -> str:
    return f"{url!r} cannot be read here: {error}"


def node_folder(spec: PreparationSpec) -> Path:
    """The folder of this node's copies."""
    return from_home(spec.node_cache, "cache.node")


def store_folder(spec: PreparationSpec) -> Path:
    """Where builders on this node write factor stores and converted models."""
    return Path(spec.cache) if spec.shared is None else node_folder(spec) / "factors"


def model_copy(url: str, cache: Path) -> Path:
    """The model at a URL, a folder or one .gguf file: its copy in `cache`, made if there is none.

    A copy is named by the URL and by all that its file system lists: names, sizes, times, checksums. So files
    that changed are copied anew.

    Raises:
        RankfrontError: no driver, nothing there, or the copy cannot be made.
    """
    with _reaching(url) as (fs, path):
        if fs.isfile(path):
            root, entries = path.rpartition("/")[0], {path: fs.info(path)}
        else:
            root, entries = path, fs.find(path, detail=True)
        wanted = (*MODEL_FILES, *CARD_FILES, "*.gguf")
        files, states = [], []
        for name, entry in sorted(entries.items()):
            relative = name[len(root) :].lstrip("/")
            if any(fnmatchcase(relative, pattern) for pattern in wanted):
                files.append(_File(name, _inside(url, relative), _size(url, entry)))
                states.append([relative, tokenize(entry)])
        if not files:
            raise RankfrontError(f"{url}: no model is there: no .safetensors, .gguf or .json file")
        folder = _copied(fs, url, files, cache / "models" / digest([url, states])[:16])
        return folder / files[0].name if fs.isfile(path) else folder


def local_store(place: str, cache: Path) -> Path:
    """A factor store by its place: a folder as it is; of a URL, the copy in `cache`, made if there is none.

    Every file of a copy is held against the sha256 in the store's manifest.

    Raises:
        RankfrontError: no driver, no store there, a damaged one, or the copy cannot be made.
    """
    if not is_url(place):
        return Path(place)
    folder = from_home(cache, "cache.node") / "factors" / place.rstrip("/").rpartition("/")[2]
    if (folder / MANIFEST).exists():
        return folder
    with _reaching(place) as (fs, path):
        if not fs.exists(f"{path}/{MANIFEST}"):
            raise RankfrontError(
                f"the factor store {place} is gone; run the search command again to rebuild it"
            )
        return _copied(fs, place, _store_files(place, path, fs.cat_file(f"{path}/{MANIFEST}")), folder)


def _store_files(place: str, path: str, manifest: bytes) -> list[_File]:
    """The files that the manifest of a store names, and the manifest."""
    try:
        entries = [
            (str(name), int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in json.loads(manifest)["files"].items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RankfrontError(f"{place}: its manifest cannot be read ({error!r}); remove it") from error
    entries.append((MANIFEST, len(manifest), hashlib.sha256(manifest).hexdigest()))
    return [_File(f"{path}/{name}", _inside(place, name), size, sum_) for name, size, sum_ in entries]


def is_published(place: str) -> bool:
    """Whether a whole factor store is at a URL."""
    with _reaching(place) as (fs, path):
        return bool(fs.exists(f"{path}/{MANIFEST}"))


def publish(folder: Path, place: str) -> None:
    """Copy a sealed factor store to a URL, its manifest last: a store without one is not there.

    Raises:
        RankfrontError: no driver, or it cannot be written there.
    """
    with _reaching(place) as (fs, path):
        fs.makedirs(path, exist_ok=True)
        if fs.exists(f"{path}/{MANIFEST}"):  # of a store that was built again
            fs.rm_file(f"{path}/{MANIFEST}")
        for file in sorted(folder.iterdir()):
            if file.name != MANIFEST:
                _put(fs, place, file, f"{path}/{file.name}")
        # Not all file systems make a file appear whole.
        _put(fs, place, folder / MANIFEST, f"{path}/{MANIFEST}.partial")
        fs.mv(f"{path}/{MANIFEST}.partial", f"{path}/{MANIFEST}")


def _put(fs: Any, place: str, file: Path, path: str) -> None:
    fs.put_file(str(file), path)
    size = file.stat().st_size
    if fs.size(path) != size:
        raise RankfrontError(f"{place}: {file.name} arrived with other than its {size:,} bytes")


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; what goes wrong with either names the URL."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()  # of listings, which others may have outdated
        yield fs, path
    except (ImportError, ValueError) as error:
        raise RankfrontError(_no_driver(url, error)) from error
    except _storage_errors() as error:
        raise RankfrontError(f"{url}: {error or type(error).__name__}") from error


def _storage_errors() -> tuple[type[Exception], ...]:
    """OSError, and what drivers raise beside it; a module that is not loaded has raised nothing."""
    loaded = [(module, name) for module, name in _DRIVER_ERRORS if module in sys.modules]
    return (OSError, *(getattr(sys.modules[module], name) for module, name in loaded))


def _inside(url: str, name: str) -> str:
    """A relative name that stays in the folder it is joined to."""
    if not name or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise RankfrontError(f"{url}: {name!r} is no name of a file inside it")
    return name


def _size(url: str, entry: dict[str, Any]) -> int:
    if entry["size"] is None:
        raise RankfrontError(f"{url}: {entry['name']} is listed without its size, so no copy can be checked")
    return int(entry["size"])


def _copied(fs: Any, url: str, files: Sequence[_File], folder: Path) -> Path:
    """`folder`, filled with copies of the files; another process that fills it is waited for."""
    if folder.exists():
        return folder
    with locked(folder):
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            for file in files:
                _copy(fs, url, file, partial)
            partial.rename(folder)
    return folder


def settle(file: Path) -> None:
    """A file that was written is on the disk, and may be read by whom its folder may, when this returns.

    safetensors leaves what it writes to its owner alone: colleagues could not read a store or an export.
    """
    with contextlib.suppress(PermissionError):  # a file system that knows no modes
        file.chmod(file.parent.stat().st_mode & READABLE)
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in making a folder: another process waits here until the first is done or dead."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _copy(fs: Any, url: str, file: _File, folder: Path) -> None:
    """Copy one file into a folder, unless it is there."""
    whole = folder / file.name
    if whole.exists() and file.problem(whole) is None:
        return
    whole.parent.mkdir(parents=True, exist_ok=True)
    # One name, as the lock lets no other process write: what a killed one left is written over.
    arriving = whole.with_name(f"{whole.name}.tmp")
    try:
        fs.get_file(file.path, str(arriving))
        problem = file.problem(arriving)
        if problem is not None:
            raise RankfrontError(f"{url}: {problem}; remove what is there, and make or upload it again")
        settle(arriving)
        arriving.replace(whole)
    finally:
        arriving.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
