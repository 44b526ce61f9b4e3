"""Which trials of a study a command means: by number, by size, by loss, or the whole front.

The best of many trials by the search text is partly the one that this text flatters. So where it cannot tell
the best at a budget from others (`contenders`), a larger text that no trial was proposed by chooses among
them, once they are scored on it: the choice split, which `search.finalists` asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.types import RankfrontError
from search.panels import front_rows
from search.records import StudySummary, TrialRow

OPTIONS = ("--trial N", "--budget B", "--max-nll X", "--all-front")
"""How a command line names the choices."""
TEXT_LOSSES = ("nll", "kl")
# Trials, the best by the search text, among which the larger text may choose.
CANDIDATES = 4
# Paired standard errors from which on two losses are told apart.
APART = 2.0


def chosen(
    summary: StudySummary,
    trial: int | None = None,
    budget: float | None = None,
    max_nll: float | None = None,
    all_front: bool = False,
    options: Sequence[str] = OPTIONS,
) -> list[TrialRow]:
    """The scored trials that one of the choices names; `budget` is of the model's parameters, `max_nll` in
    nats/token on the search split. The whole front is without the dense model, which is there already.
    `options` are those that the caller's command has.

    Raises:
        RankfrontError: none or several of the choices; no such trial, or no score of it; a budget that is no
            share; no such front point.
    """
    choices = (trial is not None, budget is not None, max_nll is not None, all_front)
    if sum(choices) != 1:
        raise RankfrontError(f"give one of {', '.join(options[:-1])} and {options[-1]}")
    if trial is not None:
        return [_numbered(summary, trial)]
    rows = front_rows(summary)
    if budget is not None:
        check_budget(budget)
        return [_best(summary, contenders(summary, budget))]
    if max_nll is not None:
        return [_under_loss(rows, max_nll)]
    members = [row for row in rows if not row.allocation.is_dense]
    if not members:
        raise RankfrontError("--all-front: the front holds no compressed model")
    return members


def check_budget(budget: float) -> None:
    """Raises RankfrontError where a budget is no share of the model's parameters."""
    if not 0 < budget <= 1:
        raise RankfrontError(f"--budget {budget:g}: a share above 0, at most 1; 0.9 is 90% of the parameters")


def _numbered(summary: StudySummary, trial: int) -> TrialRow:
    row = next((row for row in summary.rows if row.number == trial), None)
    if row is None:
        there = f"trials 0..{len(summary.rows) - 1}" if summary.rows else "no trial yet"
        raise RankfrontError(f"--trial {trial}: the study has {there}")
    if not row.finished or row.score is None:
        raise RankfrontError(
            f"--trial {trial}: it is {row.state}" + (f": {row.reason}" if row.reason else "")
        )
    return row


def contenders(summary: StudySummary, budget: float) -> list[TrialRow]:
    """The front point of least loss among those at or under a budget, and trials as good by the search text.

    In order of their loss, `CANDIDATES` at most, each allocation once. Where the front is of a loss on text
    these are feasible trials on it or behind it; a front of other objectives has its own reasons, and gives
    its members alone.

    Raises:
        RankfrontError: no front point is at or under it.
    """
    rows = front_rows(summary)
    under = [row for row in rows if row.budget_model <= budget]
    if not under:
        raise RankfrontError(
            f"--budget {budget}: no front point at or under it; "
            + _reach([row.budget_model for row in rows], ".3f")
        )
    first = min(under, key=_nll)
    if any(objective.name in TEXT_LOSSES for objective in summary.objectives):
        scored = (row for row in summary.rows if row.finished and row.feasible and row.score is not None)
        under = [row for row in scored if row.budget_model <= budget]
    different = {row.allocation.key: row for row in (*reversed(under), first)}
    near = [row for row in different.values() if row is first or _as_good(row, first)]
    return sorted(near, key=lambda row: (row is not first, _nll(row)))[:CANDIDATES]


def untold(summary: StudySummary, budget: float) -> list[int]:
    """Numbers of the trials at a budget that the search text cannot tell apart, where the larger text was not
    asked about all of them."""
    near = contenders(summary, budget)
    asked = all(summary.choice_score(row.number) is not None for row in near)
    return [] if asked or len(near) == 1 else [row.number for row in near]


def _as_good(row: TrialRow, best: TrialRow) -> bool:
    """Whether the search text does not tell that a trial is worse; of scores without windows it does."""
    assert row.score is not None
    assert best.score is not None
    try:
        gap = row.score.minus(best.score, "nll")
    except RankfrontError:
        return False
    return gap.mean <= 0 or not gap.beyond(APART)


def _best(summary: StudySummary, rows: list[TrialRow]) -> TrialRow:
    """The trial of least loss on the larger text among those that are scored on it; the first where that one
    is not."""
    asked = [(row, summary.choice_score(row.number)) for row in rows]
    scored = [(score.text.nll, row) for row, score in asked if score is not None]
    return min(scored, key=lambda found: found[0])[1] if asked[0][1] is not None else rows[0]


def _under_loss(rows: list[TrialRow], limit: float) -> TrialRow:
    """The smallest front point among those at or under a loss."""
    under = [row for row in rows if _nll(row) <= limit]
    if not under:
        raise RankfrontError(
            f"--max-nll {limit}: no front point at or under it; " + _reach([_nll(row) for row in rows], ".4f")
        )
    return min(under, key=lambda row: (row.budget_model, _nll(row)))


def _nll(row: TrialRow) -> float:
    assert row.score is not None
    return row.score.text.nll


def _reach(values: list[float], digits: str) -> str:
    return f"the front reaches down to {min(values):{digits}}" if values else "the front is empty"
