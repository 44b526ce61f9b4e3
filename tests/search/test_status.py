"""What is said of a study from outside: while it is driven, after its driver was killed, before it began."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from fakes import MODEL_PARAMETERS, TARGETS, MadeUpPool, score_two
from optuna.study import StudyDirection
from optuna.trial import TrialState

import search.health
from actors.types import Prepared, RankfrontError
from search.beacon import Beacon
from search.begun import write_identity
from search.cli_status import status_command
from search.config import parse_config
from search.database import open_database
from search.folder import CONFIG, PREPARED, StudyFolder
from search.health import STATUS, ReplicaHealth, here, write_health
from search.journal import driver_lock, open_journal
from search.metrics import RayMetrics
from search.runner import hypervolumes
from search.status import read_status
from search.study import ForeignError

HUB = {"model": {"source": "org/model"}, "text": {"source": "org/text"}, "space": {"group": "module"}}
BUSY = ReplicaHealth(
    "replica-0", "busy", 2, (3, 4), 1_000.0, "node-a", 77, "killed by the kernel", (0.9, 0.72)
)


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """A study that was prepared and has no trial."""
    config = parse_config({"study": "made-up", "runs": str(tmp_path), "sampler": {"name": "random"}, **HUB})
    splits: dict[str, Any] = {"search": {}, "test": {}}
    prepared = Prepared("", "", TARGETS, MODEL_PARAMETERS, {}, {}, splits, {}, reused=False)
    path = config.folder
    path.mkdir(parents=True)
    (path / CONFIG).write_text(config.to_yaml())
    (path / PREPARED).write_text(json.dumps(prepared.to_dict()))
    return StudyFolder.open(path)


def searched(folder: StudyFolder) -> None:
    """Dense and another scored, one failed for each of two reasons and one of them twice, two in flight."""
    study = folder.open_study()
    score_two(study)
    for reason in ("nll is nan (attempt 2 of 2)", "replica died", "nll is nan (attempt 1 of 2)"):
        study.fail(study.propose("random").number, reason)
    study.propose("random")
    study.propose("random")


def content(path: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}


def test_a_study_that_is_driven(folder: StudyFolder) -> None:
    searched(folder)
    write_health(folder.path, here(5.0, 1, (replace(BUSY, trials=(5, 6)),)))
    with driver_lock(folder.path):
        before = content(folder.path)
        status = read_status(str(folder.path), Path("runs"))
        assert content(folder.path) == before, "a status writes nothing"
    assert status.driver is not None
    assert status.driver.startswith(f"process {os.getpid()} on ")
    assert status.trials == {"COMPLETE": 2, "FAIL": 3, "RUNNING": 2}
    assert [(each.trial, each.replica, each.node, each.pid) for each in status.running] == [
        (5, "replica-0", "node-a", 77),
        (6, None, None, None),
    ]
    assert status.running[0].since == 1_000.0
    assert [(each.reason, each.trials) for each in status.failures] == [
        ("nll is nan", (2, 4)),
        ("replica died", (3,)),
    ]
    assert status.queue == 1
    study = folder.open_study()
    assert status.hypervolume == pytest.approx(hypervolumes(study)[-1])
    assert {best.trial for best in status.best} <= {1}
    assert all(best.budget >= study.rows()[best.trial].budget_model for best in status.best)


def test_what_an_earlier_driver_said_is_not_of_this_one(folder: StudyFolder) -> None:
    """A search was killed; another command drives the study, and has said nothing of replicas."""
    searched(folder)
    write_health(folder.path, replace(here(5.0, 1, (replace(BUSY, trials=(5, 6)),)), pid=os.getppid()))
    with driver_lock(folder.path):
        status = read_status(str(folder.path), Path("runs"))
    assert (status.queue, status.replicas, status.health_seconds) == (0, (), None)
    assert [(each.trial, each.replica) for each in status.running] == [(5, None), (6, None)]
    assert read_status(str(folder.path), Path("runs")).replicas, "as they were last, with its driver gone"


def test_a_study_that_is_being_prepared_is_no_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "llama"
    path.mkdir(parents=True)
    with driver_lock(path):
        for name in ("llama", str(path)):
            with pytest.raises(RankfrontError, match=f"{path} is being prepared by process {os.getpid()} on"):
                read_status(name, tmp_path / "runs")
    with pytest.raises(RankfrontError, match="holds no study"):
        read_status("llama", tmp_path / "runs")


def test_rates_are_of_what_replicas_scored(folder: StudyFolder) -> None:
    """Two trials of 100 tokens each, from the first start to the last end."""
    searched(folder)
    trials = folder.open_study().frozen()
    begun = min(trial.datetime_start for trial in trials if trial.datetime_start is not None)
    ended = max(trial.datetime_complete for trial in trials if trial.datetime_complete is not None)
    seconds = (ended - begun).total_seconds()
    status = read_status(str(folder.path), Path("runs"))
    assert status.tokens_per_second == pytest.approx(200 / seconds, rel=1e-3)
    assert status.trials_per_hour == pytest.approx(2 * 3600 / seconds, rel=1e-3)


def test_a_driver_that_was_killed_is_gone(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    searched(folder)
    write_health(folder.path, here(5.0, 1, (BUSY,)))
    with driver_lock(folder.path):
        pass
    status = read_status("made-up", folder.path.parent)
    assert (status.driver, status.ended, status.queue) == (None, None, 0)
    assert [each.replica for each in status.running] == [None, None], "nothing runs any more"
    status_command("made-up", folder.path.parent)
    said = capsys.readouterr().out
    assert "driver gone" in said
    assert "2 COMPLETE, 3 FAIL, 2 RUNNING" in said
    assert "killed by the kernel" in said
    assert "busy, GPU at work 90% 72%" in said


def test_replicas_that_wait_for_the_next_driver_are_told_of(
    folder: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(folder)
    health = here(5.0, 1, (BUSY,), alone_seconds=600.0)
    write_health(folder.path, health)
    assert 0 < read_status("made-up", folder.path.parent).waits <= 600
    status_command("made-up", folder.path.parent)
    assert "its replicas wait for that for 9:5" in " ".join(capsys.readouterr().out.split())
    assert health.waits(health.written + 150.0) == pytest.approx(450.0)
    assert health.waits(health.written + 601.0) == 0.0
    assert replace(health, stopped="done").waits(health.written) == 0.0
    with driver_lock(folder.path):
        assert read_status("made-up", folder.path.parent).waits == 0.0


def test_a_driver_that_stopped_said_why(folder: StudyFolder) -> None:
    class Pool(MadeUpPool):
        queued = 0

        def health(self) -> tuple[ReplicaHealth, ...]:
            return (BUSY,)

    searched(folder)
    beacon = Beacon(folder.path, folder.open_study(), Pool(), RayMetrics("made-up"))  # type: ignore[arg-type]
    beacon.tick()
    assert read_status(str(folder.path), Path("runs")).ended is None
    beacon.stop("SIGTERM")
    status = read_status(str(folder.path), Path("runs"))
    assert (status.ended, status.replicas) == ("SIGTERM", (BUSY,))


def test_a_study_without_a_trial_is_not_begun_by_looking(folder: StudyFolder) -> None:
    before = content(folder.path)
    status = read_status(str(folder.path), Path("runs"))
    assert (status.trials, status.running, status.hypervolume, status.best) == ({}, (), None, ())
    assert status.health_seconds is None
    assert content(folder.path) == before


def test_json_holds_everything(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    searched(folder)
    write_health(folder.path, here(5.0, 0, (BUSY,)))
    status_command(str(folder.path), Path("runs"), as_json=True)
    shown = json.loads(capsys.readouterr().out)
    known = json.loads(json.dumps(read_status(str(folder.path), Path("runs")).to_dict()))
    for times in ("seen", "health_seconds"):
        del shown[times], known[times]
    assert shown == known
    assert shown["replicas"][0]["failure"] == "killed by the kernel"


def test_a_study_in_a_database_is_read_by_its_url(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a machine that has nothing of it; the only study of a database needs no name."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    monkeypatch.setenv("STUDIES", url)
    config = parse_config({**yaml.safe_load(folder.config.to_yaml()), "database": "${STUDIES}"})
    storage = open_database(url)
    write_identity(storage, config, folder.prepared)
    there = replace(folder, config=config, leased=storage)
    searched(there)
    for name in ("${STUDIES}", url):
        status = read_status(name, tmp_path / "elsewhere")
        assert status.trials == {"COMPLETE": 2, "FAIL": 3, "RUNNING": 2}
        assert status.study == "made-up"
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(RankfrontError, match=r"no study of ours in it is 'other'; in it: made-up"):
        read_status(url, tmp_path, "other")
    storage.create_new_study([StudyDirection.MINIMIZE], "theirs")
    with pytest.raises(RankfrontError, match=r"give the study with --study; in it: made-up, theirs"):
        read_status(url, tmp_path)


def test_a_full_disk_does_not_end_the_search(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write_health(folder.path, here(5.0, 0, ()))
    before = (folder.path / STATUS).read_bytes()

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search.health, "write_atomic", full)
    write_health(folder.path, here(6.0, 0, ()))
    assert (folder.path / STATUS).read_bytes() == before


def test_times_are_unix_times(folder: StudyFolder) -> None:
    searched(folder)
    status = read_status(str(folder.path), Path("runs"))
    [first, _] = [t for t in folder.open_study().frozen() if t.state == TrialState.RUNNING]
    assert isinstance(first.datetime_start, datetime)
    assert status.running[0].since == first.datetime_start.timestamp()


@pytest.fixture
def in_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts this process into a time zone."""

    def change(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield change
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("kept", ["journal", "database"])
@pytest.mark.parametrize("zone", ["UTC+10", "UTC-14"])
def test_a_driver_in_another_time_zone_is_as_fast(
    folder: StudyFolder, tmp_path: Path, in_zone: Callable[[str], None], zone: str, kept: str
) -> None:
    """Optuna's times name no zone once they are read: they must be those of who reads them."""
    url = f"sqlite:///{tmp_path / 'studies.db'}" if kept == "database" else None
    config = parse_config({**yaml.safe_load(folder.config.to_yaml()), "database": url})
    (folder.path / CONFIG).write_text(config.to_yaml())
    in_zone("UTC-1")
    searched(StudyFolder.open(folder.path))
    trials = StudyFolder.open(folder.path).open_study().frozen()
    first = min(start.timestamp() for trial in trials if (start := trial.datetime_start) is not None)
    here = read_status(str(folder.path), tmp_path)
    in_zone(zone)
    away = read_status(str(folder.path), tmp_path)
    assert (away.running, away.trials_per_hour) == (here.running, here.trials_per_hour)
    with driver_lock(folder.path):
        driven = read_status(str(folder.path), tmp_path)
    assert driven.trials_per_hour == pytest.approx(2 * 3600 / (driven.seen - first), rel=0.1)


def test_trials_that_never_began_have_no_rate(folder: StudyFolder) -> None:
    """As those whose levels are not of the space: they fail before they start."""
    study = folder.open_study()
    other = optuna.load_study(study_name="made-up", storage=open_journal(folder.path))
    other.enqueue_trial(dict.fromkeys(folder.space.distributions, 999))
    with pytest.raises(ForeignError):
        study.propose("random")
    status = read_status(str(folder.path), Path("runs"))
    assert (status.trials, status.trials_per_hour) == ({"FAIL": 1}, 0.0)


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RankfrontError, match="in it: none"):
        read_status(f"sqlite:///{tmp_path / 'studies.db'}", tmp_path)
    assert not list(tmp_path.iterdir())
