"""The evaluations table: scores learned after a trial finished, appended durably beside the study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from search.files import append_record, read_records
from search.journal import repair
from search.records import FORGOTTEN, HARNESS, Evaluation, Forgotten, HarnessEvaluation, Key, TrialRow

FILE = "evaluations.jsonl"

Row = Evaluation | HarnessEvaluation | Forgotten


class Evaluations:
    """Rows of trials, keyed by (trial, variant, split, fingerprint); a later row replaces an equal key's, and
    one that forgets a variant removes all of it.

    A number may have stood for another trial, in a journal that is gone or before a backup was restored. So
    a row counts where a trial of its number has the allocation that was scored; one of a version that did not
    keep it counts by its number. `left_out` is how many rows of the file do not count.

    Reading changes nothing, as a driver may be writing; only the study's driver calls `add`.
    """

    def __init__(self, folder: Path, trials: Iterable[TrialRow]) -> None:
        """Raises RankfrontError where the file is damaged other than by a torn last line."""
        self._path = folder / FILE
        self._whole = False
        self._allocations = {trial.number: trial.allocation for trial in trials}
        rows = read_records(self._path, _row)
        counting = [row for row in rows if self._is_of_trial(row)]
        self.left_out = len(rows) - len(counting)
        self._rows: dict[Key, Evaluation | HarnessEvaluation] = {}
        for row in counting:
            self._take(row)

    def _take(self, row: Row) -> None:
        if isinstance(row, Forgotten):
            for key in self._of(row.trial, row.variant):
                del self._rows[key]
        else:
            self._rows[row.key] = row

    def _of(self, trial: int, variant: str) -> list[Key]:
        return [key for key, row in self._rows.items() if (row.trial, row.variant) == (trial, variant)]

    def _is_of_trial(self, row: Row) -> bool:
        allocation = self._allocations.get(row.trial)
        return allocation is not None and row.allocation in (None, allocation.key)

    @property
    def rows(self) -> tuple[Evaluation, ...]:
        return tuple(row for row in self._rows.values() if isinstance(row, Evaluation))

    @property
    def harness(self) -> tuple[HarnessEvaluation, ...]:
        return tuple(row for row in self._rows.values() if isinstance(row, HarnessEvaluation))

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def get(self, trial: int, variant: str, split: str, fingerprint: str) -> Evaluation | None:
        row = self._rows.get((trial, variant, split, fingerprint))
        return row if isinstance(row, Evaluation) else None

    def forget(self, trial: int, variant: str, say: Callable[[str], None]) -> None:
        """A variant's rows so far count no more, as its factors are made anew. Durable, as `add` is."""
        if self._of(trial, variant):
            self.add(Forgotten(trial, variant), say)

    def add(self, row: Row, say: Callable[[str], None]) -> None:
        """Durable when it returns, with the allocation of its trial, one of those that this was made for.

        What a crash left of a row before it is dropped, and told to `say`.
        """
        row = replace(row, allocation=self._allocations[row.trial].key)
        if not self._whole:
            repaired = repair(self._path)
            if repaired:
                say(f"evaluations: {repaired}")
            self._whole = True
        append_record(self._path, row.to_dict())
        self._take(row)


def _row(data: Mapping[str, Any]) -> Row:
    kinds: dict[str, type[Row]] = {HARNESS: HarnessEvaluation, FORGOTTEN: Forgotten}
    return kinds.get(data["split"], Evaluation).from_dict(data)
