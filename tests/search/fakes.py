"""Made-up targets, costs, scores and studies: the search without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from safetensors.numpy import save_file

from actors.types import Allocation, FactorSpec, Score, TargetSpec, TaskScore, TextScore
from search.constraints import Constraint
from search.cost import CostModel
from search.health import ReplicaHealth
from search.journal import open_journal
from search.landscape import Landscape, landscape_of
from search.patience import Patience
from search.pool import Job, Outcome
from search.records import Objective
from search.runner import Runner, Stop
from search.samplers import make_sampler
from search.sections import SamplerSection, StopSection
from search.space import Space
from search.study import SearchStudy, open_storage_study
from search.view import Planned

SHAPES = {"q_proj": (24, 24), "up_proj": (48, 24), "down_proj": (24, 48)}
TARGETS = tuple(
    TargetSpec(f"layers.{block}.{module}", rows, cols, False, block, module)
    for block in range(4)
    for module, (rows, cols) in SHAPES.items()
)
LINEAR_PARAMETERS = 4 * (24 * 24 + 2 * 48 * 24)
MODEL_PARAMETERS = LINEAR_PARAMETERS + 3_000
# The search chooses between methods; one target of four q_proj, and every up_proj, has its own configured.
CHOOSING = FactorSpec(
    method="feature",
    methods=(("layers.0.q_proj", "weight"), ("*.up_proj", "curvature")),
    choices=("weight", "feature", "curvature"),
)
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
DENSE_NLL = 2.0
every_sampler = pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe", "random"])


def cost_model(storage: str = "pivoted", bias: str = "none") -> CostModel:
    return CostModel(TARGETS, MODEL_PARAMETERS, storage, bias)


def space_of(cost: CostModel, **changes: Any) -> Space:
    usual = {"factors": FactorSpec(), "group": "module", "segments": 1, "levels": 10, "floor": 0.2}
    return Space(cost, **{**usual, **changes})


def open_study(
    folder: Path,
    sampler: str = "random",
    seed: int = 0,
    population: int = 6,
    objectives: tuple[Objective, ...] = OBJECTIVES,
    constraints: tuple[Constraint, ...] = (),
    lag: int | None = None,
    patience: Patience | None = None,
    **space: Any,
) -> SearchStudy:
    """The study of a folder, created if it is new: what a driver does when it starts."""
    cost = cost_model()
    section = SamplerSection(name=sampler, seed=seed, population=population)
    study = open_storage_study(open_journal(folder, patience), "made-up", objectives)
    levels = space_of(cost, **space)
    proposer = make_sampler(section, lambda: landscape(levels, cost, objectives), constraints)
    return SearchStudy(study, proposer, seed, levels, cost, objectives, constraints, lag)


def landscape(space: Space, cost: CostModel, objectives: tuple[Objective, ...] = OBJECTIVES) -> Landscape:
    """What the exchange sampler is told of a made-up study; `loss` is predicted but for its multipliers."""
    predicted = {
        target.name: (1 - np.arange(1, target.full_rank + 1) / target.full_rank) ** 2
        for target in cost.targets
    }
    return landscape_of(space, cost, objectives, [np.inf] * len(objectives), predicted)


def loss(allocation: Allocation) -> float:
    """Dense loss plus what each target's missing ranks cost; later targets cost more."""
    full = {target.name: target.full_rank for target in TARGETS}
    missing = [(1 - (full[name] if rank is None else rank) / full[name]) ** 2 for name, rank in allocation]
    return DENSE_NLL + sum(index * share for index, share in enumerate(missing, 1)) / 10


def score_of(allocation: Allocation, nll: float | None = None, tokens: int = 100) -> Score:
    nll = loss(allocation) if nll is None else nll
    text = TextScore("made-up@32", nats=nll * tokens, tokens=tokens, stderr=0.01)
    tasks = {"boolq": TaskScore(examples=10, acc=0.6, acc_norm=None, margin=0.25)}
    return Score("search", text, tasks, forward_tokens=tokens, seconds=0.5, replica="made-up")


@contextmanager
def dies_before_the_state(study: SearchStudy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver that ends a trial in here dies when the result is written and the final state is not."""

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study._storage, "set_trial_state_values", crash)
    with pytest.raises(KeyboardInterrupt):
        yield


class MadeUpPool:
    """Has the interface of `Pool`; answers one job a look, the oldest first."""

    alone_seconds, queued = 0.0, 0

    def __init__(self, answer: Callable[[Job], Outcome] | None = None, size: int = 2) -> None:
        self.size, self._answer = size, answer or (lambda job: Outcome(job, score_of(job.allocation)))
        self.submitted: list[Job] = []
        self._queue: list[Job] = []

    @property
    def outstanding(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> int:
        return max(0, 2 * self.size - self.outstanding)

    def submit(self, job: Job) -> None:
        self.submitted.append(job)
        self._queue.append(job)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        if self._queue:
            yield self._answer(self._queue.pop(0))

    def health(self) -> tuple[ReplicaHealth, ...]:
        return ()

    def close(self) -> None:
        self._queue.clear()


class ShuffledPool(MadeUpPool):
    """Answers in an order of its own: a seeded choice among the jobs it was given."""

    def __init__(self, seed: int, answer: Callable[[Job], Outcome] | None = None, size: int = 2) -> None:
        super().__init__(answer, size)
        self._chance = random.Random(seed)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        if self._queue and self._chance.random() < 0.7:
            yield self._answer(self._queue.pop(self._chance.randrange(len(self._queue))))


class Time:
    """A clock that only sleeping moves; `then` is told after each sleep how many seconds it has been."""

    def __init__(self, then: Callable[[float], None] = lambda seconds: None) -> None:
        self.now, self._then = 0.0, then

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._then(self.now)


def energy_of(target: TargetSpec) -> np.ndarray:
    """A made-up spectrum (k,), steeper in later blocks."""
    return (1.0 + target.block) ** -np.arange(target.full_rank, dtype=np.float64)


def write_store(
    folder: Path,
    energies: Mapping[str, Mapping[str, np.ndarray]],
    losses: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Path:
    """What a driver reads of a factor store: the manifest and the spectra, by target and method."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (name, methods) in enumerate(energies.items()):
        for method, energy in methods.items():
            tensors = {"energy": energy}
            if method in (losses or {}).get(name, {}):
                tensors["loss"] = losses[name][method]  # type: ignore[index]
            file = folder / f"{number}.{method}.safetensors"
            save_file(tensors, file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": "", "target": name, "method": method}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def stored(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials as any Optuna program sees them, read anew from disk."""
    return plain(folder).get_trials()


def plain(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="made-up", storage=open_journal(folder))


def score_two(study: SearchStudy) -> None:
    """Dense and another trial, scored."""
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    propose_and_complete(study, 2)


def propose_and_complete(study: SearchStudy, count: int) -> list[Planned]:
    done = []
    for _ in range(count):
        planned = study.propose("sampler")
        study.complete(planned, score_of(planned.allocation))
        done.append(planned)
    return done


def runner(study: SearchStudy, pool: MadeUpPool, stop: Stop | None = None, **rules: Any) -> Runner:
    section = StopSection(**{"trials": None, **rules})
    return Runner(study, pool, section, "sampler", stop or Stop())  # type: ignore[arg-type]


def states(study: SearchStudy) -> list[str]:
    return [row.state for row in study.rows()]
