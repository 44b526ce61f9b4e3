"""A study in its storage: found or begun there, and its trials by the numbers they have there.

An Optuna study keeps the directions that it is created with. Only a trial binds a config: a study that has
none is made anew by its driver where the objectives are others by now.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from actors.types import RankfrontError
from search.packing import PLAN, has_plan
from search.records import Objective


def open_storage_study(storage: BaseStorage, name: str, objectives: Sequence[Objective]) -> optuna.Study:
    """The Optuna study of that name, created if there is none; an existing one is not written to.

    Raises:
        RankfrontError: it is of other objectives.
    """
    study = _existing(storage, name)
    if study is None:
        directions = _directions(objectives)
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    elif not _is_of(study, objectives):
        hint = "give the new study another name, or put these back"
        if not has_trial(storage, name):
            hint = "it has no trial yet, and `rankfront search` makes it anew"
        was = _shown(study.metric_names or ["unnamed"] * len(study.directions), study.directions)
        now = _shown([objective.name for objective in objectives], _directions(objectives))
        raise RankfrontError(f"study {name!r}: its objectives are {was}; those of this config {now}: {hint}")
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.name for objective in objectives])
    return study


def begin_storage_study(storage: BaseStorage, name: str, objectives: Sequence[Objective]) -> optuna.Study:
    """As `open_storage_study`, but one of other objectives that has no trial is deleted and made anew, with
    the attributes it had. For the study's driver alone: others may hold the one that is deleted."""
    study = _existing(storage, name)
    if study is None or _is_of(study, objectives) or has_trial(storage, name):
        return open_storage_study(storage, name, objectives)
    kept = study.user_attrs
    storage.delete_study(study._study_id)
    study = open_storage_study(storage, name, objectives)
    for key, value in kept.items():
        study.set_user_attr(key, value)
    return study


def has_trial(storage: BaseStorage, name: str) -> bool:
    """Whether the study of that name has a trial, in whatever state; False where there is no study."""
    study = _existing(storage, name)
    return study is not None and storage.get_n_trials(study._study_id) > 0


def _existing(storage: BaseStorage, name: str) -> optuna.Study | None:
    if name not in {known.study_name for known in storage.get_all_studies()}:
        return None
    return optuna.load_study(study_name=name, storage=storage)


def _is_of(study: optuna.Study, objectives: Sequence[Objective]) -> bool:
    """Whether its objectives are these; by their directions alone where another program named none."""
    names = [objective.name for objective in objectives]
    return study.directions == _directions(objectives) and study.metric_names in (None, names)


def _directions(objectives: Sequence[Objective]) -> list[StudyDirection]:
    return [
        StudyDirection.MINIMIZE if objective.minimize else StudyDirection.MAXIMIZE for objective in objectives
    ]


def _shown(names: Iterable[str], directions: Iterable[StudyDirection]) -> str:
    each = zip(names, directions, strict=True)
    return ", ".join(f"{name} ({direction.name.lower()})" for name, direction in each)


def number_of(storage: BaseStorage, study_id: int, trial_id: int, expected: int) -> int:
    """The number of a trial; asking whether it is the expected one costs next to nothing."""
    with contextlib.suppress(KeyError):
        if storage.get_trial_id_from_study_id_trial_number(study_id, expected) == trial_id:
            return expected
    return storage.get_trial(trial_id).number


def start_stored(storage: BaseStorage, trial_id: int, frozen: FrozenTrial) -> bool:
    """Write what was added to a WAITING trial, then that it runs; False where it runs already.

    Invariant: a trial that we started has its levels and its plan; until then it is WAITING, with any part
    of them. One that another program started has no plan of ours.

    Raises:
        UpdateFinishedTrialError: another program ended it.
        ValueError: an earlier trial, another program's, has one of the parameters as of another kind: ours
            can then be stored with a whole trial, but not added to one.
    """
    stored = storage.get_trial(trial_id)
    if stored.state != TrialState.WAITING:
        return False
    for key, value in frozen.system_attrs.items():
        if stored.system_attrs.get(key) != value:
            storage.set_trial_system_attr(trial_id, key, value)
    for name, value in frozen.params.items():
        if name not in stored.params:
            distribution = frozen.distributions[name]
            try:
                storage.set_trial_param(trial_id, name, distribution.to_internal_repr(value), distribution)
            except ValueError as error:
                # Optuna holds a study to the first distribution that any of its trials has for a parameter.
                raise ValueError(
                    f"params.{name}: an earlier trial has it as no {distribution}: {error}"
                ) from error
    added = not has_plan(stored)
    if added:
        # After the levels: what is kept of a plan is of them.
        storage.set_trial_user_attr(trial_id, PLAN, frozen.user_attrs[PLAN])
    # Last, so that a trial that is RUNNING always has all of its levels.
    started = storage.set_trial_state_values(trial_id, TrialState.RUNNING)
    if added and not started:
        storage.set_trial_user_attr(trial_id, PLAN, {})  # of who was faster: no attribute can be deleted
    return started
