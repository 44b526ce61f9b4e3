"""Kill the driver with SIGKILL at random instants, and hold what is stored against what it reported.

    python benchmarks/kill.py [--kills 300] [--storage journal|postgres] [--pool fake|real]

Drivers are forked from this process, which has imported everything: a life takes a fraction of a second and
the kill may hit any instant of it, the opening too. The fake pool answers out of order, fails some trials and
returns NaN for others; the real one is in `_real_replicas.py`, and every tenth kill takes a replica along.
After every kill and at the end:

- every end that a driver reported is stored, with the same values; at most one more was stored unreported;
- what has ended never changes, nor do the parameters of any trial; numbers are 0, 1, 2, ...;
- no trial whose result was stored is dispatched again, and none is reported twice.

At the end the study equals that of a driver nobody killed (fake: `random` sampler, trial n is a function of
n; real: `exchange` in deterministic mode).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these when it is imported, and a driver that joins a cluster needs what the cluster began with.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import optuna
from _reporting import DISPATCHED, NAME, REPORTED, Drive, Opener, Reporting, appended, write
from optuna.storages import BaseStorage, RDBStorage

import search.journal
from actors.types import Allocation, FactorSpec, RankfrontError, Score, TargetSpec, TextScore
from search.cost import CostModel
from search.database import leased, resolve
from search.journal import driver_lock, open_journal, repair_journal
from search.packing import RESULT
from search.pool import Job, Outcome
from search.records import Objective
from search.runner import Runner, Stop
from search.samplers import make_sampler
from search.sections import SamplerSection, StopSection
from search.space import Space
from search.study import open_storage_study

TARGETS = tuple(TargetSpec(f"layers.{i}.proj", 48, 24, False, i, "proj") for i in range(12))
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
# So many of the kills hit the opening; the others come up to so long after the first dispatch. On a journal
# most lives must outlast the lock file of a killed one, or none after it writes anything.
OPENING_SHARE = 0.2
FAKE_SECONDS, REAL_SECONDS = 0.6, 1.5
# A made-up score takes up to this: every trial is read again after every kill, so a life is to add few.
SCORE_SECONDS = 0.15
# So many of the kills hit a replica as well, where there are real ones.
REPLICA_SHARE = 0.1
# Trials that are left when the killing is over.
REST = 10
# Nobody but the driver writes here: a lock file of a killed one may be broken sooner than beside others.
STALE_LOCK_SECONDS = 0.2


class FaultyPool:
    """Has the interface of `Pool`: answers in random order, a tenth of the trials with a fault."""

    size = 2

    def __init__(self, dispatched: int) -> None:
        self._dispatched, self._random = dispatched, random.Random(os.getpid())
        self._queue: list[Job] = []

    @property
    def outstanding(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> int:
        return 2 * self.size - self.outstanding

    def submit(self, job: Job) -> None:
        write(self._dispatched, job.key)
        self._queue.append(job)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        if self._queue:
            time.sleep(self._random.uniform(0, SCORE_SECONDS))
            job = self._queue.pop(self._random.randrange(len(self._queue)))
            yield _answer(job)


def _answer(job: Job) -> Outcome:
    """A function of the allocation alone."""
    chance = int(job.allocation.key[:8], 16) / 2**32
    if chance < 0.05:
        return Outcome(job, None, "replica died (injected)")
    loss = math.nan if chance < 0.1 else 2.0 + chance
    text = TextScore("made-up@32", nats=100 * loss, tokens=100, stderr=0.01)
    return Outcome(job, Score("search", text, {}, forward_tokens=100, seconds=0.0, replica="made-up"))


def drive_fake(open_it: Opener, folder: Path, trials: int) -> None:
    """What a driver does from its start to its end."""
    with open_it() as storage:
        cost = CostModel(TARGETS, 20_000, "pivoted", "none")
        space = Space(cost, FactorSpec(), group="target", segments=1, levels=20, floor=0.2)
        sampler = make_sampler(SamplerSection(name="random"))
        plain = open_storage_study(storage, NAME, OBJECTIVES)
        study = Reporting(plain, sampler, 0, space, cost, OBJECTIVES)
        study.reported = appended(folder / REPORTED)
        study.enqueue([(Allocation.dense(TARGETS), "dense")])
        pool = FaultyPool(appended(folder / DISPATCHED))
        Runner(study, pool, StopSection(trials=trials), "random", Stop()).run()  # type: ignore[arg-type]


def journal(folder: Path) -> Opener:
    """Opens the study of a folder as a driver does."""

    @contextlib.contextmanager
    def opened() -> Iterator[BaseStorage]:
        with driver_lock(folder):
            repair_journal(folder)
            yield open_journal(folder)

    return opened


def postgres(url: str) -> Opener:
    """Opens the study of a database; waits while the server has not noticed that the last driver is gone."""

    @contextlib.contextmanager
    def opened() -> Iterator[BaseStorage]:
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    storage = stack.enter_context(leased(url, NAME))
                    break
                except RankfrontError as error:
                    if "has a driver already" not in str(error):
                        raise
                    time.sleep(0.01)
            yield storage

    return opened


@dataclass(frozen=True)
class Trial:
    """What is stored of a trial."""

    state: str
    params: Mapping[str, Any]
    values: list[float] | None
    has_result: bool

    @property
    def ended(self) -> bool:
        return self.state not in ("WAITING", "RUNNING")


def stored(storage: BaseStorage) -> list[Trial]:
    """Every trial, as plain Optuna reads it."""
    if NAME not in {study.study_name for study in storage.get_all_studies()}:
        return []
    trials = optuna.load_study(study_name=NAME, storage=storage).get_trials(deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials))), "numbers have gaps"
    return [Trial(t.state.name, t.params, t.values, RESULT in t.user_attrs) for t in trials]


def _lines(path: Path, start: int) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()[start:]] if path.exists() else []


class Checker:
    """Holds each life of a driver against the one before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: list[Trial] = []
        self._seen = {REPORTED: 0, DISPATCHED: 0}
        self._known: set[int] = set()  # trials whose end was stored by an earlier life
        self.unreported = self.replayed = 0

    def __call__(self, now: list[Trial]) -> None:
        reported, dispatched = self._new(REPORTED), self._new(DISPATCHED)
        numbers = [number for number, _, _ in reported]
        assert len(set(numbers)) == len(numbers), f"reported twice: {numbers}"
        assert not self._known & set(numbers), "an end that was stored is reported again"
        for number, state, values in reported:
            assert (now[number].state, now[number].values) == (state, values), (
                f"trial {number} is not as reported"
            )
        ended = {number for number, trial in enumerate(now) if trial.ended}
        more = ended - self._known - set(numbers)
        assert len(more) <= 1, f"stored, not reported: {more}"
        assert len(now) >= len(self._before), "trials are gone"
        for number, (was, trial) in enumerate(zip(self._before, now, strict=False)):
            assert not was.ended or was == trial, f"trial {number} had ended and changed"
            assert was.params.items() <= trial.params.items(), f"trial {number} changed its parameters"
        with_result = {number for number, was in enumerate(self._before) if was.has_result}
        assert not with_result & set(dispatched), "a trial with a result was dispatched again"
        self.unreported += len(more)
        self.replayed += len((with_result - self._known) & ended)
        self._before, self._known = now, ended

    def _new(self, name: str) -> list[Any]:
        lines = _lines(self._folder / name, self._seen[name])
        self._seen[name] += len(lines)
        return lines


