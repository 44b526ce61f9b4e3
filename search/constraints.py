"""Constraints: bounds that a trial must keep to beside its objectives, in Optuna's own form.

A violation is a number, feasible at 0 or below. It is kept with the trial as the system attribute
`constraints:<metric>`, where `optuna.Trial.set_constraint` puts it: samplers, `best_trials` and dashboards
see it. Samplers add up the violations of a trial, so each is of a size that compares with the others: nats,
shares of 1, and for bytes the logarithm of how many times too many they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.bias import BIAS_SETS
from actors.tasks import task_of

if TYPE_CHECKING:
    from search.inputs import ScoringSection
    from search.records import TrialRow

ATTRIBUTE = "constraints:"
"""Beginning of the system attributes; Optuna's, which has no public name for it."""

COSTS = ("bytes", "budget.model", "budget.linear", "budget.bytes")
"""Known from the ranks alone. The dense model is the largest there is, so it may violate these."""

_PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class _Kind:
    """A metric's bound: the `least` value that is allowed or the most, and the `range` it makes sense in."""

    least: bool
    low: float
    high: float
    range: str

    def allows(self, bound: float) -> bool:
        return self.low <= bound <= self.high


_TINY = math.ulp(0.0)  # above 0
_MOST_SHARE = _Kind(False, _TINY, 1.0, "above 0 and at most 1")
_LEAST_SHARE = _Kind(True, _TINY, 1.0, "above 0 and at most 1")
_MOST_NATS = _Kind(False, _TINY, math.inf, "above 0")
_LEAST_NATS = _Kind(True, -math.inf, math.inf, "finite")
_MOST_TIMES = _Kind(False, 1.0, math.inf, "1 or more")
_TASK = {"acc": _LEAST_SHARE, "acc_norm": _LEAST_SHARE, "margin": _LEAST_NATS}
_BIAS = {
    "stereotype": _MOST_SHARE,
    "likelihood_diff": _MOST_NATS,
    "lms": _LEAST_SHARE,
    "icat": _LEAST_SHARE,
}

# What a config must ask for before a metric of that name is scored.
_NEEDS = {
    "kl": "scoring.kl_top_k",
    "nll": "scoring.corpora",
    _PERPLEXITY: "scoring.corpora",
    "reasoning": "scoring.tasks",
    "bias": "scoring.bias",
}


@dataclass(frozen=True)
class Constraint:
    """A bound on one metric; which side of it is allowed follows from the metric."""

    metric: str
    bound: float

    @property
    def least(self) -> bool:
        """Whether the bound is the least value that is allowed; else it is the most."""
        root, _, rest = self.metric.partition(".")
        kind = rest.rpartition(".")[2]
        return (root == "reasoning" and _TASK[kind].least) or (root == "bias" and _BIAS[kind].least)

    @property
    def is_cost(self) -> bool:
        return self.metric in COSTS

    @property
    def _logarithmic(self) -> bool:
        return self.metric == "bytes" or self.metric.partition(".")[0] == _PERPLEXITY

    def violation(self, metrics: Mapping[str, float]) -> float:
        """By how much `metrics`, named as objectives are, pass the bound; 0 or below where they do not.

        Perplexity: nll - log(bound), nats/token. Bytes: log(bytes / bound). All others: in their own unit.
        """
        if self.metric == "bytes":
            return math.log(metrics["bytes"] / self.bound)
        if self._logarithmic:
            return metrics[self.metric.replace(_PERPLEXITY, "nll", 1)] - math.log(self.bound)
        excess = metrics[self.metric] - self.bound
        return -excess if self.least else excess

    def told(self, violation: float) -> str:
        """The value behind a violation next to its bound, for people."""
        if self._logarithmic:
            value = self.bound * math.exp(min(violation, 700.0))  # exp overflows from 709 on
        else:
            value = self.bound - violation if self.least else self.bound + violation
        side = ("<" if self.least else ">") if violation > 0 else (">=" if self.least else "<=")
        digits = ",.0f" if self.metric == "bytes" else ".4g"
        return f"{self.metric} {value:{digits}} {side} {self.bound:{digits}}"

    def __str__(self) -> str:
        digits = ",.0f" if self.metric == "bytes" else "g"
        return f"{self.metric} at {'least' if self.least else 'most'} {self.bound:{digits}}"


