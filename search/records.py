"""Rows of a study: one per trial, one per later evaluation. Values only, read by reports and exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.types import Allocation, Score

PLAN = "rankfront.plan"
"""The user attribute a trial is created with: its origin, ranks and methods."""

FACTORS = "factors"
"""The variant that is a trial's own factors."""


@dataclass(frozen=True)
class TrialRow:
    """One trial of the study as the reports see it.

    `origin` says who proposed it: `dense`, `uniform`, `seed`, `surgical`, `enqueued` or the sampler's name.
    `values` follow the study's objectives and are None unless the state is COMPLETE; the `score` of a PRUNED
    trial is partial. `copied_from` is the trial whose score answered this one, where its allocation was
    known. `macs` are the multiply-accumulates of a token, None where they are not known.
    """

    number: int
    state: str
    origin: str
    allocation: Allocation
    budget_linear: float
    budget_model: float
    budget_bytes: float
    values: tuple[float, ...] | None
    score: Score | None
    seconds: float | None
    replica: str | None
    reason: str | None
    copied_from: int | None
    macs: int | None = None

    @property
    def stopped_by(self) -> int | None:
        """The trial that dominated this one at the end of a stage; its score is then partial."""
        return self.score.stopped_by if self.score else None

    @property
    def finished(self) -> bool:
        return self.state == "COMPLETE"


@dataclass(frozen=True)
class Evaluation:
    """A score learned after the search, keyed by (trial, variant, split, fingerprint)."""

    trial: int
    variant: str
    split: str
    fingerprint: str
    score: Score

    @property
    def key(self) -> tuple[int, str, str, str]:
        return (self.trial, self.variant, self.split, self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "variant": self.variant,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "score": self.score.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        return cls(**{**data, "score": Score.from_dict(data["score"])})


@dataclass(frozen=True)
class Objective:
    """One objective of a study by its metric name; `minimize` is its direction."""

    name: str
    minimize: bool


@dataclass(frozen=True)
class StudySummary:
    """All that a report shows of a study. `front` holds trial numbers, smallest budget last.

    `macs_length` are the positions a token attends to in the rows' `macs`.
    """

    study: str
    model: str
    objectives: tuple[Objective, ...]
    rows: tuple[TrialRow, ...]
    front: tuple[int, ...]
    hypervolume: float
    reference: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    facts: Mapping[str, str]
    macs_length: int | None = None

    def test_score(self, trial: int, variant: str = FACTORS) -> Score | None:
        """The latest test-split score of a trial's variant, if there is one."""
        found = [e for e in self.evaluations if (e.trial, e.split, e.variant) == (trial, "test", variant)]
        return found[-1].score if found else None
