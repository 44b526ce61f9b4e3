"""The evaluations table: scores learned after a trial finished, appended durably beside the study."""

from __future__ import annotations

from pathlib import Path

from search.files import append_record, read_records
from search.journal import repair
from search.records import Evaluation

FILE = "evaluations.jsonl"


class Evaluations:
    """Rows keyed by (trial, variant, split, fingerprint); a later row replaces an equal key's.

    Reading changes nothing, as a driver may be writing; only the study's driver calls `add`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._whole = False
        self._rows = {row.key: row for row in read_records(self._path, Evaluation.from_dict)}

    @property
    def rows(self) -> tuple[Evaluation, ...]:
        return tuple(self._rows.values())

    def get(self, trial: int, variant: str, split: str, fingerprint: str) -> Evaluation | None:
        return self._rows.get((trial, variant, split, fingerprint))

    def add(self, row: Evaluation) -> None:
        """Durable when it returns."""
        if not self._whole:
            repair(self._path)
            self._whole = True
        append_record(self._path, row.to_dict())
        self._rows[row.key] = row
