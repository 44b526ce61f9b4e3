"""Which trials of a study a command means: by number, by size, by loss, or the whole front."""

from __future__ import annotations

from actors.types import RankfrontError
from search.panels import front_rows
from search.records import StudySummary, TrialRow


def chosen(
    summary: StudySummary,
    trial: int | None = None,
    budget: float | None = None,
    max_nll: float | None = None,
    all_front: bool = False,
) -> list[TrialRow]:
    """The scored trials that one of the choices names; `budget` is of the model's parameters, `max_nll` in
    nats/token on the search split. The whole front is without the dense model, which is there already.

    Raises:
        RankfrontError: none or several of the choices; no such trial, or no score of it; no such front point.
    """
    choices = (trial is not None, budget is not None, max_nll is not None, all_front)
    if sum(choices) != 1:
        raise RankfrontError("give one of --trial N, --budget B, --max-nll X and --all-front")
    if trial is not None:
        return [_numbered(summary, trial)]
    rows = front_rows(summary)
    if budget is not None:
        return [_under_budget(rows, budget)]
    if max_nll is not None:
        return [_under_loss(rows, max_nll)]
    members = [row for row in rows if not row.allocation.is_dense]
    if not members:
        raise RankfrontError("--all-front: the front holds no compressed model")
    return members


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


def _under_budget(rows: list[TrialRow], budget: float) -> TrialRow:
    """The front point of least loss among those at or under a budget."""
    under = [row for row in rows if row.budget_model <= budget]
    if not under:
        raise RankfrontError(
            f"--budget {budget}: no front point at or under it; "
            + _reach([row.budget_model for row in rows], ".3f")
        )
    return min(under, key=_nll)


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
