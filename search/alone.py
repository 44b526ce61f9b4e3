"""Targets alone: what `rankfront sensitivity` asks of the replicas, and the durable record of the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from actors.types import Allocation, Score, TargetSpec
from search.cost import CostModel
from search.files import append_record, read_records
from search.journal import repair

FILE = "sensitivity.jsonl"
FINGERPRINTS = ("search", "factors")
"""Of a preparation: what decides the score of an allocation."""


@dataclass(frozen=True)
class Cell:
    """One target at the largest `rank` that stores `share` of its parameters, every other one dense."""

    target: TargetSpec
    share: float
    rank: int | None
    allocation: Allocation

    @cached_property
    def key(self) -> str:
        return self.allocation.key


def cells(cost: CostModel, shares: Iterable[float]) -> Iterator[Cell]:
    """Share by share, so that a run that is stopped leaves whole maps."""
    for share in shares:
        for target in cost.targets:
            rank = cost.largest_rank(target, share)
            yield Cell(target, share, rank, Allocation.of({target.name: rank}, cost.targets))


@dataclass(frozen=True)
class Record:
    """The end of one allocation: a score, or the reason there is none. A target of None is the dense model.

    `share` is the one it was asked for; another share that allows the same rank is answered by it too. `lost`
    says that the reason is of the replica: it tells nothing of the allocation.
    """

    allocation: str
    search: str
    factors: str
    target: str | None
    rank: int | None
    share: float | None
    score: Score | None
    reason: str | None
    lost: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        score = data["score"]
        # One that was kept before there was `lost` does not say, and tells nothing of the allocation either.
        return cls(**{"lost": True, **data, "score": None if score is None else Score.from_dict(score)})


class Log:
    """The records of one preparation, by allocation key; a later one replaces an earlier one.

    The file may hold those of other preparations. The caller holds the study's lock.
    """

    def __init__(self, folder: Path, fingerprints: Mapping[str, str], file: str = FILE) -> None:
        """Raises RankfrontError where the file is damaged other than by a torn last line.

        `repaired` says what was cut off the end, None if nothing was.
        """
        self._path = folder / file
        self._identity = {key: fingerprints[key] for key in FINGERPRINTS}
        self.repaired = repair(self._path)
        self._records = {
            record.allocation: record
            for record in read_records(self._path, Record.from_dict)
            if {"search": record.search, "factors": record.factors} == self._identity
        }

    def get(self, key: str) -> Record | None:
        """The record of the allocation with this key."""
        return self._records.get(key)

    def score(self, key: str) -> Score | None:
        record = self.get(key)
        return record.score if record else None

    def broken(self, key: str) -> bool:
        """Whether the allocation with this key was scored, and no score came of it."""
        record = self.get(key)
        return record is not None and record.score is None and not record.lost

    def add(
        self,
        allocation: Allocation,
        cell: Cell | None,
        score: Score | None,
        reason: str | None,
        lost: bool = False,
    ) -> None:
        """Durable when it returns."""
        record = Record(
            allocation=allocation.key,
            **self._identity,
            target=cell.target.name if cell else None,
            rank=cell.rank if cell else None,
            share=cell.share if cell else None,
            score=score,
            reason=reason,
            lost=lost,
        )
        append_record(self._path, record.to_dict())
        self._records[record.allocation] = record
