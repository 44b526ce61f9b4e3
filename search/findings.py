"""What a study found, for people: sentences, and one table shown in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from actors.types import RankfrontError, Score
from search.cells import Cells, CellsTable, cells_table, in_lines
from search.constraints import broken
from search.panels import dense_row, front_rows, infeasible_rows
from search.records import StudySummary, TrialRow

LADDER = (0.95, 0.9, 0.8, 0.7, 0.6)
"""Model budgets the headline speaks about: those at which published results are compared."""

LARGEST_WRITTEN = math.log(1e5)
"""nats/token from which a perplexity is written as a power of e: digits mean nothing there, exp overflows."""

COLUMNS = ("trial", "kept", "nll", "ppl", "Δ dense", "acc", "test nll", "test ppl", "test acc")
SPARE = ("test acc", "test ppl", "origin", "Δ dense", "acc", "test nll", "ppl")
"""What a terminal that is too narrow goes without, least worth first."""

SAME = "≈"
INFEASIBLE = "✗"
INFEASIBLE_NOTE = "✗ violates a constraint"
SAME_NOTE = "≈ within two standard errors of the row above, of the differences window by window where known"


def headline(summary: StudySummary) -> list[str]:
    """A sentence for each budget of the ladder: what the best front point at or under it costs.

    The best has the lowest search-split loss; a point that answered the rung before is not repeated. The
    test split, which chose nothing, is added where both the point and the dense model were scored on it.
    """
    sentences, told = _none_feasible(summary), set()
    reference = dense_row(summary)
    for rung in LADDER:
        under = [row for row in front_rows(summary) if row.budget_model <= rung]
        if not under:
            continue
        best = min(under, key=lambda row: row.score.text.nll if row.score else math.inf)
        if best.number not in told:
            told.add(best.number)
            sentences.append(_sentence(best, reference, summary))
    return sentences


def _none_feasible(summary: StudySummary) -> list[str]:
    """A sentence where trials were scored and none of them keeps to every constraint."""
    found = infeasible_rows(summary)
    if not found or any(row.finished and row.feasible for row in summary.rows):
        return []
    nearest = f"trial {found[0].number}: {broken(summary.constraints, found[0])}"
    return [f"No trial keeps to every constraint yet; the nearest is {nearest}."]


def front_cells(summary: StudySummary) -> Cells:
    """The front by falling budget, under the dense model where that is not itself a member."""
    reference = dense_row(summary)
    rows = front_rows(summary)
    if reference is not None and reference not in rows:
        rows = [reference, *rows]
    tests = {row.number: summary.test_score(row.number) for row in rows}
    tested = [test for test in tests.values() if test is not None]
    tasks = any(row.score and row.score.tasks for row in rows)
    wanted = {
        "acc": tasks,
        "test nll": bool(tested),
        "test ppl": bool(tested),
        "test acc": any(t.tasks for t in tested),
    }
    keep = [i for i, name in enumerate(COLUMNS) if wanted.get(name, True)]
    own = further_objectives(summary)
    cells, above = [], None
    for row in rows:
        full = _cells(row, above, reference, tests[row.number])
        cells.append((*(full[i] for i in keep), *(objective_cell(row, name) for name in own), row.origin))
        above = row.score
    found = [
        note
        for sign, note in ((SAME, SAME_NOTE), (INFEASIBLE, INFEASIBLE_NOTE))
        if any(sign in cell for row_cells in cells for cell in row_cells)
    ]
    return Cells((*(COLUMNS[i] for i in keep), *own, "origin"), tuple(cells), "; ".join(found))


def front_table(summary: StudySummary) -> CellsTable:
    """The front for a terminal: trial, kept and loss at any width, of the rest what there is room for."""
    title = f"{summary.study}: {len(summary.front)} on the front"
    own = [in_lines(name) for name in further_objectives(summary)]
    cells = front_cells(summary)
    cells = replace(cells, columns=tuple(map(in_lines, cells.columns)))
    return cells_table(
        cells, title, ("origin",), {"origin": 12}, (*SPARE, *reversed(own)), "report.html has them"
    )


def further_objectives(summary: StudySummary) -> tuple[str, ...]:
    """Objectives that neither a column of the front nor one of the further table shows."""
    shown = ("budget.model", "nll", "reasoning.acc")
    return tuple(
        objective.name
        for objective in summary.objectives
        if objective.name not in shown and objective.name.startswith(("budget.", "reasoning."))
    )


def percent(share: float) -> str:
    """A share as a percentage with at most one decimal: 0.9 -> `90%`, 0.873 -> `87.3%`."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def perplexity(nll: float) -> str:
    """exp(nll) in about four digits; far from any use, the power itself."""
    return (
        f"e^{nll:.1f}" if nll >= LARGEST_WRITTEN else f"{math.exp(nll):,.{2 if nll < math.log(10) else 1}f}"
    )


