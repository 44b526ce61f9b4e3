"""What the front's own table has no room for: MACs, and a column for each further metric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from actors.types import Score
from search.cells import Cells, CellsTable, cells_table, in_lines
from search.findings import metric_cell
from search.panels import dense_row, front_rows
from search.records import StudySummary

SHOWN = ("kl", "nll.", "bias.")
"""Beginnings of the metrics that are shown here."""


def further_cells(summary: StudySummary, test: bool = True) -> Cells | None:
    """MACs and further metrics of the front by falling budget, under the dense model; None without any.

    MACs are millions a token, `MACs@LENGTH` where it attends to that many positions.
    Shares of bias sets are in %. Of the search split, then, where
    asked for, of the test split as far as members were scored on it.
    """
    reference = dense_row(summary)
    rows = front_rows(summary)
    if reference is not None and reference not in rows:
        rows = [reference, *rows]
    tests = {row.number: summary.test_score(row.number) if test else None for row in rows}
    columns = [(name, False) for name in _names(row.score for row in rows)]
    columns += [(name, True) for name in _names(tests.values())]
    counted = any(row.macs is not None for row in rows)
    if not columns and not counted:
        return None
    titles = [f"test {name}" if tested else name for name, tested in columns]
    cells = [
        (
            str(row.number),
            f"{100 * row.budget_model:.1f}%",
            *([f"{row.macs / 1e6:,.2f} M" if row.macs is not None else ""] if counted else []),
            *(metric_cell(tests[row.number] if tested else row.score, name) for name, tested in columns),
        )
        for row in rows
    ]
    macs = [f"MACs@{summary.macs_length}"] if counted else []
    return Cells(("trial", "kept", *macs, *titles), tuple(cells), "")


def further_table(summary: StudySummary) -> CellsTable | None:
    """The same for a terminal, of the search split: names are broken into lines, or few would fit."""
    cells = further_cells(summary, test=False)
    if cells is None:
        return None
    broken = replace(cells, columns=tuple(map(in_lines, cells.columns)))
    return cells_table(broken, "more about the front, search split", elsewhere="report.html has them")


def _names(scores: Iterable[Score | None]) -> list[str]:
    """The further metrics that any of the scores has, in the order they are met."""
    met = dict.fromkeys(name for score in scores if score is not None for name in score.metrics)
    return [name for name in met if name.startswith(SHOWN)]
