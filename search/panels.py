"""What the pictures of a study show, worked out once for the PNG and for the page. Values only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from actors.types import Score
from search.constraints import total
from search.pareto import front
from search.records import StudySummary, TrialRow

SHOWN_EXCESS = 3.0
"""nats/token above the best trial that the axis still shows (perplexity x 20): beyond it a model is broken,
and a few broken trials would squash all that is worth seeing."""

MARGIN = 0.06
"""Share of the data's range left free at both ends of an axis."""


@dataclass(frozen=True)
class Point:
    """A scored trial in a panel: `kept` in % of the model's parameters, `value` in the panel's unit."""

    trial: int
    kept: float
    value: float
    stderr: float
    origin: str
    feasible: bool = True


@dataclass(frozen=True)
class Panel:
    """One metric against parameters kept.

    `best` are the members of the front that are non-dominated in this panel, by falling `kept`; `test` holds
    the front's values on the test split. `span` and `limits` are the ends of the two axes, `beyond` the
    trials above `limits`.
    """

    metric: str
    label: str
    trials: tuple[Point, ...]
    front: tuple[Point, ...]
    best: tuple[Point, ...]
    uniform: tuple[Point, ...]
    seeds: tuple[Point, ...]
    dense: Point | None
    test: tuple[Point, ...]
    limits: tuple[float, float]
    span: tuple[float, float]
    beyond: tuple[Point, ...]

    def shown(self, points: Iterable[Point]) -> tuple[Point, ...]:
        return tuple(p for p in points if self.limits[0] <= p.value <= self.limits[1])

    @property
    def infeasible(self) -> tuple[Point, ...]:
        """The trials that violate a constraint."""
        return tuple(point for point in self.trials if not point.feasible)

    @property
    def note(self) -> str:
        """Says what the axis leaves out; empty where it shows everything."""
        if not self.beyond:
            return ""
        worst = max(point.value for point in self.beyond)
        plural = "s" if len(self.beyond) > 1 else ""
        return f"{len(self.beyond)} trial{plural} above the axis, up to {worst:.1f} nats/token"


def dense_row(summary: StudySummary) -> TrialRow | None:
    """The finished trial of the uncompressed model, the reference of every difference."""
    dense = [row for row in summary.rows if row.finished and row.score and row.allocation.is_dense]
    return dense[0] if dense else None


def front_rows(summary: StudySummary) -> list[TrialRow]:
    """The scored members of the front, in the summary's order (smallest budget last)."""
    by_number = {row.number: row for row in summary.rows}
    return [by_number[number] for number in summary.front if by_number[number].score is not None]


def infeasible_rows(summary: StudySummary) -> list[TrialRow]:
    """The finished trials that violate a constraint, least sum of violations first, as samplers rank them."""
    found = [row for row in summary.rows if row.finished and not row.feasible]
    return sorted(found, key=lambda row: total(row.constraints))


def panels(summary: StudySummary) -> tuple[Panel, ...]:
    """Loss, and mean accuracy where a reasoning task was scored. Empty before the first finished trial."""
    scored = [row.score for row in summary.rows if row.finished and row.score]
    found = []
    if scored:
        found.append(_panel(summary, "nll", "loss, nats/token (lower is better)", _nll, higher=False))
    if any(score.tasks for score in scored):
        label = "mean accuracy, % (higher is better)"
        found.append(_panel(summary, "reasoning.acc", label, _accuracy, higher=True))
    return tuple(found)


def perplexity_ticks(low: float, high: float) -> list[float]:
    """Round perplexities between exp(low) and exp(high), a dozen at most; nats in."""
    for steps in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 4, 5, 7),
        (1, 2, 5),
        (1,),
    ):
        decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= math.log(tick) <= high]
        if len(inside) <= 12:
            return inside
    return inside


def _nll(score: Score) -> tuple[float, float] | None:
    return score.text.nll, score.text.stderr


def _accuracy(score: Score) -> tuple[float, float] | None:
    return (100 * score.metrics["reasoning.acc"], 100 * score.reasoning_stderr) if score.tasks else None


Measure = Callable[[Score], tuple[float, float] | None]


def _panel(summary: StudySummary, metric: str, label: str, measure: Measure, higher: bool) -> Panel:
    finished = [row for row in summary.rows if row.finished]
    trials = _points(((row, row.score) for row in finished), measure)
    members = _points(((row, row.score) for row in front_rows(summary)), measure)
    test = _points(((row, summary.test_score(row.number)) for row in front_rows(summary)), measure)
    sign = -1.0 if higher else 1.0
    chosen = front([(point.kept, sign * point.value) for point in members])
    reference = dense_row(summary)
    dense = _points([(reference, reference.score)] if reference else [], measure)
    bars = [p.value + side * p.stderr for p in members if math.isfinite(p.stderr) for side in (-1, 1)]
    values = [p.value for p in (*trials, *test)] + bars
    limits = _limits(values, [p.value for p in members], clip=not higher)
    return Panel(
        metric=metric,
        label=label,
        trials=trials,
        front=members,
        best=tuple(sorted((members[i] for i in chosen), key=lambda point: -point.kept)),
        uniform=tuple(point for point in trials if point.origin == "uniform"),
        seeds=tuple(point for point in trials if point.origin == "seed"),
        dense=dense[0] if dense else None,
        test=test,
        limits=limits,
        span=_padded(min(p.kept for p in trials), max(p.kept for p in trials)) if trials else (0.0, 100.0),
        beyond=tuple(point for point in trials if point.value > limits[1]),
    )


def _points(rows: Iterable[tuple[TrialRow, Score | None]], measure: Measure) -> tuple[Point, ...]:
    found = []
    for row, score in rows:
        measured = measure(score) if score is not None else None
        if measured is not None:
            found.append(Point(row.number, 100 * row.budget_model, *measured, row.origin, row.feasible))
    return tuple(found)


def _limits(values: list[float], members: list[float], clip: bool) -> tuple[float, float]:
    """Ends of the value axis. Clipping never hides more than half of the front."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if clip:
        median = float(np.median(members)) if members else low
        high = min(high, max(low + SHOWN_EXCESS, median))
    return _padded(low, high)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = MARGIN * (high - low) or 0.05 * max(abs(low), 1.0)
    return low - pad, high + pad
