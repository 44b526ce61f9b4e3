"""Optuna's relational storage as a driver of a study uses it: the same tables, in fewer statements.

Optuna stores each of a new trial's parameters by several statements and reads every open trial whole at
every look. Here a trial is stored by one statement for each table, and a look reads states; what it finds
changed is read whole.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from search.journal_storage import StudyJournal, distribution_of
from search.memory import shared_copy

# Trials that are read by one statement for each table: a hundred thousand rows of parameters.
TRIALS_AT_ONCE = 500


class StudyDatabase(RDBStorage):
    """Tables that any Optuna program reads and writes; only the statements are others.

    It stands beneath Optuna's cache. `_open` are the trials that had not ended when they were last read, as
    they were then and with what this process wrote since; others are read anew. Intermediate values are
    not read: trials of several objectives have none.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        super().__init__(url, engine_kwargs)
        self._open: dict[int, FrozenTrial] = {}
        self._group: Session | None = None

    # -- writing ------------------------------------------------------------------------------

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Attributes and states that are written inside are one transaction: all of them hold, or none."""
        with _create_scoped_session(self.scoped_session) as session:
            self._group = session
            try:
                yield
            finally:
                self._group = None

    @contextmanager
    def _session(self) -> Iterator[Session]:
        if self._group is not None:
            yield self._group
        else:
            with _create_scoped_session(self.scoped_session) as session:
                yield session

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        with self._session() as session:
            self._set_trial_attr_without_commit(session, models.TrialUserAttributeModel, trial_id, key, value)
        if trial_id in self._open:
            self._open[trial_id].user_attrs[key] = json.loads(json.dumps(value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        with self._session() as session:
            self._set_trial_attr_without_commit(
                session, models.TrialSystemAttributeModel, trial_id, key, value
            )
        if trial_id in self._open:
            self._open[trial_id].system_attrs[key] = json.loads(json.dumps(value))

    def _set_trial_param(self, trial_id: int, *arguments: Any) -> None:
        self._open.pop(trial_id, None)
        super()._set_trial_param(trial_id, *arguments)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if not state.is_finished():
            self._open.pop(trial_id, None)
            return super().set_trial_state_values(trial_id, state, values)
        now = datetime.now()
        with self._session() as session:
            stored: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, stored.state)
            rows = _value_rows(trial_id, values or ())
            if rows:
                session.execute(sqlalchemy.insert(models.TrialValueModel), rows)
            stored.state, stored.datetime_complete = state, now
        if trial_id in self._open:
            trial = self._open[trial_id]
            trial.state, trial.datetime_complete = state, now
            trial.values = None if values is None else [float(value) for value in values]
        return True

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if template_trial is None:
            return super()._create_new_trial(study_id)
        with _create_scoped_session(self.scoped_session) as session:
            # The lock of the study's row: numbers are counted, and others may be creating trials too.
            models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            stored: Any = models.TrialModel(
                study_id=study_id,
                state=template_trial.state,
                datetime_start=template_trial.datetime_start,
                datetime_complete=template_trial.datetime_complete,
            )
            session.add(stored)
            session.flush()
            stored.number = stored.count_past_trials(session)
            for model, rows in _rows_of(stored.trial_id, template_trial):
                self._insert(session, model, rows)
            trial = shared_copy(template_trial)
            trial.number, trial._trial_id = stored.number, stored.trial_id
        if not trial.state.is_finished():
            self._open[trial._trial_id] = trial
        return trial

    def _insert(self, session: Session, model: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows to a table; PostgreSQL takes hundreds of parameters fastest as an array of each column."""
        if self.engine.name == "postgresql" and model is models.TrialParamModel and rows:
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            session.execute(_PARAMETERS_AT_ONCE, columns)
        elif rows:
            session.execute(sqlalchemy.insert(model), rows)

    # -- reading ------------------------------------------------------------------------------

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        model = models.TrialModel
        wanted = model.trial_id > trial_id_greater_than
        if included_trial_ids:
            wanted = sqlalchemy.or_(wanted, model.trial_id.in_(included_trial_ids))
        with _create_scoped_session(self.scoped_session) as session:
            look = sqlalchemy.select(model.trial_id, model.state).where(model.study_id == study_id, wanted)
            found = {row.trial_id: row.state for row in session.execute(look)}
            if not found:
                models.StudyModel.find_or_raise_by_id(study_id, session)
            changed = [i for i, state in found.items() if i not in self._open or self._open[i].state != state]
            read = self._read(session, study_id, changed)
        trials = [read[i] if i in read else self._open[i] for i in sorted(found)]
        known = {**self._open, **read}
        self._open = {i: trial for i, trial in known.items() if not trial.state.is_finished()}
        return trials if states is None else [trial for trial in trials if trial.state in states]

    def _read(self, session: Session, study_id: int, ids: Sequence[int]) -> dict[int, FrozenTrial]:
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


_PARAMETERS_AT_ONCE = sqlalchemy.text(
    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
    "SELECT trial_id, param_name, param_value, distribution_json FROM unnest("
    "CAST(:trial_id AS int[]), CAST(:param_name AS text[]), "
    "CAST(:param_value AS float8[]), CAST(:distribution_json AS text[])) WITH ORDINALITY "
    "AS given (trial_id, param_name, param_value, distribution_json, place) ORDER BY place"
)
_PARAM = ("param_id", "param_name", "param_value", "distribution_json")
_VALUE = ("objective", "value", "value_type")
_ATTRIBUTE = ("trial_id", "key", "value_json")
_value = models.TrialValueModel.stored_repr_to_value


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


def _value_rows(trial_id: int, values: Iterable[float]) -> list[dict[str, Any]]:
    stored = map(models.TrialValueModel.value_to_stored_repr, values)
    return [
        {"trial_id": trial_id, "objective": objective, "value": value, "value_type": kind}
        for objective, (value, kind) in enumerate(stored)
    ]


def _rows_of(trial_id: int, trial: FrozenTrial) -> Iterable[tuple[type, list[dict[str, Any]]]]:
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
    yield models.TrialValueModel, _value_rows(trial_id, trial.values or ())
    for model, attributes in (
        (models.TrialUserAttributeModel, trial.user_attrs),
        (models.TrialSystemAttributeModel, trial.system_attrs),
    ):
        rows = [
            {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
            for key, value in attributes.items()
        ]
        yield model, rows


def grouped(storage: BaseStorage) -> AbstractContextManager[None]:
    """A context in which a study's storage, be it journal or database, writes what is asked for at once.

    It is durable at the end of the context; any other storage writes one after the other.
    """
    if isinstance(storage, StudyJournal):
        return storage.grouped()
    beneath = storage._backend if isinstance(storage, _CachedStorage) else storage
    return beneath.grouped() if isinstance(beneath, StudyDatabase) else nullcontext()
