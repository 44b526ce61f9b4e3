"""The evaluations table: scores learned after a trial finished, appended durably beside the study."""

from __future__ import annotations

import json
import os
from pathlib import Path

from search.journal import repair
from search.records import Evaluation

FILE = "evaluations.jsonl"


class Evaluations:
    """Rows keyed by (trial, variant, split, fingerprint); a later row replaces an equal key's."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        repair(self._path)
        self._rows: dict[tuple[int, str, str, str], Evaluation] = {}
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                row = Evaluation.from_dict(json.loads(line))
                self._rows[row.key] = row

    @property
    def rows(self) -> tuple[Evaluation, ...]:
        return tuple(self._rows.values())

    def get(self, trial: int, variant: str, split: str, fingerprint: str) -> Evaluation | None:
        return self._rows.get((trial, variant, split, fingerprint))

    def add(self, row: Evaluation) -> None:
        """Durable when it returns."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row.to_dict()) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._rows[row.key] = row
