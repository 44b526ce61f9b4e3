"""What trials of a study say about a landscape: Optuna's trials in, arrays out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.constraints import total
from search.landscape import Landscape
from search.packing import PLAN, was_lost

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MOVE = "exchange:move"
"""The system attribute that says by which move a trial was proposed."""


@dataclass(frozen=True)
class Place:
    """A point of the space: levels (p,) and indices of methods (c,)."""

    levels: Integers
    methods: Integers

    @property
    def key(self) -> bytes:
        return self.levels.tobytes() + self.methods.tobytes()


@dataclass(frozen=True)
class Finding:
    """One finished trial: the losses (p,) predicted for it, their sum and its size, at the ranks it was
    scored at.

    `values` (d,) are minimised; `violation` sums up those of its constraints, 0 where it keeps to all.
    """

    place: Place
    predicted: Floats
    total: float
    size: int
    values: Floats
    violation: float
    move: str | None


class Reader:
    """Reads each finished trial once: they never change, so what is kept changes no answer.

    What is kept is of a storage, not of a study: a deterministic search shows a study of its own for each
    proposal (`search.lagged`), in which trials that have ended may run.
    """

    def __init__(self, landscape: Landscape) -> None:
        self._landscape = landscape
        self._storage: BaseStorage | None = None
        self._ends: dict[int, Finding | int | None] = {}  # of a trial that failed, its size
        self._places: dict[int, bytes] = {}

    def read(self, study: Study) -> tuple[list[Finding], list[int], set[bytes]]:
        """Findings by number, the sizes of trials that failed, and the places of all trials, whatever their
        state.

        A trial with parameters that are not of this space, or with a value that is not finite, is left out.
        So is one that failed for a reason that is none of the model's: its place may be proposed again.
        """
        if study._storage is not self._storage:
            self._storage, self._ends, self._places = study._storage, {}, {}
        signs = np.where([way == StudyDirection.MAXIMIZE for way in study.directions], -1.0, 1.0)
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.number not in self._ends:
                self._look(trial, signs)
        ends = [self._ends[trial.number] for trial in trials if trial.state.is_finished()]
        findings = [end for end in ends if isinstance(end, Finding)]
        failed = [end for end in ends if isinstance(end, int)]
        lost = {trial.number for trial in trials if _lost(trial)}
        taken = {place for number, place in self._places.items() if number not in lost}
        return findings, failed, taken

    def _look(self, trial: FrozenTrial, signs: Floats) -> None:
        """Keep where a trial is, and how it ended if it did."""
        place = self._place(trial)
        if place is not None:
            self._places[trial.number] = place.key
        if not trial.state.is_finished():
            return
        end: Finding | int | None = None
        if place is not None and trial.state == TrialState.COMPLETE:
            end = self._finding(trial, place, signs)
        elif place is not None and trial.state == TrialState.FAIL and not _lost(trial):
            _, end = self._scored_at(trial, place)
        self._ends[trial.number] = end

    def _place(self, trial: FrozenTrial) -> Place | None:
        land, params = self._landscape, trial.params
        levels = [params.get(name) for name in land.names]
        top = land.sizes.shape[1] - 1
        if not all(isinstance(level, int) and 0 <= level <= top for level in levels):
            return None
        if any(params.get(name) not in choices for name, choices in land.methods.items()):
            return None
        methods = [choices.index(params[name]) for name, choices in land.methods.items()]
        return Place(np.array(levels, dtype=np.int64), np.array(methods, dtype=np.int64))

    def _finding(self, trial: FrozenTrial, place: Place, signs: Floats) -> Finding | None:
        values = np.array(trial.values) * signs
        if not np.isfinite(values).all():
            return None
        predicted, size = self._scored_at(trial, place)
        violation, move = total(trial.constraints), trial.system_attrs.get(MOVE)
        return Finding(place, predicted, float(predicted.sum()), size, values, violation, move)

    def _scored_at(self, trial: FrozenTrial, place: Place) -> tuple[Floats, int]:
        """Predicted losses (p,) and size of a trial, by its ranks where it has a plan."""
        land, ranks = self._landscape, trial.user_attrs.get(PLAN, {}).get("ranks", ())
        return land.of_ranks(ranks) if len(ranks) == len(land.owner) else land.of_levels(place.levels)


def _lost(trial: FrozenTrial) -> bool:
    """Whether a trial failed and nothing is known of its model; one that is shown to run did not."""
    return trial.state == TrialState.FAIL and was_lost(trial)
