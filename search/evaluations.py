"""The evaluations table: scores learned after a trial finished, appended durably beside the study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from search.files import append_record, read_records
from search.journal import repair
from search.records import HARNESS, Evaluation, HarnessEvaluation, Key

FILE = "evaluations.jsonl"


class Evaluations:
    """Rows keyed by (trial, variant, split, fingerprint); a later row replaces an equal key's.

    Reading changes nothing, as a driver may be writing; only the study's driver calls `add`.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._whole = False
        self._rows = {row.key: row for row in read_records(self._path, _row)}

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

    def add(self, row: Evaluation | HarnessEvaluation) -> None:
        """Durable when it returns."""
        if not self._whole:
            repair(self._path)
            self._whole = True
        append_record(self._path, row.to_dict())
        self._rows[row.key] = row


def _row(data: Mapping[str, Any]) -> Evaluation | HarnessEvaluation:
    kind = HarnessEvaluation if data["split"] == HARNESS else Evaluation
    return kind.from_dict(data)
