"""The table of further scores: a column for each, and none where nothing further was scored."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

from fakes import OBJECTIVES, TARGETS, cost_model, score_of
from rich.console import Console

from actors.samples import pack_floats
from actors.types import Allocation, BiasScore, KlScore, Score, TextScore
from search.further import further_cells, further_table
from search.records import Evaluation, StudySummary, TrialRow


def corpus(nll: float) -> TextScore:
    return TextScore("c4@32", nats=100 * nll, tokens=100, stderr=0.25)


def row(number: int, allocation: Allocation, score: Score) -> TrialRow:
    budgets = cost_model().budgets(allocation)
    return TrialRow(
        number=number,
        state="COMPLETE",
        origin="tpe",
        allocation=allocation,
        budget_linear=budgets["budget.linear"],
        budget_model=budgets["budget.model"],
        budget_bytes=budgets["budget.bytes"],
        values=(budgets["budget.model"], score.text.nll),
        score=score,
        seconds=1.0,
        replica="r",
        reason=None,
        copied_from=None,
    )


def summary(rows: tuple[TrialRow, ...], evaluations: tuple[Evaluation, ...] = ()) -> StudySummary:
    front = tuple(row.number for row in rows if not row.allocation.is_dense)
    now = {"test": "f"}
    return StudySummary("s", "m", OBJECTIVES, rows, front, 0.0, (1.0, 9.0), evaluations, {}, fingerprints=now)


DENSE, HALF = Allocation.dense(TARGETS), cost_model().uniform(0.5)


def test_nothing_further_is_no_table() -> None:
    assert further_cells(summary((row(0, DENSE, score_of(DENSE)), row(1, HALF, score_of(HALF))))) is None


def test_every_further_metric_is_a_column_and_the_dense_model_comes_first() -> None:
    dense = replace(score_of(DENSE), corpora={"c4": corpus(3.0)})
    half = replace(score_of(HALF), corpora={"c4": corpus(3.5)}, kl=KlScore(8, 12.5, 100, 0.01))
    crows = BiasScore(4, {"stereotype": 0.75}, {"stereotype": pack_floats([1.0, 1.0, 1.0, 0.0])})
    half = replace(half, bias={"crows_pairs": crows})
    test = replace(half, split="test", bias={}, corpora={"c4": corpus(3.75)}, kl=None)
    rows = (row(0, DENSE, dense), row(1, HALF, half))
    cells = further_cells(summary(rows, (Evaluation(1, "factors", "test", "f", test),)))
    assert cells is not None
    assert cells.columns == (
        "trial",
        "kept",
        "nll.c4",
        "kl",
        "bias.crows_pairs.stereotype",
        "test nll.c4",
    )
    searched = further_cells(summary(rows), test=False)
    assert searched is not None
    assert searched.columns == cells.columns[:-1]
    kept = f"{100 * rows[1].budget_model:.1f}%"
    assert cells.rows == (
        ("0", "100.0%", "3.000±0.250", "", "", ""),
        ("1", kept, "3.500±0.250", "0.125±0.010", "75.0±25.0", "3.750±0.250"),
    )


def test_operations_alone_are_a_table() -> None:
    rows = (row(0, DENSE, score_of(DENSE)), row(1, HALF, score_of(HALF)))
    counted = (replace(rows[0], macs=12_345_678), replace(rows[1], macs=9_000_000))
    cells = further_cells(replace(summary(counted), macs_length=512))
    assert cells is not None
    assert cells.columns == ("trial", "kept", "MACs@512")
    assert [found[2] for found in cells.rows] == ["12.35 M", "9.00 M"]


def test_a_terminal_of_a_hundred_columns_shows_every_metric_whole() -> None:
    values = {"lms": 0.5, "stereotype": 0.5, "icat": 0.5}
    bias = BiasScore(4, values, dict.fromkeys(values, pack_floats([1.0, 0.0])))
    pairs = {"stereotype": 0.5, "likelihood_diff": 12.5}
    crows = BiasScore(4, pairs, dict.fromkeys(pairs, pack_floats([1.0, 0.0])))
    found = replace(
        score_of(DENSE), bias={"crows_pairs": crows, "stereoset": bias}, corpora={"c4": corpus(3)}
    )
    shown = further_table(replace(summary((replace(row(0, DENSE, found), macs=10**8),)), macs_length=512))
    console = Console(width=100, file=StringIO())
    console.print(shown)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert all(word in text for word in ("likelihood_", "icat", "50.0±50.0", "100.00 M", "12.500"))
