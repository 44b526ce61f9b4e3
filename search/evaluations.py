"""The evaluations table: scores learned after a trial finished, appended durably beside the study."""

from __future__ import annotations

import json
import os
from pathlib import Path

from actors.types import RankfrontError
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
        self._rows: dict[tuple[int, str, str, str], Evaluation] = {}
        content = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break  # a write is under way, or was cut off
            try:
                row = Evaluation.from_dict(json.loads(line))
            except ValueError as error:
                raise RankfrontError(f"{self._path}: record {number} is damaged: {error}") from error
            self._rows[row.key] = row

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
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row.to_dict()) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._rows[row.key] = row
