"""The study: an ordinary Optuna study on disk, and the in-memory mirror its sampler runs on.

Order of writing: propose -> persist RUNNING -> (dispatch) -> persist the result -> tell the mirror.
A trial that has its result but no final state was finished when its driver died: `replay` ends it.
With 200 parameters `study.ask` on a journal writes each parameter apart, most of a second; a trial
proposed on the mirror is stored whole in one write. The mirror holds the same trials under the same
numbers; where another process added some, they are taken over before the next proposal.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from actors.types import Allocation, RankfrontError, Score
from search.allocations import method_list
from search.cost import CostModel
from search.records import PLAN as PLAN
from search.records import Objective, TrialRow
from search.samplers import reseed
from search.space import Space

# Our one packed result, written before a trial's final state; `PLAN` is our one attribute at its creation.
RESULT = "rankfront.result"
IDENTITY = "rankfront.identity"

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Planned:
    """A trial that is RUNNING in the storage and waits for its score."""

    number: int
    allocation: Allocation


def open_storage_study(storage: BaseStorage, name: str, objectives: Sequence[Objective]) -> optuna.Study:
    """The Optuna study of that name, created if there is none; an existing one is not written to."""
    directions = [
        StudyDirection.MINIMIZE if objective.minimize else StudyDirection.MAXIMIZE for objective in objectives
    ]
    if name in {known.study_name for known in storage.get_all_studies()}:
        study = optuna.load_study(study_name=name, storage=storage)
        if study.metric_names is not None:
            return study
    else:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([objective.name for objective in objectives])
    return study


class TakenError(RankfrontError):
    """Another program started or ended the trial: it is that program's, and what it wrote stays."""


