"""A folder that one process fills out of sight and shows when it is whole. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """An empty, hidden folder beside `folder`, to be filled and renamed to it.

    One process at a time has it; another waits until that is done or dead. What a killed one left in it is
    removed, and nothing but what was renamed is left.
    """
    if not folder.parent.exists():  # a file in its place is told by what is opened in it
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock, partial = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("lock", "partial"))
    with _locked(lock):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _locked(lock: Path) -> IO[str]:
    """The lock file, held until it is closed. One that its holder removed meanwhile holds nobody off."""
    while True:
        stream = lock.open("a")
        fcntl.flock(stream, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
                return stream
        stream.close()
