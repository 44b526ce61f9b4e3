"""The study as its driver writes it: an ordinary Optuna study on disk, with a mirror in memory.

Order of writing: propose -> persist RUNNING -> (dispatch) -> persist the result -> tell the mirror.
A trial that has its result but no final state was finished when its driver died: `replay` ends it.
With 200 parameters `study.ask` on a journal writes each parameter apart, most of a second; a trial
proposed on the mirror is stored whole in one write. The mirror holds the same trials under the same
numbers; where another process added some, they are taken over before the next proposal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.study._tell import _tell_with_warning
from optuna.trial import FrozenTrial, TrialState

from actors.types import Allocation, RankfrontError, Score
from search.constraints import ATTRIBUTE, Constraint, violations
from search.cost import CostModel
from search.database_storage import grouped
from search.lagged import DECIMALS, Lagged, bound, join_generation
from search.packing import PLAN, RESULT, failure_of, has_plan, result_of, scored, was_lost
from search.records import Objective
from search.samplers import reseed
from search.space import Space
from search.stored import number_of, start_stored
from search.stored import open_storage_study as open_storage_study
from search.view import Planned, StudyView

IDENTITY = "rankfront.identity"


class TakenError(RankfrontError):
    """Another program started or ended the trial: it is that program's, and what it wrote stays."""


class ForeignError(RankfrontError):
    """An enqueued trial has levels, or distributions, that are not of this space, or takes none of them; it
    is recorded as failed with this reason."""


class SearchStudy(StudyView):
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
        sampler = sampler if lag is None else Lagged(sampler, lag)
        super().__init__(study, sampler, space, cost, objectives)
        self._seed, self._lag, self._space = seed, lag, space
        self.constraints = tuple(constraints)

    def seen_below(self, number: int) -> int | None:
        """In a deterministic search, the number below which the ends of trials decide about `number`."""
        return None if self._lag is None else bound(number, self._lag)

    def enqueue(self, allocations: Iterable[tuple[Allocation, str]]) -> list[int]:
        """Add (allocation, origin) pairs as WAITING trials; those already in the study are left out.

        What was scored in part is not in it yet, nor what failed for a reason that is none of the model's: a
        replica died, or had too little memory. A dense model that ended without a score is added anew,
        whatever the reason: all is measured from it.
        """
        known, numbers = set(), []
        for trial in self.frozen():
            if not has_plan(trial) or trial.state == TrialState.PRUNED or was_lost(trial):
                continue
            unscored = trial.state.is_finished() and not scored(trial)
            allocation = self._packing.allocation(trial)
            if not (unscored and allocation.is_dense):
                known.add(allocation.key)
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
            ForeignError: an enqueued trial's parameters, or their distributions, are not of the space.
            TakenError: another program started the enqueued trial at this moment.
            RankfrontError: the storage cannot be written; the mirror is ahead of it, and of no use any more.
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
        """Fail the next WAITING trial if another program gave it levels, or distributions, that are not
        of this space.

        Raises:
            ForeignError: it did.
        """
        trial = next(iter(self._trials(TrialState.WAITING)), None)
        if trial is None or has_plan(trial):
            return
        try:
            self._space.check({**trial.params, **trial.system_attrs.get("fixed_params", {})})
            self._space.check_distributions(trial.distributions)
        except RankfrontError as error:
            self._refuse(trial.number, str(error))
            raise ForeignError(str(error)) from error

    def _refuse(self, number: int, reason: str) -> None:
        """Fail a WAITING trial."""
        for storage, trial_id in ((self._storage, self._ids[number]), (self._memory, number)):
            storage.set_trial_user_attr(trial_id, RESULT, {"reason": reason})
            storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _take_up(self, frozen: FrozenTrial) -> Planned:
        """Start a WAITING trial that the mirror just handed out; another program's gets a plan first.

        By it the next driver tells the trial from those that other programs run.

        Raises:
            ForeignError: the storage takes no levels for it; it is recorded as failed.
            TakenError: another program started it at this moment.
        """
        planned = Planned(frozen.number, self._packing.allocation(frozen))
        if not has_plan(frozen):
            frozen.user_attrs[PLAN] = self._packing.plan(planned.allocation, "enqueued")
        try:
            started = self._start_stored(frozen)
        except UpdateFinishedTrialError:
            started = False
        except ValueError as error:
            self._rebuild()  # it waits still, with a part of its levels
            self._refuse(frozen.number, str(error))
            raise ForeignError(str(error)) from error
        if not started:
            self._rebuild()
            raise TakenError(f"trial {frozen.number} was started by another program")
        return planned

    def _start_stored(self, frozen: FrozenTrial) -> bool:
        return start_stored(self._storage, self._ids[frozen.number], frozen)

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
                self.fail(trial.number, result["reason"], was_lost(trial))
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

    def fail(self, number: int, reason: str, lost: bool = False) -> None:
        """Record a trial as failed, with its reason. It gets no values.

        `lost` where the reason says nothing of the model: its allocation may be added or proposed again.
        """
        self._finish(number, TrialState.FAIL, None, failure_of(reason, lost))

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