class SearchStudy:
    """One driver's view of a study. The caller holds the study's lock."""

    def __init__(
        self,
        study: optuna.Study,
        sampler: BaseSampler,
        seed: int,
        space: Space,
        cost: CostModel,
        objectives: Sequence[Objective],
    ) -> None:
        self._study, self._storage = study, study._storage
        self._sampler, self._seed = sampler, seed
        self._space, self._cost = space, cost
        self.objectives = tuple(objectives)
        self._mirror = optuna.create_study(directions=study.directions, sampler=sampler)
        self._ids: list[int] = []  # storage ids by trial number
        self._scored: dict[str, int] = {}  # allocation key -> number of its COMPLETE trial
        self._stopped: dict[str, int] = {}  # likewise of a PRUNED one with a partial score
        self._ended: dict[int, TrialRow] = {}
        self.sync()

    # -- reading ------------------------------------------------------------------------------

    def sync(self) -> int:
        """Take over trials that others added, started or ended in the storage; returns how many are new."""
        trials = self._storage.get_all_trials(self._study._study_id, deepcopy=False)
        known = len(self._ids)
        open_ones = self._trials(TrialState.WAITING, TrialState.RUNNING)
        if any(trials[trial.number].state != trial.state for trial in open_ones):
            self._restart_mirror()
        new = trials[len(self._ids) :]
        for trial in new:
            self._ids.append(trial._trial_id)
            # Past `Study.add_trial`, which refuses levels outside the space: others may have enqueued some.
            self._mirror._storage.create_new_trial(self._mirror._study_id, trial)
            if trial.state == TrialState.COMPLETE and RESULT in trial.user_attrs:
                self._scored.setdefault(self._allocation(trial).key, trial.number)
            elif trial.state == TrialState.PRUNED and "score" in trial.user_attrs.get(RESULT, {}):
                self._stopped.setdefault(self._allocation(trial).key, trial.number)
        return len(trials) - known

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._mirror.get_trials(deepcopy=False, states=states or None)

    def _allocation(self, trial: FrozenTrial) -> Allocation:
        plan = trial.user_attrs.get(PLAN)
        if plan is None or "ranks" not in plan:
            return self._space.allocation(trial.params)
        names = [target.name for target in self._cost.targets]
        methods = zip(names, plan.get("methods", [None] * len(names)), strict=True)
        return Allocation(
            tuple(zip(names, plan["ranks"], strict=True)),
            tuple((name, method) for name, method in methods if method is not None),
        )

    @property
    def waiting(self) -> bool:
        """Whether an enqueued trial waits to be taken up."""
        return bool(self._trials(TrialState.WAITING))

    @property
    def started(self) -> int:
        """Trials that are running or ended."""
        return len(self._ids) - len(self._trials(TrialState.WAITING))

    def count(self, *states: TrialState) -> int:
        return len(self._trials(*states))

    def in_flight(self) -> list[Planned]:
        """Trials that were RUNNING without a result when the last driver ended: to be scored again under
        their number."""
        flying = []
        for trial in self._trials(TrialState.RUNNING):
            with contextlib.suppress(RankfrontError):  # no levels of this space: another program runs it
                if RESULT not in trial.user_attrs:
                    flying.append(Planned(trial.number, self._allocation(trial)))
        return flying

    def rows(self) -> tuple[TrialRow, ...]:
        """Every trial, by number. Ended trials never change, so their rows are made once."""
        return tuple(self._ended.get(trial.number) or self._row(trial) for trial in self._trials())

    def _row(self, trial: FrozenTrial) -> TrialRow:
        plan, result = trial.user_attrs.get(PLAN, {}), trial.user_attrs.get(RESULT, {})
        allocation = Allocation.dense(self._cost.targets)
        with contextlib.suppress(RankfrontError):  # another program's trial may have no ranks of this space
            allocation = self._allocation(trial)
        budgets = self._cost.budgets(allocation)
        score = Score.from_dict(result["score"]) if "score" in result else None
        row = TrialRow(
            number=trial.number,
            state=trial.state.name,
            origin=plan.get("origin", "enqueued"),
            allocation=allocation,
            budget_linear=budgets["budget.linear"],
            budget_model=budgets["budget.model"],
            budget_bytes=budgets["budget.bytes"],
            values=tuple(trial.values) if trial.state == TrialState.COMPLETE else None,
            score=score,
            seconds=score.seconds if score else None,
            replica=score.replica if score else None,
            reason=result.get("reason"),
            copied_from=result.get("copied_from"),
            macs=self._cost.macs(allocation),
        )
        if trial.state.is_finished():
            self._ended[trial.number] = row
        return row

    def origin(self, number: int) -> str:
        """Who proposed a trial; `enqueued` where another program did."""
        trial = self._mirror.get_trials(deepcopy=False)[number]
        return str(trial.user_attrs.get(PLAN, {}).get("origin", "enqueued"))

    def scored_as(self, allocation: Allocation) -> int | None:
        """The number of the finished trial that scored this allocation, if there is one."""
        return self._scored.get(allocation.key)

    def stopped_as(self, allocation: Allocation) -> int | None:
        """The number of the trial that scored this allocation in part, if there is one."""
        return self._stopped.get(allocation.key)

    def budgets(self, allocation: Allocation) -> dict[str, float]:
        """Its cost objectives, by name."""
        return self._cost.budgets(allocation)

    def score(self, allocation: Allocation) -> Score:
        """The score of the finished trial of this allocation. Raises KeyError where there is none."""
        return self._score(self._scored[allocation.key])

    def _score(self, number: int) -> Score:
        return Score.from_dict(self._trials()[number].user_attrs[RESULT]["score"])

    # -- writing ------------------------------------------------------------------------------

    def enqueue(self, allocations: Iterable[tuple[Allocation, str]]) -> list[int]:
        """Add (allocation, origin) pairs as WAITING trials; those already in the study are left out.

        What was scored in part is not in it yet.
        """
        known = {
            self._allocation(trial).key
            for trial in self._trials()
            if PLAN in trial.user_attrs and trial.state != TrialState.PRUNED
        }
        numbers = []
        for allocation, origin in allocations:
            if allocation.key in known:
                continue
            known.add(allocation.key)
            trial = create_trial(
                state=TrialState.WAITING,
                params=self._space.params(allocation),
                distributions=self._space.distributions,
                user_attrs={PLAN: self._plan(allocation, origin)},
            )
            stored = self._storage.create_new_trial(self._study._study_id, trial)
            numbers.append(self._storage.get_trial(stored).number)
        self.sync()
        return numbers

    def _plan(self, allocation: Allocation, origin: str) -> dict[str, Any]:
        """The attribute: ranks by target, and methods likewise where any differs from the configured one."""
        plan: dict[str, Any] = {"origin": origin, "ranks": [rank for _, rank in allocation]}
        if allocation.methods:
            plan["methods"] = method_list(allocation)
        return plan

    def propose(self, origin: str) -> Planned:
        """The next trial, RUNNING in the storage when this returns: an enqueued one, or the sampler's.

        Raises:
            RankfrontError: an enqueued trial's parameters are outside the space; it is recorded as failed.
            TakenError: another program started the enqueued trial at this moment.
        """
        self.sync()
        self._refuse_foreign()
        reseed(self._sampler, self._seed, len(self._ids))
        trial = self._mirror.ask(fixed_distributions=self._space.distributions)
        frozen = self._mirror._storage.get_trial(trial._trial_id)
        if frozen.number < len(self._ids):
            return self._take_up(frozen)
        allocation = self._space.allocation(frozen.params)
        frozen.user_attrs[PLAN] = self._plan(allocation, origin)
        self._mirror._storage.set_trial_user_attr(trial._trial_id, PLAN, frozen.user_attrs[PLAN])
        stored = self._storage.create_new_trial(self._study._study_id, frozen)
        number = self._storage.get_trial(stored).number
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
                (self._mirror._storage, trial._trial_id),
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
        return Planned(frozen.number, self._allocation(frozen))

    def _start_stored(self, frozen: FrozenTrial) -> bool:
        """Write what the sampler added to a WAITING trial, then that it runs; False where it runs already."""
        stored_id = self._ids[frozen.number]
        stored = self._storage.get_trial(stored_id)
        if stored.state != TrialState.WAITING:
            return False
        for key, value in frozen.system_attrs.items():
            if stored.system_attrs.get(key) != value:
                self._storage.set_trial_system_attr(stored_id, key, value)
        for name, value in frozen.params.items():
            if name not in stored.params:
                distribution = frozen.distributions[name]
                internal = distribution.to_internal_repr(value)
                self._storage.set_trial_param(stored_id, name, internal, distribution)
        # Last, so that a trial that is RUNNING always has all of its levels.
        return self._storage.set_trial_state_values(stored_id, TrialState.RUNNING)

    def _rebuild(self) -> None:
        self._restart_mirror()
        self.sync()

    def _restart_mirror(self) -> None:
        self._mirror = optuna.create_study(directions=self._study.directions, sampler=self._sampler)
        self._ids, self._scored, self._stopped, self._ended = [], {}, {}, {}

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
                planned = Planned(trial.number, self._allocation(trial))
                self.record(planned, Score.from_dict(result["score"]), result.get("copied_from"))
            else:
                self.fail(trial.number, result["reason"])
            replayed.append(trial.number)
        return replayed

    def complete(self, planned: Planned, score: Score, copied_from: int | None = None) -> tuple[float, ...]:
        """Record a score: result first, then the state, then the mirror. Returns the values."""
        metrics = {**self._cost.budgets(planned.allocation), **score.metrics}
        values = tuple(metrics[objective.name] for objective in self.objectives)
        result: dict[str, Any] = {"score": score.to_dict()}
        if copied_from is not None:
            result["copied_from"] = copied_from
        self._finish(planned.number, TrialState.COMPLETE, values, result)
        self._scored.setdefault(planned.allocation.key, planned.number)
        return values

    def prune(self, planned: Planned, score: Score, copied_from: int | None = None) -> None:
        """Record a partial score, in the same order. It gets no values: nothing takes it for a whole one."""
        reason = f"dominated by trial {score.stopped_by} after {score.forward_tokens:,} tokens"
        result: dict[str, Any] = {"score": score.to_dict(), "reason": reason}
        if copied_from is not None:
            result["copied_from"] = copied_from
        self._finish(planned.number, TrialState.PRUNED, None, result)
        self._stopped.setdefault(planned.allocation.key, planned.number)

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
        trial = create_trial(
            state=TrialState.RUNNING,
            params=self._space.params(allocation),
            distributions=self._space.distributions,
            user_attrs={PLAN: self._plan(allocation, origin), RESULT: {"score": score.to_dict()}},
        )
        number = self._storage.get_trial(self._storage.create_new_trial(self._study._study_id, trial)).number
        self.sync()
        self.complete(Planned(number, allocation), score)
        return number

    def fail(self, number: int, reason: str) -> None:
        """Record a trial as failed, with its reason. It gets no values."""
        self._finish(number, TrialState.FAIL, None, {"reason": reason})

    def _finish(
        self, number: int, state: TrialState, values: tuple[float, ...] | None, result: Mapping[str, Any]
    ) -> None:
        stored = self._ids[number]
        try:
            self._storage.set_trial_user_attr(stored, RESULT, dict(result))
            self._storage.set_trial_state_values(stored, state, values)
        except UpdateFinishedTrialError as error:
            self._rebuild()
            raise TakenError(f"trial {number} was ended by another program") from error
        memory = self._mirror._storage
        mirrored = memory.get_trial_id_from_study_id_trial_number(self._mirror._study_id, number)
        memory.set_trial_user_attr(mirrored, RESULT, dict(result))
        self._mirror.tell(number, values, state=state)
