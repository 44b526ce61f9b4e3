"""A trial as rows of Optuna's tables, and back: by few statements however many parameters it has."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.orm import Session

from search.journal_storage import distribution_of

# Trials that are read by one statement for each table: a hundred thousand rows of parameters.
TRIALS_AT_ONCE = 500

_PARAM = ("param_id", "param_name", "param_value", "distribution_json")
_VALUE = ("objective", "value", "value_type")
_ATTRIBUTE = ("trial_id", "key", "value_json")
_value = models.TrialValueModel.stored_repr_to_value


def read_trials(session: Session, ids: Sequence[int]) -> dict[int, FrozenTrial]:
    """Whole trials by id."""
    found: dict[int, FrozenTrial] = {}
    for start in range(0, len(ids), TRIALS_AT_ONCE):
        some = ids[start : start + TRIALS_AT_ONCE]
        trials = sqlalchemy.select(models.TrialModel).where(models.TrialModel.trial_id.in_(some))
        params = _by_trial(session, models.TrialParamModel, some, _PARAM)
        values = _by_trial(session, models.TrialValueModel, some, _VALUE)
        user = _by_trial(session, models.TrialUserAttributeModel, some, _ATTRIBUTE)
        system = _by_trial(session, models.TrialSystemAttributeModel, some, _ATTRIBUTE)
        stored: Any
        for stored in session.scalars(trials):
            i = stored.trial_id
            # In the order they were written, which is the model's.
            ranges = {name: (distribution_of(text), value) for _, name, value, text in sorted(params[i])}
            found[i] = FrozenTrial(
                number=stored.number,
                state=stored.state,
                value=None,
                values=[_value(value, kind) for _, value, kind in sorted(values[i], key=_first)] or None,
                datetime_start=stored.datetime_start,
                datetime_complete=stored.datetime_complete,
                params={name: known.to_external_repr(value) for name, (known, value) in ranges.items()},
                distributions={name: known for name, (known, _) in ranges.items()},
                user_attrs={key: json.loads(text) for _, key, text in user[i]},
                system_attrs={key: json.loads(text) for _, key, text in system[i]},
                intermediate_values={},
                trial_id=i,
            )
    return found


def _first(row: tuple[Any, ...]) -> Any:
    return row[0]


def _by_trial(
    session: Session, model: Any, ids: Sequence[int], columns: Sequence[str]
) -> dict[int, list[tuple[Any, ...]]]:
    """Columns of a table's rows, by the trial they are of."""
    chosen = [getattr(model, name) for name in columns]
    rows = session.execute(sqlalchemy.select(model.trial_id, *chosen).where(model.trial_id.in_(ids)))
    found = defaultdict(list)
    for row in rows:
        found[row[0]].append(tuple(row[1:]))
    return found


def value_rows(trial_id: int, values: Iterable[float]) -> list[dict[str, Any]]:
    stored = map(models.TrialValueModel.value_to_stored_repr, values)
    return [
        {"trial_id": trial_id, "objective": objective, "value": value, "value_type": kind}
        for objective, (value, kind) in enumerate(stored)
    ]


def rows_of(trial_id: int, trial: FrozenTrial) -> Iterable[tuple[type, list[dict[str, Any]]]]:
    """What a trial is in each table beside its own."""
    kinds = {id(kind): kind for kind in trial.distributions.values()}
    texts = {key: distribution_to_json(kind) for key, kind in kinds.items()}
    yield (
        models.TrialParamModel,
        [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": trial.distributions[name].to_internal_repr(value),
                "distribution_json": texts[id(trial.distributions[name])],
            }
            for name, value in trial.params.items()
        ],
    )
    yield models.TrialValueModel, value_rows(trial_id, trial.values or ())
    for model, attributes in (
        (models.TrialUserAttributeModel, trial.user_attrs),
        (models.TrialSystemAttributeModel, trial.system_attrs),
    ):
        rows = [
            {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
            for key, value in attributes.items()
        ]
        yield model, rows
