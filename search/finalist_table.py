"""Finalists as a table: search score, test score and what refining made of them, side by side."""

from __future__ import annotations

from actors.types import Score
from search.cells import Cells
from search.findings import loss_cell, paired, percent, perplexity
from search.panels import dense_row
from search.records import FACTORS, StudySummary, TrialRow

COLUMNS = (
    *("trial", "kept", "nll", "test nll", "test ppl"),
    *("refined: nll", "test nll", "test ppl", "change on test", "variant"),
)


def finalist_cells(summary: StudySummary, numbers: tuple[int, ...] = ()) -> Cells | None:
    """Search score, test score and refined scores side by side, under the dense model; a row a variant.

    Of the trials named; none named: of those that were refined. None where there are none.
    """
    refined: dict[int, list[str]] = {}
    for evaluation in summary.evaluations:
        names = refined.setdefault(evaluation.trial, [])
        current = summary.fingerprints.get(evaluation.split) == evaluation.fingerprint
        if current and evaluation.variant not in (FACTORS, *names):
            names.append(evaluation.variant)
    wanted = [row for row in summary.rows if (row.number in numbers if numbers else refined.get(row.number))]
    if not wanted:
        return None
    reference = dense_row(summary)
    rows = [(reference, "")] if reference is not None else []
    for row in sorted(wanted, key=lambda row: -row.budget_model):
        rows += [(row, name) for name in refined.get(row.number) or [""]]
    cells = tuple(_row(summary, row, variant) for row, variant in rows)
    return Cells(COLUMNS, cells, "± is one standard error; changes are paired, window by window")


def _row(summary: StudySummary, row: TrialRow, variant: str) -> tuple[str, ...]:
    test = summary.test_score(row.number)
    cells = [str(row.number), percent(row.budget_model), loss_cell(row.score), *_losses(test)]
    if not variant:
        return (*cells, "", "", "", "", "")
    own = summary.evaluated(row.number, "search", variant)
    after = summary.test_score(row.number, variant)
    change = "" if test is None or after is None else paired(test, after, "nll")
    return (*cells, loss_cell(own), *_losses(after), change, variant)


def _losses(score: Score | None) -> tuple[str, str]:
    return loss_cell(score), "" if score is None else perplexity(score.text.nll)
