"""A study in memory: the mirror that its sampler runs on, and what is read of it.

The mirror holds the trials of the storage under the same numbers, and indexes what is asked most: the front,
and which trial scored an allocation. It is taken over from the storage as a whole when it is opened, and
trial by trial from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from actors.types import Allocation, RankfrontError, Score
from search.constraints import feasible
from search.cost import CostModel
from search.memory import Memory
from search.packing import RESULT, Packing, has_plan, origin_of, scored
from search.parents import Parents
from search.pareto import Front
from search.records import Objective, TrialRow
from search.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Planned:
    """A trial that is RUNNING in the storage and waits for its score."""

    number: int
    allocation: Allocation


class StudyView:
    """What a study holds; it writes nothing. `SearchStudy` adds the writing."""

    def __init__(
        self,
        study: optuna.Study,
        sampler: BaseSampler,
        space: Space,
        cost: CostModel,
        objectives: Sequence[Objective],
    ) -> None:
        self._study, self._storage, self._sampler = study, study._storage, sampler
        self._cost, self._packing = cost, Packing(space, cost)
        self.objectives = tuple(objectives)
        self.signs = np.array([1.0 if objective.minimize else -1.0 for objective in objectives])
        self._rebuild()

    def _rebuild(self) -> None:
        self._restart_mirror()
        self.sync()

    def _restart_mirror(self) -> None:
        self._memory = Memory()
        self._mirror = optuna.create_study(
            storage=self._memory, directions=self._study.directions, sampler=self._sampler
        )
        self._parents = Parents(self._mirror)
        self._ids: list[int] = []  # storage ids by trial number
        self._scored: dict[str, int] = {}  # allocation key -> number of its COMPLETE trial
        self._stopped: dict[str, int] = {}  # likewise of a PRUNED one with a partial score
        self._ended: dict[int, TrialRow] = {}
        self._front = Front(len(self.objectives))

    def sync(self) -> int:
        """Take over trials that others added, started or ended in the storage; returns how many are new."""
        trials = self._storage.get_all_trials(self._study._study_id, deepcopy=False)
        known = len(self._ids)
        if any(trials[number].state != state for number, state in self._memory.open.items()):
            self._restart_mirror()
        for trial in trials[len(self._ids) :]:
            self._ids.append(trial._trial_id)
            # Past `Study.add_trial`, which refuses levels outside the space: others may have enqueued some.
            self._memory.create_new_trial(self._mirror._study_id, trial)
            self._note_front(trial)
            if scored(trial):
                self._scored.setdefault(self._packing.allocation(trial).key, trial.number)
            elif trial.state == TrialState.PRUNED and "score" in trial.user_attrs.get(RESULT, {}):
                self._stopped.setdefault(self._packing.allocation(trial).key, trial.number)
        return len(trials) - known

    def _note_front(self, trial: FrozenTrial) -> None:
        """Take a trial that was scored and violates no constraint into the front, if none beats it."""
        if scored(trial) and feasible(trial.constraints):
            self._front.add(trial.number, self.signs * trial.values)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials that wait or run, by number."""
        numbers = sorted(number for number, state in self._memory.open.items() if state in states)
        return [self._memory.get_trial(number) for number in numbers]

    @property
    def waiting(self) -> bool:
        """Whether an enqueued trial waits to be taken up."""
        return self.count(TrialState.WAITING) > 0

    @property
    def started(self) -> int:
        """Trials that are running or ended."""
        return len(self._ids) - self.count(TrialState.WAITING)

    @property
    def next_number(self) -> int:
        """The number of the next proposal: of the first trial that waits, or a new one."""
        return next((trial.number for trial in self._trials(TrialState.WAITING)), len(self._ids))

    def count(self, *states: TrialState) -> int:
        return sum(self._memory.counts[state] for state in states)

    def in_flight(self) -> list[Planned]:
        """The driver's trials that were RUNNING without a result when the last driver ended: to be scored
        again under their number. What another program started is its own, whatever its levels."""
        flying = []
        for trial in self._trials(TrialState.RUNNING):
            if RESULT in trial.user_attrs or not has_plan(trial):
                continue
            with contextlib.suppress(RankfrontError):  # no levels of this space: another program runs it
                flying.append(Planned(trial.number, self._packing.allocation(trial)))
        return flying

    def rows(self) -> tuple[TrialRow, ...]:
        """Every trial, by number. Ended trials never change, so their rows are made once."""
        return tuple(self._ended.get(trial.number) or self._row(trial) for trial in self.frozen())

    def row(self, number: int) -> TrialRow:
        """One trial."""
        return self._ended.get(number) or self._row(self._memory.get_trial(number))

    @property
    def front(self) -> list[TrialRow]:
        """The finished, feasible trials that no other beats, by number."""
        return [self.row(number) for number in self._front.keys]

    @property
    def front_values(self) -> NDArray[np.float64]:
        """Their values (n, d), every objective minimised."""
        return self._front.points

    def frozen(self) -> list[FrozenTrial]:
        """Every trial as Optuna keeps it, by number; not to be changed."""
        return self._mirror.get_trials(deepcopy=False)

    def _row(self, trial: FrozenTrial) -> TrialRow:
        row = self._packing.row(trial)
        if trial.state.is_finished():
            self._ended[trial.number] = row
        return row

    def origin(self, number: int) -> str:
        """Who proposed a trial; `enqueued` where another program did."""
        return origin_of(self._memory.get_trial(number))

    def scored_as(self, allocation: Allocation) -> int | None:
        """The number of the finished trial that scored this allocation, if there is one."""
        return self._scored.get(allocation.key)

    def stopped_as(self, allocation: Allocation) -> int | None:
        """The number of the trial that scored this allocation in part, if there is one."""
        return self._stopped.get(allocation.key)

    @property
    def dense(self) -> Allocation:
        """The uncompressed model."""
        return Allocation.dense(self._cost.targets)

    def budgets(self, allocation: Allocation) -> dict[str, float]:
        """Its cost objectives, by name."""
        return self._cost.budgets(allocation)

    @property
    def dense_score(self) -> Score | None:
        """The score of the dense model, None until there is one."""
        number = self.scored_as(Allocation.dense(self._cost.targets))
        return None if number is None else self.row(number).score

    def score(self, allocation: Allocation) -> Score:
        """The score of the finished trial of this allocation. Raises KeyError where there is none."""
        return self._score(self._scored[allocation.key])

    def _score(self, number: int) -> Score:
        return Score.from_dict(self._memory.get_trial(number).user_attrs[RESULT]["score"])
