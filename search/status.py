"""How a study stands, read from where it is kept: nothing is written, a driver may run or be long gone."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from actors.types import Prepared, RankfrontError
from search.config import parse_saved
from search.database import check_url, lease_holder, open_tables, resolve, shown
from search.findings import LADDER
from search.folder import StudyFolder, find_study, refuse_lost
from search.health import Health, ReplicaHealth, read_health
from search.journal import JOURNAL, lock_holder, open_journal
from search.runner import current_hypervolume
from search.sections import SamplerSection
from search.stored import has_trial
from search.study import IDENTITY, SearchStudy

# Throughput is that of the last hour in which something ended.
RATE_SECONDS = 3600.0
_PROCESS = re.compile(r"process (\d+) on (\S+)")
_ATTEMPT = re.compile(r" \(attempt \d+ of \d+\)$")


@dataclass(frozen=True)
class Running:
    """A trial that runs `since` (Unix time, seconds); where, as far as the driver has said."""

    trial: int
    since: float | None
    replica: str | None
    node: str | None
    pid: int | None


@dataclass(frozen=True)
class Failure:
    """Trials that failed for one reason."""

    reason: str
    trials: tuple[int, ...]


@dataclass(frozen=True)
class Best:
    """The front's least loss at or under a share of the model's parameters."""

    budget: float
    trial: int
    nll: float


@dataclass(frozen=True)
class Status:
    """A study at the time `seen` (Unix time, seconds).

    `driver` is who holds it, None where nobody does; `ended` is then why, None where the last driver did not
    come to say. `waits` are the seconds that the replicas of a killed driver wait for the next one at most, 0
    where none do. `health_seconds` is the age of what is said of replicas, None where this machine has
    nothing of it: it is in the driver's folder, and of the commands that drive a study only `search` writes
    it. Rates are of trials that a replica scored; the hypervolume is None until the dense model is scored.
    """

    study: str
    place: str
    seen: float
    driver: str | None
    ended: str | None
    waits: float
    trials: Mapping[str, int]
    running: tuple[Running, ...]
    queue: int
    replicas: tuple[ReplicaHealth, ...]
    health_seconds: float | None
    failures: tuple[Failure, ...]
    trials_per_hour: float
    tokens_per_second: float
    hypervolume: float | None
    best: tuple[Best, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_status(name: str, runs: Path, study: str | None = None) -> Status:
    """The status of a study: of a folder, of a name in `runs`, or of `study` in the database of a URL.

    A URL that holds one study needs no name.

    Raises:
        RankfrontError: there is no such study, it cannot be read, or `study` is given and no URL.
    """
    if "://" in name or name.startswith("${"):
        return _database_status(name, runs, study)
    if study is not None:
        raise RankfrontError(f"--study {study}: of a database by its URL; {name} names one study by itself")
    folder = find_study(name, runs)
    database = folder.config.database
    if database is not None:
        storage = open_tables(database)
        holder = lease_holder(database, folder.config.study) or lock_holder(folder.path)
        return _status(folder, storage, shown(resolve(database)), holder)
    storage = open_journal(folder.path) if (folder.path / JOURNAL).exists() else None
    return _status(folder, storage, str(folder.path), lock_holder(folder.path))


def _database_status(url: str, runs: Path, name: str | None) -> Status:
    try:
        check_url(url)
    except ValueError as error:
        raise RankfrontError(f"database: {error}") from error
    storage = open_tables(url)
    known = {} if storage is None else {found.study_name: found for found in storage.get_all_studies()}
    if name is None and len(known) == 1:
        [name] = known
    if name not in known or IDENTITY not in known[name].user_attrs:
        listed = ", ".join(sorted(known)) or "none"
        asked = "give the study with --study" if name is None else f"no study of ours in it is {name!r}"
        raise RankfrontError(f"database: {asked}; in it: {listed}")
    kept = known[name].user_attrs[IDENTITY]
    config = parse_saved(kept["config"], f"study {name!r} of the database")
    folder = StudyFolder(runs / name, config, Prepared.from_dict(kept["prepared"]))
    return _status(folder, storage, shown(resolve(url)), lease_holder(url, name))


def _status(folder: StudyFolder, storage: BaseStorage | None, place: str, driver: str | None) -> Status:
    study = _opened(folder, storage)
    if study is None:
        refuse_lost(folder.path)
    trials = [] if study is None else study.frozen()
    health = read_health(folder.path)
    if driver and health and not _wrote(health, driver):
        health = None  # a driver of before: its replicas and its queue are no more
    now = time.time()
    per_hour, per_second = _rates(trials, study, now if driver else None)
    return Status(
        study=folder.config.study,
        place=place,
        seen=now,
        driver=driver,
        ended=health.stopped if health and not driver else None,
        waits=health.waits(now) if health and not driver else 0.0,
        trials=dict(Counter(trial.state.name for trial in trials)),
        running=_running(trials, health if driver else None),
        queue=health.queue if health and driver else 0,
        replicas=health.replicas if health else (),
        health_seconds=now - health.written if health else None,
        failures=_failures(study),
        trials_per_hour=per_hour,
        tokens_per_second=per_second,
        hypervolume=None if study is None else current_hypervolume(study),
        best=_best(study),
    )


def _wrote(health: Health, driver: str) -> bool:
    """Whether the driver that holds the study is the one whose health this is."""
    named = _PROCESS.search(driver)
    if named is None:
        return False
    pid, host = named.groups()
    return int(pid) == health.pid and health.host.startswith(host)  # a database keeps only so much of a name


def _opened(folder: StudyFolder, storage: BaseStorage | None) -> SearchStudy | None:
    """The study, None where it has no trial: opening it would begin it."""
    if storage is None or not has_trial(storage, folder.config.study):
        return None
    return dataclasses.replace(folder, leased=storage).open_study(SamplerSection(name="random"))


def _running(trials: Sequence[FrozenTrial], health: Health | None) -> tuple[Running, ...]:
    at = {each.trials[0]: each for each in health.replicas if each.trials} if health else {}
    found = []
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            where = at.get(trial.number)
            since = where.since if where else _unix(trial.datetime_start)
            place = (where.name, where.node, where.pid) if where else (None, None, None)
            found.append(Running(trial.number, since, *place))
    return tuple(found)


def _rates(
    trials: Sequence[FrozenTrial], study: SearchStudy | None, now: float | None
) -> tuple[float, float]:
    """Trials an hour and tokens a second up to `now`, or up to the last end where that is None."""
    ends = {trial.number: _unix(trial.datetime_complete) for trial in trials if trial.state.is_finished()}
    known = {number: end for number, end in ends.items() if end is not None}
    if study is None or not known:
        return 0.0, 0.0
    until = now or max(known.values())
    starts = [start for trial in trials if (start := _unix(trial.datetime_start)) is not None]
    since = max(min(starts, default=-math.inf), until - RATE_SECONDS)  # what fails unstarted has none
    rows = [study.row(number) for number, end in known.items() if end >= since]
    scored = [row.score.forward_tokens for row in rows if row.score and row.copied_from is None]
    seconds = max(until - since, 1e-9)
    return 3600 * len(scored) / seconds, sum(scored) / seconds


def _failures(study: SearchStudy | None) -> tuple[Failure, ...]:
    """The most frequent first."""
    by_reason: dict[str, list[int]] = {}
    for row in () if study is None else study.rows():
        if row.state == "FAIL":
            reason = _ATTEMPT.sub("", row.reason or "another program's, without a reason")
            by_reason.setdefault(reason, []).append(row.number)
    found = [Failure(reason, tuple(numbers)) for reason, numbers in by_reason.items()]
    return tuple(sorted(found, key=lambda failure: -len(failure.trials)))


def _best(study: SearchStudy | None) -> tuple[Best, ...]:
    if study is None:
        return ()
    scored = [(row.score.text.nll, row) for row in study.front if row.score is not None]
    found = []
    for budget in LADDER:
        under = [(nll, row.number) for nll, row in scored if row.budget_model <= budget]
        if under:
            nll, number = min(under)
            found.append(Best(budget, number, nll))
    return tuple(found)


def _unix(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()
