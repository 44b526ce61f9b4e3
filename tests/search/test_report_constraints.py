"""The report of a made-up study with a constraint: what violates it is marked, and is in no front."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from made_up import DENSE_NLL, TARGETS, study

from search.constraints import Constraint
from search.figures import hypervolume_figure, panel_figure
from search.findings import front_cells
from search.panels import panels
from search.pareto import front, hypervolume
from search.records import StudySummary
from search.report import headline, write_report

BOUND = Constraint("perplexity", 60.0)


def bounded(limit: float = BOUND.bound) -> StudySummary:
    """The same study where a perplexity is the most; the front is of those that keep to it."""
    whole, constraint = study(), Constraint("perplexity", limit)
    rows = [
        dataclasses.replace(row, constraints={"perplexity": row.score.text.nll - math.log(limit)})
        if row.score
        else row
        for row in whole.rows
    ]
    members = [row for row in rows if row.values is not None and row.feasible]
    chosen = [members[i].number for i in front([row.values for row in members])] if members else []
    return dataclasses.replace(whole, rows=tuple(rows), front=tuple(chosen), constraints=(constraint,))


def test_trials_that_violate_a_constraint_are_marked_everywhere(tmp_path: Path) -> None:
    summary = bounded()
    passed = [row for row in summary.rows if row.finished and not row.feasible]
    finished = [row for row in summary.rows if row.finished]
    assert 10 < len(passed) < len(finished) - 10
    write_report(summary, tmp_path, TARGETS)
    table = pq.read_table(tmp_path / "trials.parquet")
    feasible = [row.feasible for row in summary.rows]
    assert table["feasible"].to_pylist() == feasible
    recorded = table["constraint.perplexity"].to_pylist()
    assert recorded == [row.constraints.get("perplexity") for row in summary.rows]
    assert json.loads((tmp_path / "front.json").read_text())["constraints"] == {"perplexity": 60.0}
    text = (tmp_path / "report.html").read_text()
    assert "Trials that violate a constraint" in text
    assert f"{len(passed)} of {len(finished)} finished trials" in text
    nearest = min(passed, key=lambda row: row.constraints["perplexity"])
    assert html.escape(BOUND.told(nearest.constraints["perplexity"])) in text
    loss, _ = panels(summary)
    assert {point.trial for point in loss.infeasible} == {row.number for row in passed}
    traces = {trace.name: trace for trace in panel_figure(loss).data}
    assert len(traces["violates a constraint"].x) == len(passed)


def test_the_hypervolume_figure_is_of_feasible_trials() -> None:
    figure = hypervolume_figure(bounded())
    assert figure is not None
    rows = [row for row in bounded().rows if row.finished]
    assert list(figure.data[0].x) == [row.number for row in rows]
    members = [row.values for row in rows if row.feasible]
    assert figure.data[0].y[-1] == pytest.approx(hypervolume(members, (1.01, 6.0)))


def test_a_dense_model_that_violates_a_constraint_is_marked() -> None:
    cells = front_cells(bounded(DENSE_NLL))
    assert cells.rows[0][0] == "✗0"
    assert "✗ violates a constraint" in cells.note
    [line] = headline(bounded(DENSE_NLL))
    assert line.startswith(
        "No trial keeps to every constraint yet; the nearest is trial 0: perplexity 29.96 >"
    )
