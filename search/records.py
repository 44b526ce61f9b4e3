"""Rows of a study: one per trial, one per later evaluation. Values only, read by reports and exports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from actors.harness_results import HarnessScore
from actors.types import CHOICE, Allocation, Score
from search.constraints import Constraint, feasible

FACTORS = "factors"
"""The variant that is a trial's own factors."""
HARNESS = "lm_eval"
"""The split of what lm-evaluation-harness measured: its tasks have splits of their own."""
FORGOTTEN = "forgotten"
"""The split of a row that ends those of a variant."""

Key = tuple[int, str, str, str]
"""Of the evaluations table: trial, variant, split, fingerprint."""


@dataclass(frozen=True)
class TrialRow:
    """One trial of the study as the reports see it.

    `origin` says who proposed it: `dense`, `uniform`, `seed`, `warm`, `surgical`, `enqueued` or the sampler's
    name. `values` follow the study's objectives and are None unless the state is COMPLETE; another program
    may have told them, and then there is no score. The `score` of a PRUNED trial is partial. `copied_from` is
    the trial whose score answered this one, where its allocation was known. `macs` are the
    multiply-accumulates of a token, None where they are not known. `constraints` has what was recorded of
    each: a violation, where it is above 0. Where a trial is not `ranked` another program gave it no levels of
    this space: its allocation, budgets and MACs are the dense model's, and say nothing of it. It is `lost`
    where its failure says nothing of the model.
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
    constraints: Mapping[str, float] = field(default_factory=dict)
    ranked: bool = True
    lost: bool = False

    @property
    def feasible(self) -> bool:
        """Whether it violates no constraint."""
        return feasible(self.constraints)

    def point(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """The values of a finished trial, each to be minimised; infinite where it is not feasible: it then
        dominates nothing and adds no hypervolume."""
        assert self.values is not None
        if not self.feasible:
            return (math.inf,) * len(objectives)
        return tuple(v if o.minimize else -v for v, o in zip(self.values, objectives, strict=True))

    @property
    def stopped_by(self) -> int | None:
        """The trial that dominated this one at the end of a stage; its score is then partial."""
        return self.score.stopped_by if self.score else None

    @property
    def finished(self) -> bool:
        """Whether it completed with a whole score; values that another program told are none."""
        return self.state == "COMPLETE" and self.score is not None


@dataclass(frozen=True)
class Evaluation:
    """A score learned after the search, keyed by (trial, variant, split, fingerprint).

    `allocation` is the key of the trial's, which the table adds; None in rows of versions that kept none.
    """

    trial: int
    variant: str
    split: str
    fingerprint: str
    score: Score
    allocation: str | None = None

    @property
    def key(self) -> Key:
        return (self.trial, self.variant, self.split, self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "variant": self.variant,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "allocation": self.allocation,
            "score": self.score.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        return cls(**{**data, "score": Score.from_dict(data["score"])})


@dataclass(frozen=True)
class HarnessEvaluation:
    """What lm-evaluation-harness says of a trial's variant, a row of the same table; its split is `HARNESS`.

    The fingerprint is of what was asked (`actors.harness_results.task_fingerprints`); `allocation` as there.
    """

    trial: int
    variant: str
    fingerprint: str
    score: HarnessScore
    allocation: str | None = None

    @property
    def key(self) -> Key:
        return (self.trial, self.variant, HARNESS, self.fingerprint)

    def to_dict(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "variant": self.variant,
            "split": HARNESS,
            "fingerprint": self.fingerprint,
            "allocation": self.allocation,
            "harness": self.score.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HarnessEvaluation:
        score = HarnessScore.from_dict(data["harness"])
        return cls(data["trial"], data["variant"], data["fingerprint"], score, data.get("allocation"))


@dataclass(frozen=True)
class Forgotten:
    """A row of that table, of split `FORGOTTEN`: rows of its variant before it are of a file that is gone."""

    trial: int
    variant: str
    allocation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "split": FORGOTTEN}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Forgotten:
        return cls(data["trial"], data["variant"], data["allocation"])


@dataclass(frozen=True)
class Objective:
    """One objective of a study by its metric name; `minimize` is its direction."""

    name: str
    minimize: bool


@dataclass(frozen=True)
class StudySummary:
    """All that a report shows of a study. `front` holds numbers of feasible trials, smallest budget last.

    `macs_length` are the positions a token attends to in the rows' `macs`. `evaluations` and `harness` are of
    trials in `rows`, on whatever a split was; `fingerprints` are those of the splits as they are now, and
    only scores on these are shown beside each other. On a split without one there is no score.
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
    constraints: tuple[Constraint, ...] = ()
    harness: tuple[HarnessEvaluation, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def test_score(self, trial: int, variant: str = FACTORS) -> Score | None:
        """The score of a trial's variant on the test split as it is now, if there is one."""
        return self.evaluated(trial, "test", variant)

    def choice_score(self, trial: int) -> Score | None:
        """The score of a trial on the text that chooses as it is now, if there is one."""
        return self.evaluated(trial, CHOICE)

    def evaluated(self, trial: int, split: str, variant: str = FACTORS) -> Score | None:
        """What the evaluations say of a trial's variant on a split as it is now, if they do."""
        key = (trial, variant, split, self.fingerprints.get(split))
        return next((each.score for each in self.evaluations if each.key == key), None)