def _fork(drive: Drive, open_it: Opener, folder: Path, trials: int) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            drive(open_it, folder, trials)
            status = 0
        finally:
            if status:
                import traceback

                traceback.print_exc()
            os._exit(status)  # past the clean-up of the process it was forked from
    return child


def _whole_life(drive: Drive, open_it: Opener, folder: Path, trials: int) -> None:
    _, status = os.waitpid(_fork(drive, open_it, folder, trials), 0)
    assert status == 0, f"the driver ended with {status}"


def _until_line(path: Path, child: int) -> float:
    """Wait for a driver's first line in a file; returns the seconds it took."""
    begun = time.monotonic()
    before = path.stat().st_size if path.exists() else 0
    while not path.exists() or path.stat().st_size == before:
        time.sleep(0.001)
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "the driver ended"
    return time.monotonic() - begun


@dataclass(frozen=True)
class Found:
    """What a run of kills came to."""

    kills: int
    trials: int
    failed: int
    rescored: int
    unreported: int
    replayed: int
    replicas: int  # kills that hit a replica too
    each: float  # seconds of a life, its kill and its check
    seconds: float


@dataclass(frozen=True)
class Pooled:
    """A pool to be driven: what a driver does with it, how long one lives after its first dispatch at most,
    and which processes of its replicas may be killed along with it."""

    drive: Drive
    life: float
    processes: Callable[[Path], Sequence[int]] = lambda folder: ()


