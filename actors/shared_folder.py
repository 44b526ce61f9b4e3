"""Whether nodes see one folder under one path: one leaves a mark in it, others look for that. No torch."""

from __future__ import annotations

import contextlib
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path

from actors.node_cache import MANIFEST
from actors.types import RankfrontError

SHARE = "set runs or cache.factors to a folder that all nodes share, or cache.factors to a URL"
"""What is right where nodes do not see the same factors."""


@dataclass(frozen=True)
class Mark:
    """An empty file of a name nobody used before, and the node that left it."""

    node: str
    file: Path


def leave_mark(folder: Path) -> Mark:
    """Leave a mark in a folder, which is made where it is not there.

    Raises:
        RankfrontError: nothing can be written there.
    """
    file = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise RankfrontError(f"{folder}: node {platform.node()} cannot write there: {error}") from error
    return Mark(platform.node(), file)


def take_mark(mark: Mark) -> None:
    """Remove a mark, and its folder where nothing else is in it."""
    with contextlib.suppress(OSError):
        mark.file.unlink(missing_ok=True)
        mark.file.parent.rmdir()


def sees(file: Path) -> bool:
    """Whether a file of another node is there for this one.

    Over NFS a name that was not there may be taken to be absent for a minute, unless one's own change of its
    folder makes one look again: something is written, and removed, as near to the file as there is a folder.
    """
    with contextlib.suppress(OSError):
        near = next(folder for folder in file.parents if folder.exists())
        own = near / f"{uuid.uuid4().hex}.tmp"
        own.touch()
        own.unlink()
    try:
        return file.exists()
    except OSError:  # a folder that this node may not look into
        return False


def no_store(folder: Path) -> str:
    """What an error says of a factor store that this node does not see."""
    return (
        f"factor store {folder}: node {platform.node()} sees no {MANIFEST} there. Where another node built "
        f"it, {SHARE}; where it was removed, the search command builds it again"
    )
