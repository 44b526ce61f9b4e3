"""The study: an ordinary Optuna study on disk, and the in-memory mirror its sampler runs on.

Order of writing: propose -> persist RUNNING -> (dispatch) -> persist the result -> tell the mirror.
A trial that has its result but no final state was finished when its driver died: `replay` ends it.
With 200 parameters `study.ask` on a journal writes each parameter apart, most of a second; a trial
proposed on the mirror is stored whole in one write. The mirror holds the same trials under the same
numbers; where another process added some, they are taken over before the next proposal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.study._tell import _tell_with_warning
from optuna.trial import FrozenTrial, TrialState

from actors.types import Allocation, RankfrontError, Score
from search.constraints import ATTRIBUTE, Constraint, feasible, violations
from search.cost import CostModel
from search.database_storage import grouped
from search.lagged import DECIMALS, Lagged, bound, join_generation
from search.memory import Memory
from search.packing import PLAN, RESULT, Packing, origin_of, result_of
from search.parents import Parents
from search.pareto import Front
from search.records import Objective, TrialRow
from search.samplers import reseed
from search.space import Space
from search.stored import number_of, start_stored
from search.stored import open_storage_study as open_storage_study

IDENTITY = "rankfront.identity"

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Planned:
    """A trial that is RUNNING in the storage and waits for its score."""

    number: int
    allocation: Allocation


class TakenError(RankfrontError):
    """Another program started or ended the trial: it is that program's, and what it wrote stays."""


