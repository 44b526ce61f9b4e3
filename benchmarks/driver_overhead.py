"""What the driver adds to a trial beside its sampler, next to Ray Tune's OptunaSearch and study.optimize.

    python benchmarks/driver_overhead.py [--finished 1000] [--trials 60] [--theirs 10] [--rounds 2]

All three continue copies of one study of `--finished` trials with a parameter for each of the 224 targets
of a 7B model, on a journal and on PostgreSQL, with Optuna's random sampler and an objective that does
nothing. Ours is the whole loop over a made-up pool: propose, persist, dispatch, record, screen. OptunaSearch
is driven bare (`suggest`, `on_trial_complete`): Tune's scheduler, runner and checkpoints would come on top.
The sampler's own time is measured in all three and taken off. Then: how long `--many` finished trials take
to open.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psycopg
from _common import machine, table
from _queue_pool import QueuePool
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from actors.samples import pack_floats
from actors.types import Allocation, FactorSpec, Score, TargetSpec, TextScore
from search.cost import CostModel
from search.database import leased, resolve
from search.journal import JOURNAL, driver_lock, open_journal, repair_journal
from search.packing import RESULT, Packing, result_of
from search.pool import Outcome
from search.records import Objective
from search.runner import Runner, Stop
from search.screen import Screen
from search.sections import StopSection
from search.space import Space
from search.study import SearchStudy, open_storage_study

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "search"))
from postgres import PASSWORD, new_database, running_server

NAME = "overhead"
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
# Those of Llama 2 7B.
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}
TARGETS = tuple(
    TargetSpec(f"model.layers.{block}.{module}", rows, cols, False, block, module)
    for block in range(32)
    for module, (rows, cols) in SHAPES.items()
)
COST = CostModel(TARGETS, 6_738_415_616, "auto", "mean", itemsize=2)
LEVELS = 20
SPACE = Space(COST, FactorSpec(), group="target", segments=1, levels=LEVELS, floor=0.3)
REPLICAS = 8
# Windows of a search split of 8,192 tokens: the loss of each is part of a score.
WINDOWS = 16


def score_of(allocation: Allocation) -> Score:
    """A made-up score, as large as a real one without tasks."""
    nll = 2.0 + int(allocation.key[:8], 16) / 2**32
    windows = pack_floats([nll] * WINDOWS)
    text = TextScore("made-up@512", nats=8192 * nll, tokens=8192, stderr=0.01, windows=windows)
    return Score("search", text, {}, forward_tokens=8192, seconds=0.0, replica="made-up")


class NoOpPool(QueuePool):
    """Every job is done when it is looked at."""

    def wait(self, seconds: float) -> Iterator[Outcome]:
        if self._queue:
            job = self._queue.pop(0)
            yield Outcome(job, score_of(job.allocation))


class TimedSampler(RandomSampler):
    """Optuna's random sampler, and how long it took."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(seed)
        self.seconds = 0.0

    def _timed(self, method: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            self.seconds += time.perf_counter() - begun

    def infer_relative_search_space(self, *arguments: Any) -> Any:
        return self._timed(super().infer_relative_search_space, *arguments)

    def sample_relative(self, *arguments: Any) -> Any:
        return self._timed(super().sample_relative, *arguments)

    def sample_independent(self, *arguments: Any) -> Any:
        return self._timed(super().sample_independent, *arguments)

    def before_trial(self, *arguments: Any) -> None:
        self._timed(super().before_trial, *arguments)

    def after_trial(self, *arguments: Any) -> None:
        self._timed(super().after_trial, *arguments)


# -- the three sides --------------------------------------------------------------------------


def study_of(storage: BaseStorage, sampler: RandomSampler) -> SearchStudy:
    """As a driver opens it."""
    study = open_storage_study(storage, NAME, OBJECTIVES)
    return SearchStudy(study, sampler, 0, SPACE, COST, OBJECTIVES)


def ours(storage: BaseStorage, trials: int, sampler: TimedSampler) -> float:
    """Seconds of `trials` more trials, the sampler's included."""
    study = study_of(storage, sampler)
    goal = study.started + trials
    with Screen(Console(file=io.StringIO()), study, goal, goal - trials) as screen:
        runner = Runner(
            study,
            NoOpPool(REPLICAS),  # type: ignore[arg-type]
            StopSection(trials=goal),
            "random",
            Stop(),
            screen.redraw,
        )
        sampler.seconds = 0.0
        begun = time.perf_counter()
        runner.run()
        return time.perf_counter() - begun


def ray_tune(storage: BaseStorage, trials: int, sampler: TimedSampler) -> float:
    """The same of OptunaSearch, which keeps no score beside the values."""
    from ray.tune.search.optuna import OptunaSearch

    metrics = [objective.name for objective in OBJECTIVES]
    searcher = OptunaSearch(
        dict(SPACE.distributions),
        metric=metrics,
        mode=["min"] * len(metrics),
        sampler=sampler,
        study_name=NAME,
        storage=storage,
    )
    values = dict(zip(metrics, (0.5, 2.0), strict=True))
    sampler.seconds = 0.0
    begun = time.perf_counter()
    for number in range(trials):
        searcher.suggest(f"trial-{number}")
        searcher.on_trial_complete(f"trial-{number}", values)
    return time.perf_counter() - begun


def optimize(storage: BaseStorage, trials: int, sampler: TimedSampler) -> float:
    """The same of study.optimize, with one attribute for the score."""
    result = result_of(score_of(Allocation.dense(TARGETS)))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        for target in TARGETS:
            trial.suggest_int(target.name, 0, LEVELS)
        trial.set_user_attr(RESULT, result)
        return 0.5, 2.0

    study = optuna.load_study(study_name=NAME, storage=storage, sampler=sampler)
    sampler.seconds = 0.0
    begun = time.perf_counter()
    study.optimize(objective, n_trials=trials)
    return time.perf_counter() - begun


# -- storages ---------------------------------------------------------------------------------


def finished_trials(count: int, first: int) -> Iterator[FrozenTrial]:
    """Made-up finished trials, as a driver leaves them."""
    packing, sampler = Packing(SPACE, COST), RandomSampler(seed=first)
    memory = optuna.create_study(sampler=sampler)
    for _ in range(count):
        allocation = SPACE.allocation(memory.ask(SPACE.distributions).params)
        score = score_of(allocation)
        trial = packing.trial(allocation, "random", TrialState.RUNNING, result_of(score))
        trial.state, trial.values = (
            TrialState.COMPLETE,
            [COST.budgets(allocation)["budget.model"], score.text.nll],
        )
        trial.datetime_complete = trial.datetime_start
        yield trial


def fill(storage: BaseStorage, count: int, first: int = 0) -> None:
    """Add finished trials to the study."""
    study = open_storage_study(storage, NAME, OBJECTIVES)
    for trial in finished_trials(count, first):
        storage.create_new_trial(study._study_id, trial)


@dataclass(frozen=True)
class Place:
    """A kind of storage: a copy of the filled study for each side, opened as that side would."""

    name: str
    driver: Callable[[str], contextlib.AbstractContextManager[BaseStorage]]
    plain: Callable[[str], BaseStorage]
    copy: Callable[[str], None]


def journals(home: Path) -> Place:
    """A folder for each side."""

    @contextlib.contextmanager
    def driver(side: str) -> Iterator[BaseStorage]:
        (home / side).mkdir(exist_ok=True)
        with driver_lock(home / side):
            repair_journal(home / side)
            yield open_journal(home / side)

    def plain(side: str) -> BaseStorage:
        return JournalStorage(JournalFileBackend(str(home / side / JOURNAL)))

    def copy(side: str) -> None:
        (home / side).mkdir()
        shutil.copy(home / "filled" / JOURNAL, home / side / JOURNAL)

    return Place("journal", driver, plain, copy)


def databases(server: str) -> Place:
    """A database for each side."""
    urls: dict[str, str] = {}

    def driver(side: str) -> contextlib.AbstractContextManager[BaseStorage]:
        if side not in urls:
            urls[side] = new_database(server, side)
        return leased(urls[side], NAME)

    def plain(side: str) -> BaseStorage:
        url = resolve(urls[side]).render_as_string(hide_password=False)
        return optuna.storages.get_storage(RDBStorage(url))

    def copy(side: str) -> None:
        with psycopg.connect(host=server, user="postgres", password=PASSWORD, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {side} TEMPLATE filled")
        urls[side] = urls["filled"].replace("/filled?", f"/{side}?")

    return Place("PostgreSQL", driver, plain, copy)


# -- measuring --------------------------------------------------------------------------------


@dataclass
class Spent:
    """What a side took for so many trials."""

    trials: int = 0
    seconds: float = 0.0
    sampler: float = 0.0

    @property
    def overhead(self) -> float:
        """Milliseconds a trial beside the sampler."""
        return 1e3 * (self.seconds - self.sampler) / self.trials


def compare(place: Place, finished: int, trials: int, theirs: int, rounds: int) -> list[list[object]]:
    """Rows of the table: the sides in turn, round by round."""
    with place.driver("filled") as storage:
        fill(storage, finished)
    for side in ("ours", "tune", "optuna"):
        place.copy(side)
    found = {"ours": Spent(), "tune": Spent(), "optuna": Spent()}

    def note(side: str, count: int, run: Callable[..., float], storage: BaseStorage, turn: int) -> None:
        sampler = TimedSampler(seed=1000 + turn)
        found[side].seconds += run(storage, count, sampler)
        found[side].sampler += sampler.seconds
        found[side].trials += count

    with place.driver("ours") as mine:
        tune, plain = place.plain("tune"), place.plain("optuna")
        for turn in range(rounds):
            note("ours", trials, ours, mine, turn)
            note("tune", theirs, ray_tune, tune, turn)
            note("optuna", theirs, optimize, plain, turn)
    titles = {"ours": "rankfront", "tune": "Ray Tune's OptunaSearch", "optuna": "study.optimize"}
    return [
        [
            place.name,
            titles[side],
            spent.trials,
            f"{1e3 * spent.sampler / spent.trials:.1f}",
            f"{spent.overhead:.1f}",
            "" if side == "ours" else f"{spent.overhead / found['ours'].overhead:.0f} x",
        ]
        for side, spent in found.items()
    ]


def opening(place: Place, finished: int, many: int) -> list[object]:
    """Row of the second table: the filled study grown to `many` trials, opened as a driver does."""
    with place.driver("filled") as storage:
        fill(storage, many - finished, first=finished)
    begun = time.perf_counter()
    with place.driver("filled") as storage:
        study = study_of(storage, TimedSampler())
        opened = time.perf_counter() - begun
        rows = study.rows()
        assert len(rows) == many, len(rows)
        assert all(row.finished and row.score is not None for row in rows)
    return [place.name, many, f"{opened:.1f}", f"{time.perf_counter() - begun:.1f}"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=60, help="ours in a round")
    parser.add_argument("--theirs", type=int, default=10, help="the others' in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--many", type=int, default=5000)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)
    rows, openings = [], []
    with tempfile.TemporaryDirectory() as home, running_server(durable=True) as server:
        for place in (journals(Path(home)), databases(server)):
            rows += compare(place, arguments.finished, arguments.trials, arguments.theirs, arguments.rounds)
            openings.append(opening(place, arguments.finished, arguments.many))
    columns = ["storage", "side", "trials", "sampler, ms", "overhead, ms/trial", "of rankfront's"]
    print(table(columns, rows))
    print()
    print(table(["storage", "finished trials", "opened, s", "every row read, s"], openings))
    print(
        f"\n{len(TARGETS)} targets, {arguments.finished} finished trials, {arguments.rounds} rounds in turn; "
        f"fsync of 4 KiB {1e3 * fsync_seconds():.1f} ms; {machine()}"
    )


def fsync_seconds() -> float:
    """Median time of an fsync after a small write, where the storages are."""
    found = []
    with tempfile.TemporaryFile() as stream:
        for _ in range(32):
            stream.write(b"x" * 4096)
            stream.flush()
            begun = time.perf_counter()
            os.fsync(stream.fileno())
            found.append(time.perf_counter() - begun)
    return sorted(found)[len(found) // 2]


if __name__ == "__main__":
    main()
