"""A study in its storage: found or begun there, and its trials by the numbers they have there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.records import Objective


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


def number_of(storage: BaseStorage, study_id: int, trial_id: int, expected: int) -> int:
    """The number of a trial; asking whether it is the expected one costs next to nothing."""
    with contextlib.suppress(KeyError):
        if storage.get_trial_id_from_study_id_trial_number(study_id, expected) == trial_id:
            return expected
    return storage.get_trial(trial_id).number


def start_stored(storage: BaseStorage, trial_id: int, frozen: FrozenTrial) -> bool:
    """Write what the sampler added to a WAITING trial, then that it runs; False where it runs already."""
    stored = storage.get_trial(trial_id)
    if stored.state != TrialState.WAITING:
        return False
    for key, value in frozen.system_attrs.items():
        if stored.system_attrs.get(key) != value:
            storage.set_trial_system_attr(trial_id, key, value)
    for name, value in frozen.params.items():
        if name not in stored.params:
            distribution = frozen.distributions[name]
            storage.set_trial_param(trial_id, name, distribution.to_internal_repr(value), distribution)
    # Last, so that a trial that is RUNNING always has all of its levels.
    return storage.set_trial_state_values(trial_id, TrialState.RUNNING)