def error_bar(error: float, digits: int, sign: str = "±") -> str:
    """A standard error, to stand behind its value; empty where it is none: one window or example has no
    spread."""
    return f"{sign}{error:.{digits}f}" if math.isfinite(error) else ""


def loss_cell(score: Score | None) -> str:
    """The loss with its standard error; empty where there is no score."""
    return f"{score.text.nll:.3f}{error_bar(score.text.stderr, 3)}" if score else ""


def metric_cell(score: Score | None, name: str) -> str:
    """A metric with its standard error, shares in %; empty where there is none."""
    if score is None or name not in score.metrics:
        return ""
    value, error, digits = score.metrics[name], score.stderrs[name], 3
    if name.endswith((".acc", ".acc_norm")) or (name.startswith("bias.") and not name.endswith("_diff")):
        value, error, digits = 100 * value, 100 * error, 1
    return f"{value:.{digits}f}{error_bar(error, digits)}"


def objective_cell(row: TrialRow, name: str) -> str:
    """A budget in %, or a metric."""
    if name.startswith("budget."):
        return f"{100 * getattr(row, name.replace('.', '_')):.1f}%"
    return metric_cell(row.score, name)


def paired(before: Score, after: Score, metric: str) -> str:
    """What a metric changed by, of the same windows or examples, with its standard error."""
    try:
        gap = after.minus(before, metric)
    except RankfrontError:  # a score from before single values were kept
        return "not kept"
    return f"{gap.mean:+.4f}{error_bar(gap.stderr, 4, ' ± ')}"


def _sentence(row: TrialRow, reference: TrialRow | None, summary: StudySummary) -> str:
    assert row.score is not None
    kept = f"Keeping {percent(row.budget_model)} of the parameters"
    if reference is None or reference.score is None:
        return (
            f"{kept} gives {row.score.text.nll:.2f} nats/token (perplexity {perplexity(row.score.text.nll)})."
        )
    text = f"{kept} {_cost(row.score, reference.score, 'perplexity ')}"
    test, dense = summary.test_score(row.number), summary.test_score(reference.number)
    if test is not None and dense is not None:
        text += f"; on the test split it {_cost(test, dense, '')}"
    return text + "."


def _cost(score: Score, dense: Score, unit: str) -> str:
    """`costs 0.31 nats/token (perplexity 30.1 -> 41.0)`, with the accuracy where tasks were scored."""
    difference = score.text.nll - dense.text.nll
    verb = "costs" if difference >= 0 else "gains"
    change = f"{perplexity(dense.text.nll)} -> {perplexity(score.text.nll)}"
    text = f"{verb} {abs(difference):.2f} nats/token ({unit}{change}"
    if score.tasks and dense.tasks:
        before, after = (100 * s.metrics["reasoning.acc"] for s in (dense, score))
        text += f", accuracy {before:.1f}% -> {after:.1f}%"
    return text + ")"


def _cells(
    row: TrialRow, above: Score | None, reference: TrialRow | None, test: Score | None
) -> Sequence[str]:
    score = row.score
    assert score is not None
    difference = score.text.nll - reference.score.text.nll if reference and reference.score else math.nan
    same = SAME if above is not None and _indistinct(score, above) else ""
    return (
        str(row.number) if row.feasible else f"{INFEASIBLE}{row.number}",
        f"{100 * row.budget_model:.1f}%",
        same + loss_cell(score),
        perplexity(score.text.nll),
        f"{difference:+.3f}" if math.isfinite(difference) else "",
        _accuracy(score),
        loss_cell(test),
        perplexity(test.text.nll) if test else "",
        _accuracy(test),
    )


def _indistinct(one: Score, other: Score) -> bool:
    """Of losses on the same windows by their paired differences; else as if they were independent."""
    try:
        return not one.minus(other, "nll").beyond(2)
    except RankfrontError:
        error = math.hypot(one.text.stderr, other.text.stderr)
        return abs(one.text.nll - other.text.nll) < 2 * error


def _accuracy(score: Score | None) -> str:
    if score is None or not score.tasks:
        return ""
    return f"{100 * score.metrics['reasoning.acc']:.1f}{error_bar(100 * score.reasoning_stderr, 1)}"
