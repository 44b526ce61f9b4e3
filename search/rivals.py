"""Which finished trials a new one is held against while it is scored in stages (`actors.stages`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.types import Rival, Score
from search.records import Objective, TrialRow

# Trials that someone asked for by name: they are scored to the end, whatever dominates them.
ASKED_FOR = ("dense", "uniform", "seed", "warm", "enqueued")

# The strongest of a front's members that are no larger are those of nearly the same size: more of them only
# make a job heavier (4 bytes a window and objective each) and a stop by chance likelier.
MOST_RIVALS = 8


def rivals_of(
    budgets: Mapping[str, float], members: Sequence[TrialRow], objectives: Sequence[Objective]
) -> tuple[Rival, ...]:
    """The members of a front that are no larger than `budgets` in every cost objective, nearest first.

    A member whose window values were not kept is left out.
    """
    costs = [objective.name for objective in objectives if objective.name in budgets]
    others = [objective.name for objective in objectives if objective.name not in budgets]
    found = []
    for row in members:
        assert row.values is not None
        values = dict(zip((objective.name for objective in objectives), row.values, strict=True))
        windows = _windows(row.score, others)
        if windows is not None and all(values[name] <= budgets[name] for name in costs):
            found.append(([values[name] for name in costs], Rival(row.number, windows)))
    found.sort(key=lambda pair: pair[0], reverse=True)
    return tuple(rival for _, rival in found[:MOST_RIVALS])


def _windows(score: Score | None, metrics: Sequence[str]) -> dict[str, str] | None:
    """The packed window values of each metric; None where some are missing."""
    if score is None:
        return None
    packed = {"nll": score.text.windows, "kl": score.kl.windows if score.kl else ""}
    chosen = {name: packed[name] for name in metrics}
    return chosen if all(chosen.values()) else None