def kill(
    pool: Pooled,
    folders: tuple[Path, Path],
    openers: tuple[Opener, Opener],
    read: Callable[[], list[Trial]],
    read_whole: Callable[[], list[Trial]],
    kills: int,
    seed: int = 0,
) -> Found:
    """Drive one study through `kills` kills, another one through none, and compare them.

    Raises:
        AssertionError: something that must hold does not.
    """
    started, chance = time.monotonic(), random.Random(seed)
    check = Checker(folders[0])
    done, opening, hit = 0, 0.1, set[int]()
    while done < kills:
        child = _fork(pool.drive, openers[0], folders[0], trials=1_000_000)
        if done == 0:  # replicas take longer to load than drivers live: see the first score
            _until_line(folders[0] / REPORTED, child)
        elif chance.random() < OPENING_SHARE:
            time.sleep(chance.uniform(0, opening))
        else:
            opening = _until_line(folders[0] / DISPATCHED, child)
            time.sleep(chance.uniform(0, pool.life))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the driver ended by itself with {status}"
        done += 1
        check(read())
        processes = sorted({*pool.processes(folders[0])} - hit)
        if processes and chance.random() < REPLICA_SHARE:
            process = chance.choice(processes)
            os.kill(process, signal.SIGKILL)
            hit.add(process)
    trials = len(read()) + REST
    seconds = time.monotonic() - started
    _whole_life(pool.drive, openers[0], folders[0], trials)
    check(read())
    _whole_life(pool.drive, openers[1], folders[1], trials)
    ended, whole = read(), read_whole()
    assert all(trial.ended for trial in ended)
    assert ended == whole, "not the study of a driver that nobody killed"
    dispatched = _lines(folders[0] / DISPATCHED, 0)
    return Found(
        kills=done,
        trials=trials,
        failed=sum(trial.state == "FAIL" for trial in ended),
        rescored=len(dispatched) - len(set(dispatched)),
        unreported=check.unreported,
        replayed=check.replayed,
        replicas=len(hit),
        each=seconds / kills,
        seconds=time.monotonic() - started,
    )


def kill_journal(home: Path, pool: Pooled, kills: int) -> Found:
    """On journals in two folders of `home`."""
    folders = _folders(home)
    warnings.simplefilter("ignore", UserWarning)  # of that short a time
    optuna.logging.set_verbosity(
        optuna.logging.ERROR
    )  # "Forcibly releasing the lock file", at every tenth kill
    search.journal.LOCK_SECONDS = STALE_LOCK_SECONDS  # type: ignore[assignment]

    def reader(folder: Path) -> Callable[[], list[Trial]]:
        return lambda: stored(open_journal(folder))

    openers = (journal(folders[0]), journal(folders[1]))
    return kill(pool, folders, openers, reader(folders[0]), reader(folders[1]), kills)


def kill_postgres(home: Path, pool: Pooled, urls: tuple[str, str], kills: int) -> Found:
    """On two empty databases."""

    def reader(url: str) -> Callable[[], list[Trial]]:
        storage = RDBStorage(resolve(url).render_as_string(hide_password=False))  # caches nothing
        return lambda: stored(storage)

    openers = (postgres(urls[0]), postgres(urls[1]))
    return kill(pool, _folders(home), openers, reader(urls[0]), reader(urls[1]), kills)


def _folders(home: Path) -> tuple[Path, Path]:
    folders = (home / "killed", home / "whole")
    for folder in folders:
        folder.mkdir()
    return folders


@contextlib.contextmanager
def pooled(name: str, home: Path) -> Iterator[Pooled]:
    """The pool of that name."""
    if name == "fake":
        yield Pooled(drive_fake, FAKE_SECONDS)
        return
    from _real_replicas import driven, last_processes

    with driven(home) as drive:
        yield Pooled(drive, REAL_SECONDS, last_processes)


def run(home: Path, pool: str, storage: str, kills: int) -> Found:
    """The kills that were asked for."""
    if storage == "journal":
        with pooled(pool, home) as made:
            return kill_journal(home, made, kills)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "search"))
    from postgres import new_database, running_server

    with running_server() as server, pooled(pool, home) as made:
        urls = (new_database(server, "killed"), new_database(server, "whole"))
        return kill_postgres(home, made, urls, kills)


COLUMNS = (
    "pool",
    "storage",
    "kills",
    "of a replica too",
    "trials",
    "failed by the pool",
    "scored again",
    "stored unreported",
    "replayed",
    "s a life",
    "s",
)


def main() -> None:
    """Print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--storage", choices=["journal", "postgres"], default="journal")
    parser.add_argument("--pool", choices=["fake", "real"], default="fake")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = run(Path(home), arguments.pool, arguments.storage, arguments.kills)
    cells = [
        *(arguments.pool, arguments.storage, found.kills, found.replicas, found.trials, found.failed),
        *(found.rescored, found.unreported, found.replayed, f"{found.each:.2f}", round(found.seconds)),
    ]
    for line in (COLUMNS, ["---"] * len(COLUMNS), cells):
        print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
    main()
