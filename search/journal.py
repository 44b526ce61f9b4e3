"""The embedded journal: one driver at a time, torn tails repaired at open and said aloud."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file

from actors.types import RankfrontError
from search.journal_storage import StudyJournal

JOURNAL = "study.journal"
LOCK = "driver.lock"

# A write holds the journal for milliseconds: a lock file older than this was left by a killed process.
LOCK_SECONDS = 5


def repair(path: Path) -> str | None:
    """Cut a journal back to its last whole record; returns what was dropped, None if nothing was.

    A crash in the middle of a write leaves half a line, and Optuna cannot read past one. The torn
    bytes are kept beside the journal. Every record before them stays.

    Raises:
        RankfrontError: a broken record that is not at the end: that is damage, not a torn write.
    """
    if not path.exists():
        return None
    whole, good = 0, 0
    with path.open("rb") as stream:
        for line in stream:
            if not _is_record(line):
                break
            whole, good = whole + len(line), good + 1
        stream.seek(whole)
        torn = stream.read()
    if not torn:
        return None
    if any(_is_record(line + b"\n") for line in torn.split(b"\n")[1:] if line):
        raise RankfrontError(
            f"{path}: record {good + 1} is damaged, whole records follow it; restore the file from a backup"
        )
    kept = path.with_name(f"{path.name}.torn-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}")
    kept.write_bytes(torn)
    with path.open("r+b") as stream:
        stream.truncate(whole)
        os.fsync(stream.fileno())
    return f"dropped {len(torn)} bytes of a torn record after {good} whole ones (kept in {kept.name})"


def _is_record(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def repair_journal(folder: Path) -> str | None:
    """Repair the journal of a study (see `repair`) that others may be appending to: whoever enqueues.

    What looks torn may be a write under way, so it is cut only while the journal's own lock is held.
    """
    path = folder / JOURNAL
    if not path.exists() or not _torn(path):
        return None
    with get_lock_file(_write_lock(folder)):
        return repair(path)


def _torn(path: Path) -> bool:
    with path.open("rb") as stream:
        return not all(map(_is_record, stream))


def _write_lock(folder: Path) -> JournalFileOpenLock:
    return JournalFileOpenLock(str(folder / JOURNAL), grace_period=LOCK_SECONDS)


def open_journal(folder: Path) -> StudyJournal:
    """The storage of a study folder. The lock file guards single writes against `enqueue` and dashboards."""
    return StudyJournal(JournalFileBackend(str(folder / JOURNAL), _write_lock(folder)))


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Hold the study as its one driver. The kernel lets go when the process ends, however it ends.

    Raises:
        RankfrontError: another driver holds it; says which.
    """
    with (folder / LOCK).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise RankfrontError(
                f"{folder} has a driver already: {stream.read().strip() or 'it is just starting'}"
            ) from error
        if not _is_file_at(stream.fileno(), folder / LOCK):
            raise RankfrontError(f"{folder / LOCK} was taken away while it was opened: try again")
        stream.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        stream.flush()
        yield


def lock_holder(folder: Path) -> str | None:
    """Who drives the study of a folder, None where nobody does. Takes the lock, shared, for an instant."""
    path = folder / LOCK
    if not path.exists():
        return None
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "a process that is just starting"
    return None


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`: a lock on a file that was removed holds nobody off."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
