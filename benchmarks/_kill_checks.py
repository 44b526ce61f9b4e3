"""What must hold of a study whose drivers are killed: each life's record against the one before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from _reporting import DISPATCHED, NAME, REPORTED
from optuna.storages import BaseStorage

from search.packing import RESULT


@dataclass(frozen=True)
class Trial:
    """What is stored of a trial."""

    state: str
    params: Mapping[str, Any]
    values: list[float] | None
    has_result: bool

    @property
    def ended(self) -> bool:
        return self.state not in ("WAITING", "RUNNING")


def stored(storage: BaseStorage) -> list[Trial]:
    """Every trial, as plain Optuna reads it."""
    if NAME not in {study.study_name for study in storage.get_all_studies()}:
        return []
    trials = optuna.load_study(study_name=NAME, storage=storage).get_trials(deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials))), "numbers have gaps"
    return [Trial(t.state.name, t.params, t.values, RESULT in t.user_attrs) for t in trials]


def lines_of(path: Path, start: int) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()[start:]] if path.exists() else []


class Checker:
    """Holds each life of a driver against the one before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: list[Trial] = []
        self._seen = {REPORTED: 0, DISPATCHED: 0}
        self._known: set[int] = set()  # trials whose end was stored by an earlier life
        self.unreported = self.replayed = 0

    def __call__(self, now: list[Trial]) -> None:
        reported, dispatched = self._new(REPORTED), self._new(DISPATCHED)
        numbers = [number for number, _, _ in reported]
        assert len(set(numbers)) == len(numbers), f"reported twice: {numbers}"
        assert not self._known & set(numbers), "an end that was stored is reported again"
        for number, state, values in reported:
            assert (now[number].state, now[number].values) == (state, values), (
                f"trial {number} is not as reported"
            )
        ended = {number for number, trial in enumerate(now) if trial.ended}
        more = ended - self._known - set(numbers)
        assert len(more) <= 1, f"stored, not reported: {more}"
        assert len(now) >= len(self._before), "trials are gone"
        for number, (was, trial) in enumerate(zip(self._before, now, strict=False)):
            assert not was.ended or was == trial, f"trial {number} had ended and changed"
            assert was.params.items() <= trial.params.items(), f"trial {number} changed its parameters"
        with_result = {number for number, was in enumerate(self._before) if was.has_result}
        assert not with_result & set(dispatched), "a trial with a result was dispatched again"
        self.unreported += len(more)
        self.replayed += len((with_result - self._known) & ended)
        self._before, self._known = now, ended

    def _new(self, name: str) -> list[Any]:
        lines = lines_of(self._folder / name, self._seen[name])
        self._seen[name] += len(lines)
        return lines