def violations(constraints: Iterable[Constraint], metrics: Mapping[str, float]) -> dict[str, float]:
    """The violation of each constraint by its metric."""
    return {each.metric: each.violation(metrics) for each in constraints}


def total(violations: Mapping[str, float]) -> float:
    """The sum of those above 0, by which samplers rank trials that are not feasible."""
    return sum(value for value in violations.values() if value > 0)


def feasible(violations: Mapping[str, float]) -> bool:
    """Whether none is above 0; as Optuna sees it, a trial without any recorded is feasible."""
    return all(value <= 0 for value in violations.values())


def broken(constraints: Iterable[Constraint], row: TrialRow) -> str:
    """What a trial violates, for people; empty where it keeps to every constraint."""
    passed = {name: value for name, value in row.constraints.items() if value > 0}
    return ", ".join(each.told(passed[each.metric]) for each in constraints if each.metric in passed)


def dense_notes(constraints: Iterable[Constraint], dense: TrialRow) -> list[str]:
    """What to say where the dense model violates a bound itself; of costs it may."""
    return [
        f"constraints.{each.metric}: the dense model itself has {each.told(dense.constraints[each.metric])}; "
        "compressed models are seldom better, so the search may find none that keeps to it"
        for each in constraints
        if not each.is_cost and dense.constraints.get(each.metric, 0.0) > 0
    ]


def constraint_mistakes(constraints: Mapping[str, float], scoring: ScoringSection) -> list[str]:
    """Metrics that are unknown or not scored here, and bounds that make no sense."""
    offered = _offered(scoring)
    found = []
    for name, bound in constraints.items():
        kind = offered.get(name)
        if kind is None:
            needed = _NEEDS.get(name.partition(".")[0])
            why = f"is not scored by this config (see {needed})" if needed else "is unknown"
            found.append(f"constraints.{name}: {name!r} {why}; one of {', '.join(offered)}")
        elif not kind.allows(bound):
            found.append(f"constraints.{name}: {bound!r} is no bound of it; it must be {kind.range}")
    return found


def _offered(scoring: ScoringSection) -> dict[str, _Kind]:
    """Every metric that this config can bound."""
    found = {"bytes": _MOST_TIMES, **dict.fromkeys(COSTS[1:], _MOST_SHARE)}
    for suffix in ("", *(f".{corpus.name}" for corpus in scoring.corpora)):
        found |= {f"{_PERPLEXITY}{suffix}": _MOST_TIMES, f"nll{suffix}": _MOST_NATS}
    if scoring.kl_top_k is not None:
        found["kl"] = _MOST_NATS
    for task in scoring.tasks:
        for kind, each in _TASK.items():
            if kind != "acc_norm" or task_of(task.name, task.format).normalised:
                found |= {f"reasoning.{kind}": each, f"reasoning.{task.name}.{kind}": each}
    for chosen in scoring.bias:
        found |= {f"bias.{chosen.name}.{kind}": _BIAS[kind] for kind in BIAS_SETS[chosen.name].metrics}
    return found


def flat(value: Any) -> Any:
    """Bounds by dotted metric, sorted; `--set constraints.reasoning.acc=...` nests them."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for name, bound in value.items():
        if isinstance(bound, Mapping):
            found |= {f"{name}.{rest}": inner for rest, inner in flat(bound).items()}
        else:
            found[name] = bound
    return dict(sorted(found.items(), key=lambda pair: str(pair[0])))
