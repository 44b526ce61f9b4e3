"""What a sampler sees where a search must not depend on the order in which results come back.

Trial n is proposed knowing the ends of the trials below n - lag, and of no other. From there on every trial
is shown as running, whether it has ended or not: a function of the numbers, not of the clock. The driver
waits until all of those below have ended (`search.runner`), so a proposal follows from the seed and the
number alone, with any number of replicas and through any restart.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.trial import FrozenTrial, TrialState

from search.constraints import ATTRIBUTE

DECIMALS = 6
"""Of the metrics a deterministic search tells: float32 sums in another order differ in the seventh."""


def bound(number: int, lag: int) -> int:
    """The number below which trial `number` sees how trials ended."""
    return max(0, number - lag)


class Snapshot(optuna.Study):
    """A study in which no trial from number `below` on has ended."""

    def __init__(self, study: optuna.Study, below: int) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._trials_then = [
            _running(trial) if trial.number >= below and trial.state.is_finished() else trial
            for trial in study._storage.get_all_trials(study._study_id, deepcopy=False)
        ]

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        found = [trial for trial in self._trials_then if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _running(trial: FrozenTrial) -> FrozenTrial:
    """A finished trial as it was while it ran: its parameters, and what the sampler noted of them."""
    before = copy.copy(trial)
    before.state, before.values, before.datetime_complete = TrialState.RUNNING, None, None
    before.user_attrs = {}
    before.system_attrs = {
        key: value for key, value in trial.system_attrs.items() if not key.startswith(ATTRIBUTE)
    }
    return before


class Lagged(BaseSampler):
    """A sampler that is shown, for trial n, the study as its trials below n - `lag` left it."""

    def __init__(self, sampler: BaseSampler, lag: int) -> None:
        self._sampler, self._lag = sampler, lag
        self._shown: tuple[int, Snapshot] | None = None

    def _seen(self, study: optuna.Study, number: int) -> Snapshot:
        """The snapshot of trial `number`, made once: nothing it shows changes while the trial is proposed."""
        if self._shown is None or self._shown[0] != number:
            self._shown = number, Snapshot(study, bound(number, self._lag))
        return self._shown[1]

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._shown = None  # a number is proposed again where a mirror was started over
        self._sampler.before_trial(self._seen(study, trial.number), trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(self._seen(study, trial.number), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(self._seen(study, trial.number), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        seen = self._seen(study, trial.number)
        return self._sampler.sample_independent(seen, trial, param_name, param_distribution)

    def join_generation(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As the function of that name, among the trials that are seen."""
        self._shown = None  # one whose parameters were given came without `before_trial`
        join_generation(self._sampler, self._seen(study, trial.number), trial)


def join_generation(sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial) -> None:
    """Make a trial that was just asked for one of a genetic sampler's.

    It is not asked for parameters that are given: no enqueued trial would ever be a parent.
    """
    if isinstance(sampler, Lagged):
        sampler.join_generation(study, trial)
    elif isinstance(sampler, BaseGASampler):
        sampler.get_trial_generation(study, trial)