class SearchStudy:
    """One driver's view of a study. The caller holds the study's lock.

    With a `lag` the search is deterministic: see `search.lagged`.
    """

    def __init__(
        self,
        study: optuna.Study,
        sampler: BaseSampler,
        seed: int,
        space: Space,
        cost: CostModel,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        lag: int | None = None,
    ) -> None:
        self._study, self._storage = study, study._storage
        self._lag = lag
        self._sampler, self._seed = sampler if lag is None else Lagged(sampler, lag), seed
        self._space, self._cost = space, cost
        self._packing = Packing(space, cost)
        self.objectives, self.constraints = tuple(objectives), tuple(constraints)
        self.signs = np.array([1.0 if objective.minimize else -1.0 for objective in objectives])
        self._restart_mirror()
        self.sync()

    # -- reading ------------------------------------------------------------------------------

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
            if trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs:
                self._scored.setdefault(self._packing.allocation(trial).key, trial.number)
            elif trial.state == TrialState.PRUNED and "score" in trial.user_attrs.get(RESULT, {}):
                self._stopped.setdefault(self._packing.allocation(trial).key, trial.number)
        return len(trials) - known

    def _note_front(self, trial: FrozenTrial) -> None:
        """Take a trial that completed and violates no constraint into the front, if none beats it."""
        if trial.state == TrialState.COMPLETE and feasible(trial.constraints):
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

    def seen_below(self, number: int) -> int | None:
        """In a deterministic search, the number below which the ends of trials decide about `number`."""
        return None if self._lag is None else bound(number, self._lag)

    def count(self, *states: TrialState) -> int:
        return sum(self._memory.counts[state] for state in states)

    def in_flight(self) -> list[Planned]:
        """Trials that were RUNNING without a result when the last driver ended: to be scored again under
        their number."""
        flying = []
        for trial in self._trials(TrialState.RUNNING):
            with contextlib.suppress(RankfrontError):  # no levels of this space: another program runs it
                if RESULT not in trial.user_attrs:
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

    # -- writing ------------------------------------------------------------------------------

    def enqueue(self, allocations: Iterable[tuple[Allocation, str]]) -> list[int]:
        """Add (allocation, origin) pairs as WAITING trials; those already in the study are left out.

        What was scored in part is not in it yet.
        """
        known = {
            self._packing.allocation(trial).key
            for trial in self.frozen()
            if PLAN in trial.user_attrs and trial.state != TrialState.PRUNED
        }
        numbers = []
        for allocation, origin in allocations:
            if allocation.key in known:
                continue
            known.add(allocation.key)
            trial = self._packing.trial(allocation, origin, TrialState.WAITING)
            stored = self._storage.create_new_trial(self._study._study_id, trial)
            numbers.append(self._storage.get_trial(stored).number)
        self.sync()
        return numbers

    def propose(self, origin: str) -> Planned:
        """The next trial, RUNNING in the storage when this returns: an enqueued one, or the sampler's.

        Raises:
            RankfrontError: an enqueued trial's parameters are outside the space; it is recorded as failed.
            TakenError: another program started the enqueued trial at this moment.
        """
        self.sync()
        self._refuse_foreign()
        self._parents.restore()
        reseed(self._sampler, self._seed, len(self._ids))
        trial = self._mirror.ask(fixed_distributions=self._space.distributions)
        frozen = self._memory.get_trial(trial._trial_id)
        join_generation(self._sampler, self._mirror, frozen)
        self._parents.keep(trial._trial_id)
        frozen = self._memory.get_trial(trial._trial_id)
        if frozen.number < len(self._ids):
            return self._take_up(frozen)
        allocation = self._space.allocation(frozen.params)
        frozen.user_attrs[PLAN] = self._packing.plan(allocation, origin)
        stored = self._storage.create_new_trial(self._study._study_id, frozen)
        number = number_of(self._storage, self._study._study_id, stored, frozen.number)
        if number != frozen.number:
            # Someone enqueued between our look and our write: start the mirror over from the storage.
            self._rebuild()
        else:
            self._ids.append(stored)
        return Planned(number, allocation)

    def _refuse_foreign(self) -> None:
        """Fail the next WAITING trial if another program gave it levels that are not of this space.

        Raises:
            RankfrontError: it did; the trial is recorded as failed with this reason.
        """
        trial = next(iter(self._trials(TrialState.WAITING)), None)
        if trial is None or PLAN in trial.user_attrs:
            return
        try:
            self._space.check({**trial.params, **trial.system_attrs.get("fixed_params", {})})
        except RankfrontError as error:
            result = {"reason": str(error)}
            for storage, trial_id in (
                (self._storage, self._ids[trial.number]),
                (self._memory, trial.number),
            ):
                storage.set_trial_user_attr(trial_id, RESULT, result)
                storage.set_trial_state_values(trial_id, TrialState.FAIL)
            raise

    def _take_up(self, frozen: FrozenTrial) -> Planned:
        """Start a WAITING trial that the mirror just handed out."""
        try:
            started = self._start_stored(frozen)
        except UpdateFinishedTrialError:
            started = False
        if not started:
            self._rebuild()
            raise TakenError(f"trial {frozen.number} was started by another program")
        return Planned(frozen.number, self._packing.allocation(frozen))

    def _start_stored(self, frozen: FrozenTrial) -> bool:
        return start_stored(self._storage, self._ids[frozen.number], frozen)

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

    def replay(self) -> list[int]:
        """End the trials whose result is stored but whose driver died before their final state.

        Returns their numbers. Only the study's driver may call it, before it proposes or dispatches.
        """
        replayed = []
        for trial in self._trials(TrialState.RUNNING):
            result = trial.user_attrs.get(RESULT)
            if result is None:
                continue
            if "score" in result:
                planned = Planned(trial.number, self._packing.allocation(trial))
                self.record(planned, Score.from_dict(result["score"]), result.get("copied_from"))
            else:
                self.fail(trial.number, result["reason"])
            replayed.append(trial.number)
        return replayed

    def complete(self, planned: Planned, score: Score, copied_from: int | None = None) -> tuple[float, ...]:
        """Record a score: result first, then the state, then the mirror. Returns the values."""
        metrics = {**self._costs(planned.allocation), **self._told(score.metrics)}
        values = tuple(metrics[objective.name] for objective in self.objectives)
        passed = violations(self.constraints, metrics)
        self._finish(planned.number, TrialState.COMPLETE, values, result_of(score, copied_from), passed)
        self._scored.setdefault(planned.allocation.key, planned.number)
        return values

    def prune(self, planned: Planned, score: Score, copied_from: int | None = None) -> None:
        """Record a partial score, in the same order. It gets no values: nothing takes it for a whole one."""
        reason = f"dominated by trial {score.stopped_by} after {score.forward_tokens:,} tokens"
        result = {**result_of(score, copied_from), "reason": reason}
        known = [constraint for constraint in self.constraints if constraint.is_cost]
        passed = violations(known, self._costs(planned.allocation))
        self._finish(planned.number, TrialState.PRUNED, None, result, passed)
        self._stopped.setdefault(planned.allocation.key, planned.number)

    def _costs(self, allocation: Allocation) -> dict[str, float]:
        """Its budgets, and its bytes."""
        return {**self._cost.budgets(allocation), "bytes": self._cost.model_bytes(allocation)}

    def _told(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        if self._lag is None:
            return metrics
        return {name: round(value, DECIMALS) for name, value in metrics.items()}

    def copy_score(self, planned: Planned, source: int) -> tuple[float, ...] | None:
        """Answer a trial from the record of an equal allocation. Returns the values; a part has none."""
        return self.record(planned, self._score(source), copied_from=source)

    def record(
        self, planned: Planned, score: Score, copied_from: int | None = None
    ) -> tuple[float, ...] | None:
        """Record a score, whole or of the first stages. Returns the values; a part has none."""
        if score.stopped_by is None:
            return self.complete(planned, score, copied_from)
        self.prune(planned, score, copied_from)
        return None

    def add(self, allocation: Allocation, origin: str, score: Score) -> int | None:
        """Record an allocation that was scored already, RUNNING first as every trial; returns its number.

        None, and nothing is recorded, where the study has its score.
        """
        if self.scored_as(allocation) is not None:
            return None
        trial = self._packing.trial(allocation, origin, TrialState.RUNNING, result_of(score))
        number = self._storage.get_trial(self._storage.create_new_trial(self._study._study_id, trial)).number
        self.sync()
        self.complete(Planned(number, allocation), score)
        return number

    def fail(self, number: int, reason: str) -> None:
        """Record a trial as failed, with its reason. It gets no values."""
        self._finish(number, TrialState.FAIL, None, {"reason": reason})

    def _finish(
        self,
        number: int,
        state: TrialState,
        values: tuple[float, ...] | None,
        result: Mapping[str, Any],
        passed: Mapping[str, float] | None = None,
    ) -> None:
        stored = self._ids[number]
        attributes = {f"{ATTRIBUTE}{name}": violation for name, violation in (passed or {}).items()}
        try:
            with grouped(self._storage):
                for key, violation in attributes.items():
                    self._storage.set_trial_system_attr(stored, key, violation)
                self._storage.set_trial_user_attr(stored, RESULT, dict(result))
                self._storage.set_trial_state_values(stored, state, values)
        except UpdateFinishedTrialError as error:
            self._rebuild()
            raise TakenError(f"trial {number} was ended by another program") from error
        for key, violation in attributes.items():
            self._memory.set_trial_system_attr(number, key, violation)
        self._memory.set_trial_user_attr(number, RESULT, dict(result))
        _tell_with_warning(self._mirror, number, values, state)  # `tell` less a deep copy of the trial
        self._note_front(self._memory.get_trial(number))
