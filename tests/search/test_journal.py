"""A journal that a crash tore, and a study that two drivers want."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from fakes import open_study, score_of

from actors.types import RankfrontError
from search.journal import (
    JOURNAL,
    LOCK,
    driver_lock,
    lock_holder,
    open_journal,
    repair,
    repair_journal,
)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal of three finished trials, as the study writes it."""
    study = open_study(tmp_path)
    for _ in range(3):
        planned = study.propose("random")
        study.complete(planned, score_of(planned.allocation))
    return tmp_path / JOURNAL


def states(folder: Path) -> list[str]:
    study = optuna.load_study(study_name="made-up", storage=open_journal(folder))
    return [trial.state.name for trial in study.get_trials(deepcopy=False)]


def test_a_whole_journal_is_left_alone(journal: Path) -> None:
    before = journal.read_bytes()
    assert repair(journal) is None
    assert journal.read_bytes() == before
    assert [path.name for path in journal.parent.glob("*.torn*")] == []


def test_no_journal_is_no_damage(tmp_path: Path) -> None:
    assert repair(tmp_path / JOURNAL) is None
    assert list(tmp_path.iterdir()) == []


def test_every_torn_tail_is_cut_back_to_the_last_whole_record(journal: Path, tmp_path: Path) -> None:
    """A write may stop after any byte of the last record."""
    *whole, last = journal.read_bytes().splitlines(keepends=True)
    assert len(last) > 10
    for cut in range(1, len(last)):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        torn = folder / JOURNAL
        torn.write_bytes(b"".join(whole) + last[:cut])
        said = repair(torn)
        assert said is not None
        assert f"{cut} bytes" in said
        assert f"{len(whole)} whole" in said
        assert torn.read_bytes() == b"".join(whole)
        [kept] = folder.glob("*.torn-*")
        assert kept.name in said
        assert kept.read_bytes() == last[:cut]
        assert repair(torn) is None


def test_a_repaired_journal_goes_on(journal: Path, tmp_path: Path) -> None:
    """The last record tells that trial 2 is finished: without it, it has its result and no final state."""
    content = journal.read_bytes()
    journal.write_bytes(content[:-7])
    assert repair(journal) is not None
    assert states(tmp_path) == ["COMPLETE", "COMPLETE", "RUNNING"]
    study = open_study(tmp_path)
    assert study.in_flight() == []
    assert study.replay() == [2]
    assert states(tmp_path) == ["COMPLETE"] * 3


def test_a_tail_of_zeros_is_cut(journal: Path, tmp_path: Path) -> None:
    """What a file system may leave of a write that a power loss stopped."""
    content = journal.read_bytes()
    journal.write_bytes(content + b"\0" * 512)
    assert repair(journal) is not None
    assert journal.read_bytes() == content


@pytest.mark.parametrize("content", [b"\0" * 512, b"\n\n", b"junk\n" * 5, b'{"op_co\n{"op'])
def test_a_file_without_a_record_is_refused(journal: Path, content: bytes) -> None:
    journal.write_bytes(content)
    with pytest.raises(RankfrontError, match=r"study\.journal holds no record"):
        repair(journal)
    assert journal.read_bytes() == content


def test_damage_before_whole_records_is_refused(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = [*lines[:2], b"#" + lines[2][1:], *lines[3:]]
    journal.write_bytes(b"".join(damaged))
    with pytest.raises(RankfrontError, match=r"study\.journal: record 3 is damaged"):
        repair(journal)
    assert journal.read_bytes() == b"".join(damaged), "nothing may be cut away"
    assert list(journal.parent.glob("*.torn-*")) == []


def test_two_repairs_in_one_second_keep_both_tails(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101T000000")
    content = journal.read_bytes()
    for tail in (b'{"first', b'{"second'):
        journal.write_bytes(content + tail)
        assert repair(journal) is not None
    kept = {path.read_bytes() for path in journal.parent.glob("*.torn-*")}
    assert kept == {b'{"first', b'{"second'}


def test_a_lock_file_left_behind_by_a_kill_holds_nobody_for_long(
    journal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's lock file outlives a process that is killed while it writes; a write takes milliseconds."""
    Path(f"{journal}.lock").touch()
    waited = [0.0]

    def sleep(seconds: float) -> None:
        waited[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: waited[0], sleep=sleep)
    monkeypatch.setattr("optuna.storages.journal._file.time", clock)
    open_study(tmp_path).propose("random")
    assert 0 < waited[0] < 10
    assert states(tmp_path)[-1] == "RUNNING"


def test_a_write_under_way_is_waited_for_not_cut(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who enqueues while a driver starts holds the journal's lock, and half of its record is there."""
    content = journal.read_bytes()
    record = content.splitlines(keepends=True)[-1]
    lock = Path(f"{journal}.lock")
    lock.touch()
    journal.write_bytes(content + record[:30])

    def sleep(seconds: float) -> None:
        journal.write_bytes(content + record)
        lock.unlink(missing_ok=True)

    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep)
    monkeypatch.setattr("optuna.storages.journal._file.time", clock)
    assert repair_journal(journal.parent) is None
    assert journal.read_bytes() == content + record


def test_a_torn_journal_that_nobody_writes_is_cut(journal: Path) -> None:
    content = journal.read_bytes()
    journal.write_bytes(content + b'{"torn')
    said = repair_journal(journal.parent)
    assert said is not None
    assert "dropped 6 bytes" in said
    assert journal.read_bytes() == content
    assert repair_journal(journal.parent / "none") is None


HOLD = """
import sys
from pathlib import Path
from search.journal import driver_lock
with driver_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_driver_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # a refusal must not take the name away
            with pytest.raises(RankfrontError, match=f"process {holder.pid} on "), driver_lock(tmp_path):
                raise AssertionError("two drivers")
    finally:
        holder.kill()
        holder.communicate()
    with driver_lock(tmp_path):
        pass


def test_of_drivers_that_start_at_once_one_drives(tmp_path: Path) -> None:
    """A lock is of an opened file, so threads stand for processes."""
    begin, end = threading.Barrier(8), threading.Barrier(8)

    def start(_: int) -> str:
        begin.wait()
        try:
            with driver_lock(tmp_path):
                end.wait()
                return "drives"
        except RankfrontError as error:
            end.wait()
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        ended = list(threads.map(start, range(8)))
    assert ended.count("drives") == 1
    assert sum(line.startswith(f"{tmp_path} has a driver already") for line in ended) == 7


def test_a_lock_file_that_was_taken_away_holds_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked after someone removed it: another driver could make a new one and lock that."""
    flock = fcntl.flock

    def after_removal(stream: object, operation: int) -> None:
        (tmp_path / LOCK).unlink()
        flock(stream, operation)  # type: ignore[arg-type]

    monkeypatch.setattr("fcntl.flock", after_removal)
    with pytest.raises(RankfrontError, match="taken away"), driver_lock(tmp_path):
        raise AssertionError("a lock on nothing")


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), driver_lock(tmp_path):
        raise ZeroDivisionError
    with driver_lock(tmp_path):
        pass


def test_who_holds_the_lock_is_seen_and_not_held_up(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None
    for _ in range(2):
        with driver_lock(tmp_path):
            assert (lock_holder(tmp_path) or "").startswith(f"process {os.getpid()} on ")
            assert list(tmp_path.iterdir()) == [tmp_path / LOCK]
        assert lock_holder(tmp_path) is None


def test_the_journal_is_plain_json_lines(journal: Path) -> None:
    """What `repair` relies on: one JSON object a line."""
    assert all(isinstance(json.loads(line), dict) for line in journal.read_text().splitlines())
