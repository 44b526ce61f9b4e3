"""The storage of a study's mirror: in memory, without deep copies, with the counts a driver asks for."""

from __future__ import annotations

import copy
from collections import Counter

from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState


class Memory(InMemoryStorage):
    """Holds one study, so that a trial's id is its number.

    `open` are the states of the trials that wait or run, by number, and `counts` the trials of each state: a
    driver asks for both many times a trial. A trial that is taken over shares its parameters and attributes
    with the given one, value by value, where Optuna copies them deep, milliseconds each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[int, TrialState] = {}
        self.counts: Counter[TrialState] = Counter()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Take over a template, or begin an empty trial that runs."""
        with self._lock:
            trial = self._create_running_trial() if template_trial is None else shared_copy(template_trial)
            trials = self._studies[study_id].trials
            self._max_trial_id += 1
            trial.number = trial._trial_id = self._max_trial_id
            self._trial_id_to_study_id_and_number[trial._trial_id] = (study_id, trial.number)
            trials.append(trial)
            self._note(None, trial)
            return trial._trial_id

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """In place: a trial that is being asked for is nobody else's yet, and has hundreds of parameters."""
        trial = self._get_trial(trial_id)
        trial.params[param_name] = distribution.to_external_repr(param_value_internal)
        trial.distributions[param_name] = distribution

    def _set_trial(self, trial_id: int, trial: FrozenTrial) -> None:
        self._note(self._get_trial(trial_id).state, trial)
        super()._set_trial(trial_id, trial)

    def _note(self, before: TrialState | None, trial: FrozenTrial) -> None:
        if trial.state == before:
            return
        if before is not None:
            self.counts[before] -= 1
        self.counts[trial.state] += 1
        if trial.state.is_finished():
            self.open.pop(trial.number, None)
        else:
            self.open[trial.number] = trial.state


def shared_copy(template: FrozenTrial) -> FrozenTrial:
    """A copy whose parameters and attributes may be changed; their values are the template's."""
    trial = copy.copy(template)
    trial.params, trial.distributions = dict(trial.params), dict(trial.distributions)
    trial.user_attrs, trial.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
    return trial
