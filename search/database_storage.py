"""Optuna's relational storage as a driver of a study uses it: the same tables, in fewer statements.

Optuna stores each of a new trial's parameters by several statements and reads every open trial whole at
every look. Here a trial is stored by one statement for each table, and a look reads states; what it finds
changed is read whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from search.journal_storage import StudyJournal
from search.memory import shared_copy
from search.outage import OUTAGES, passing
from search.patience import impatient
from search.trial_rows import read_trials, rows_of, value_rows

T = TypeVar("T")


def _never(session: Session) -> bool:
    return False


@dataclass(frozen=True)
class _Write:
    """What is written to a trial, and noted of it in memory; `there` asks whether it was written already."""

    trial_id: int
    do: Callable[[Session], None]
    note: Callable[[FrozenTrial], None]
    there: Callable[[Session], bool] = _never


class StudyDatabase(RDBStorage):
    """Tables that any Optuna program reads and writes; only the statements are others.

    It stands beneath Optuna's cache. `_open` are the trials that had not ended when they were last read, as
    they were then and with what this process wrote since; others are read anew. Intermediate values are
    not read: trials of several objectives have none.
    """

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        super().__init__(url, engine_kwargs)
        self._open: dict[int, FrozenTrial] = {}
        self._group: list[_Write] | None = None
        self.patience = impatient()

    def _asked(self, ask: Callable[[bool], T]) -> T:
        """What the database answers, asked again while it is away: see `search.patience`."""

        def attempt(again: bool) -> T:
            if again:
                self.engine.dispose()  # by a new connection: another server may answer there by now
            return ask(again)

        return self.patience.ride_out(attempt, OUTAGES, passing)

    # -- the study itself ---------------------------------------------------------------------

    def get_all_studies(self) -> list[FrozenStudy]:
        read = super().get_all_studies
        return self._asked(lambda again: read())

    def get_study_id_from_name(self, study_name: str) -> int:
        read = super().get_study_id_from_name
        return self._asked(lambda again: read(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        read = super().get_study_name_from_id
        return self._asked(lambda again: read(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        read = super().get_study_directions
        return self._asked(lambda again: read(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        read = super().get_study_user_attrs
        return self._asked(lambda again: read(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        read = super().get_study_system_attrs
        return self._asked(lambda again: read(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        write = super().set_study_user_attr
        self._asked(lambda again: write(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        write = super().set_study_system_attr
        self._asked(lambda again: write(study_id, key, value))

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        create = super().create_new_study

        def ask(again: bool) -> int:
            try:
                return create(directions, study_name)
            except DuplicatedStudyError:
                if not again or study_name is None:
                    raise
                return self.get_study_id_from_name(study_name)  # the commit whose answer was lost

        return self._asked(ask)

    # -- writing ------------------------------------------------------------------------------

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Attributes and states that are written inside are one transaction, at the end: all hold, or none.

        Raises:
            UpdateFinishedTrialError: another program had ended a trial that is written to.
        """
        group: list[_Write] = []
        self._group = group
        try:
            yield
        finally:
            self._group = None
        self._write_all(group)

    def _write(self, write: _Write) -> None:
        if self._group is None:
            self._write_all([write])
        else:
            self._group.append(write)

    def _write_all(self, writes: Sequence[_Write]) -> None:
        def ask(again: bool) -> None:
            with _create_scoped_session(self.scoped_session) as session:
                # A commit whose answer was lost: it is all there, or nothing of it.
                if not (again and any(write.there(session) for write in writes)):
                    for write in writes:
                        write.do(session)

        self._asked(ask)
        for write in writes:
            if write.trial_id in self._open:
                write.note(self._open[write.trial_id])

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_attribute(models.TrialUserAttributeModel, "user_attrs", trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_attribute(models.TrialSystemAttributeModel, "system_attrs", trial_id, key, value)

    def _set_attribute(self, model: Any, kind: str, trial_id: int, key: str, value: Any) -> None:
        kept = json.loads(json.dumps(value))

        def do(session: Session) -> None:
            self._set_trial_attr_without_commit(session, model, trial_id, key, value)

        self._write(_Write(trial_id, do, lambda trial: getattr(trial, kind).update({key: kept})))

    def _set_trial_param(self, trial_id: int, *arguments: Any) -> None:
        self._open.pop(trial_id, None)
        write = super()._set_trial_param
        self._asked(lambda again: write(trial_id, *arguments))

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state == TrialState.RUNNING:
            return self._start(trial_id)
        if not state.is_finished():
            self._open.pop(trial_id, None)
            return super().set_trial_state_values(trial_id, state, values)
        now = datetime.now()

        def do(session: Session) -> None:
            stored: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
            self.check_trial_is_updatable(trial_id, stored.state)
            rows = value_rows(trial_id, values or ())
            if rows:
                session.execute(sqlalchemy.insert(models.TrialValueModel), rows)
            stored.state, stored.datetime_complete = state, now

        def note(trial: FrozenTrial) -> None:
            trial.state, trial.datetime_complete = state, now
            trial.values = None if values is None else [float(value) for value in values]

        def there(session: Session) -> bool:
            stored: Any = models.TrialModel.find_or_raise_by_id(trial_id, session)
            return bool((stored.state, stored.datetime_complete) == (state, now))

        self._write(_Write(trial_id, do, note, there))
        return True

    def _start(self, trial_id: int) -> bool:
        """A WAITING trial RUNNING; False where another program started it."""
        self._open.pop(trial_id, None)
        now = datetime.now()

        def ask(again: bool) -> bool:
            with _create_scoped_session(self.scoped_session) as session:
                stored: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
                self.check_trial_is_updatable(trial_id, stored.state)
                if stored.state != TrialState.WAITING:
                    return bool(again and stored.datetime_start == now)
                stored.state, stored.datetime_start = TrialState.RUNNING, now
                return True

        return self._asked(ask)

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if template_trial is None:
            return super()._create_new_trial(study_id)

        def ask(again: bool) -> FrozenTrial:
            there = self._equal_trial(study_id, template_trial) if again else None
            return there or self._add(study_id, template_trial)

        trial = self._asked(ask)
        if not trial.state.is_finished():
            self._open[trial._trial_id] = trial
        return trial

    def _equal_trial(self, study_id: int, trial: FrozenTrial) -> FrozenTrial | None:
        """The stored trial that says all that this one does, to the microsecond it was started in."""
        model = models.TrialModel
        look = sqlalchemy.select(model.trial_id).where(model.study_id == study_id, model.state == trial.state)
        with _create_scoped_session(self.scoped_session) as session:
            found = read_trials(session, session.scalars(look).all())
        return next((each for each in found.values() if _told(each) == _told(trial)), None)

    def _add(self, study_id: int, template_trial: FrozenTrial) -> FrozenTrial:
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
            for model, rows in rows_of(stored.trial_id, template_trial):
                self._insert(session, model, rows)
            trial = shared_copy(template_trial)
            trial.number, trial._trial_id = stored.number, stored.trial_id
        return trial

    def _insert(self, session: Session, model: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows to a table; PostgreSQL takes hundreds of parameters fastest as an array of each column."""
        if self.engine.name == "postgresql" and model is models.TrialParamModel and rows:
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            session.execute(_PARAMETERS_AT_ONCE, columns)
        elif rows:
            session.execute(sqlalchemy.insert(model), rows)

    # -- reading ------------------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        read = super().get_trial
        return self._asked(lambda again: read(trial_id))

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        return self._asked(
            lambda again: self._look(study_id, states, included_trial_ids, trial_id_greater_than)
        )

    def _look(
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
            read = read_trials(session, changed)
        trials = [read[i] if i in read else self._open[i] for i in sorted(found)]
        known = {**self._open, **read}
        self._open = {i: trial for i, trial in known.items() if not trial.state.is_finished()}
        return trials if states is None else [trial for trial in trials if trial.state in states]


_PARAMETERS_AT_ONCE = sqlalchemy.text(
    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
    "SELECT trial_id, param_name, param_value, distribution_json FROM unnest("
    "CAST(:trial_id AS int[]), CAST(:param_name AS text[]), "
    "CAST(:param_value AS float8[]), CAST(:distribution_json AS text[])) WITH ORDINALITY "
    "AS given (trial_id, param_name, param_value, distribution_json, place) ORDER BY place"
)


def _told(trial: FrozenTrial) -> Any:
    """What a trial says, under whatever number it is stored."""
    attributes = json.loads(json.dumps([trial.user_attrs, trial.system_attrs]))
    return trial.datetime_start, trial.params, attributes


def grouped(storage: BaseStorage) -> AbstractContextManager[None]:
    """A context in which a study's storage, be it journal or database, writes what is asked for at once.

    It is durable at the end of the context; any other storage writes one after the other.
    """
    if isinstance(storage, StudyJournal):
        return storage.grouped()
    beneath = storage._backend if isinstance(storage, _CachedStorage) else storage
    return beneath.grouped() if isinstance(beneath, StudyDatabase) else nullcontext()
