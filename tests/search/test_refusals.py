"""A journal that cannot be written while a driver runs: on a full disk, on one that fails and comes back."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import MadeUpPool, Time, open_study, score_of, stored

from actors.types import RankfrontError
from search.journal import JOURNAL, repair
from search.patience import Patience
from search.runner import Runner, Stop
from search.sections import StopSection

TRIALS = 12
OUTAGE_SECONDS = 10.0


def searched(folder: Path, patience: Patience | None = None, trials: int = TRIALS) -> list[Any]:
    """What a driver leaves that runs to so many trials: number, state, parameters, values, result."""
    study = open_study(folder, patience=patience)
    Runner(study, MadeUpPool(), StopSection(trials=trials), "random", Stop()).run()  # type: ignore[arg-type]
    return [(t.number, t.state, t.params, t.values, t.user_attrs) for t in stored(folder)]


@pytest.fixture
def whole(tmp_path: Path) -> list[Any]:
    """Of a driver that nothing happened to."""
    folder = tmp_path / "whole"
    folder.mkdir()
    return searched(folder)


@contextmanager
def room(path: Path, more: int) -> Iterator[None]:
    """Files may grow to so many bytes beyond the size of this one, as where a disk fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_disk_that_fails_for_ten_seconds_costs_nothing_but_them(
    every: int, tmp_path: Path, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again: each so-many-th write fails after its bytes are there, for ten seconds."""
    time, said = Time(), []
    fsync, writes, until = os.fsync, 0, -1.0

    def failing(descriptor: int) -> None:
        nonlocal writes, until
        if time.now >= until:  # the write that the last outage delayed, or a new one
            recovered, until = until > 0, -1.0
            writes += 1
            if not recovered and writes % every == 0:
                until = time.now + OUTAGE_SECONDS
        if until > 0:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    assert searched(tmp_path, Patience(60.0, said.append, time.clock, time.sleep)) == whole
    assert repair(tmp_path / JOURNAL) is None
    assert time.now >= OUTAGE_SECONDS
    assert said[0].endswith(
        "study.journal cannot be written: Input/output error; asking again for up to 60 s"
    )
    assert said[1].startswith("storage: answers again after")


@pytest.mark.parametrize("more", [0, 1, 40])
def test_a_full_disk_ends_the_run_clearly_and_tears_nothing(
    more: int, tmp_path: Path, whole: list[Any]
) -> None:
    """The first bytes of a record are written before the disk is full; the same command then goes on."""
    study = open_study(tmp_path)
    planned = study.propose("random")
    path = tmp_path / JOURNAL
    before, time = path.read_bytes(), Time()
    for act in (
        lambda study: study.complete(planned, score_of(planned.allocation)),
        lambda study: study.propose("random"),
    ):
        patient = open_study(tmp_path, patience=Patience(60.0, clock=time.clock, sleep=time.sleep))
        with (
            room(path, more),
            pytest.raises(
                RankfrontError, match=r"study\.journal cannot be written: File too large.*goes on once"
            ),
        ):
            act(patient)
        assert path.read_bytes() == before
    assert time.now == pytest.approx(120.0)
    assert repair(path) is None
    assert searched(tmp_path) == whole


@pytest.mark.parametrize("more", [10, 1_500, 4_000])
def test_a_driver_ends_by_what_the_storage_says_whichever_write_it_refuses(
    more: int, tmp_path: Path, whole: list[Any]
) -> None:
    """A proposal that cannot be stored is not taken for another program's trial, to be passed over."""
    open_study(tmp_path)
    with (
        room(tmp_path / JOURNAL, more),
        pytest.raises(RankfrontError, match=r"study\.journal cannot be written: File too large"),
    ):
        searched(tmp_path)
    assert searched(tmp_path) == whole


def test_room_that_is_made_in_time_is_used(tmp_path: Path, whole: list[Any]) -> None:
    study = open_study(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room(seconds: float) -> None:
        if seconds >= OUTAGE_SECONDS:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    time = Time(make_room)
    study.propose("random")
    with room(tmp_path / JOURNAL, 900):
        found = searched(tmp_path, Patience(60.0, clock=time.clock, sleep=time.sleep))
    assert time.now >= OUTAGE_SECONDS
    assert found == whole


def test_what_a_killed_writer_left_is_cut_before_the_next_record(tmp_path: Path, whole: list[Any]) -> None:
    """Of `enqueue`, killed beside a driver while it wrote: no record of the driver may begin in that line."""
    said: list[str] = []
    study = open_study(tmp_path, patience=Patience(60.0, said.append))
    planned = study.propose("random")
    with (tmp_path / JOURNAL).open("ab") as stream:
        stream.write(b'{"torn')
    study.complete(planned, score_of(planned.allocation))
    [line] = said
    assert "dropped 6 bytes of a torn record" in line
    assert repair(tmp_path / JOURNAL) is None
    assert searched(tmp_path) == whole


def test_a_lock_that_somebody_broke_is_no_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes seconds for a write: who waits takes the lock file for one left behind."""
    study = open_study(tmp_path)
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        fsync(descriptor)
        (tmp_path / f"{JOURNAL}.lock").unlink()

    monkeypatch.setattr(os, "fsync", slow)
    study.propose("random")
    assert [trial.state.name for trial in stored(tmp_path)] == ["RUNNING"]
