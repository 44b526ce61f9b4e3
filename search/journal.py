"""The embedded journal: one driver at a time, torn tails repaired aloud, appends whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation

from actors.types import RankfrontError
from search.journal_storage import StudyJournal
from search.patience import Patience, impatient

JOURNAL = "study.journal"
LOCK = "driver.lock"

# A write holds the journal for milliseconds: a lock file older than this was left by a killed process.
LOCK_SECONDS = 5


def repair(path: Path) -> str | None:
    """Cut a journal back to its last whole record; returns what was dropped, None if nothing was.

    A crash in the middle of a write leaves half a line, and Optuna cannot read past one. The torn
    bytes are kept beside the journal. Every record before them stays.

    Raises:
        RankfrontError: a broken record that is not at the end, or no whole record in a file that does not end
            in its first: that is damage, not a torn write.
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
        raise _damaged(path, good + 1)
    if not good and (b"\n" in torn or not torn.startswith(b"{")):
        raise RankfrontError(
            f"{path} holds no record, nor the beginning of one: restore it from a backup, or move it away"
        )
    kept = path.with_name(f"{path.name}.torn-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}")
    kept.write_bytes(torn)
    with path.open("r+b") as stream:
        stream.truncate(whole)
        os.fsync(stream.fileno())
    return f"dropped {len(torn)} bytes of a torn record after {good} whole ones (kept in {kept.name})"


def _damaged(path: Path, record: int) -> RankfrontError:
    return RankfrontError(
        f"{path}: record {record} is damaged, and it is not the last; restore the file from a backup"
    )


def _is_record(line: bytes) -> bool:
    return _record(line) is not None


def _record(line: bytes) -> dict[str, Any] | None:
    """A whole record, None where the line is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def journal_has_trial(folder: Path, study: str) -> bool:
    """Whether a study of a folder's journal has a trial, in whatever state; False where there is no journal.

    Up to a torn last record: Optuna reads past none.

    Raises:
        RankfrontError: a broken record that is not at the end.
    """
    path = folder / JOURNAL
    if not path.exists():
        return False
    known: dict[int, str] = {}  # by their ids, which count those that were deleted too
    made, filled = 0, set[int]()
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            record = _record(line)
            if record is None:
                if any(map(_is_record, stream)):
                    raise _damaged(path, number)
                break
            operation = record["op_code"]
            if operation == JournalOperation.CREATE_STUDY and record["study_name"] not in known.values():
                known[made] = record["study_name"]
                made += 1
            elif operation == JournalOperation.DELETE_STUDY:
                known.pop(record["study_id"], None)
            elif operation == JournalOperation.CREATE_TRIAL:
                filled.add(record["study_id"])
    return any(known.get(study_id) == study for study_id in filled)


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


class JournalFile(JournalFileBackend):
    """A journal whose appends are there as a whole or not at all, as long as this process lives.

    Optuna's leaves what it had written when the disk was full, and the next record begins in that line.
    """

    def __init__(self, folder: Path, patience: Patience) -> None:
        super().__init__(str(folder / JOURNAL), _write_lock(folder))
        self._path, self._patience = folder / JOURNAL, patience

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Raises RankfrontError at a broken record that is not at the end."""
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                number += 1
                yield record
        except ValueError as error:
            raise _damaged(self._path, number + 1) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Durable when this returns; tried again while the file system refuses, as long as there is patience.

        Raises:
            RankfrontError: it refuses still. The journal holds every append before, and nothing of this one.
        """
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        try:
            self._patience.ride_out(lambda again: self._append(content), (OSError,), self._reason)
        except OSError as error:
            raise RankfrontError(
                f"{self._reason(error)}. What ended before is in it; the same command goes on once it can be "
                "written"
            ) from error

    def _reason(self, error: Exception) -> str:
        return f"{self._path} cannot be written: {getattr(error, 'strerror', None) or error}"

    def _append(self, content: bytes) -> None:
        """Cut back what an append leaves that fails, and before one what somebody left who was killed."""
        with _held(self._lock), self._path.open("a+b", buffering=0) as stream:
            whole = stream.seek(0, os.SEEK_END)
            if whole and os.pread(stream.fileno(), 1, whole - 1) != b"\n":
                self._patience.say(f"journal: {repair(self._path)}")
                whole = stream.seek(0, os.SEEK_END)
            try:
                left = memoryview(content)
                while left:  # a disk that fills up takes the first part of a write, and refuses the next
                    left = left[stream.write(left) :]
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(whole)
                raise


@contextmanager
def _held(lock: Any) -> Iterator[None]:
    """Hold a journal's lock. Who waited LOCK_SECONDS took it for one left behind: what was written stays."""
    lock.acquire()
    try:
        yield
    finally:
        with suppress(RuntimeError):
            lock.release()


def open_journal(folder: Path, patience: Patience | None = None) -> StudyJournal:
    """The storage of a study folder. The lock file guards single writes against `enqueue` and dashboards.

    Without patience the first write that fails ends the command.
    """
    return StudyJournal(JournalFile(folder, patience or impatient()))


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
