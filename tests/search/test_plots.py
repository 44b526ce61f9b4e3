"""What the pictures of a made-up study show."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

from made_up import DENSE_NLL, MODULES, TARGETS, empty_study, study, trial
from matplotlib.image import imread

from search.figures import hypervolume_figure, panel_figure, rank_figure
from search.panels import SHOWN_EXCESS, panels, perplexity_ticks
from search.plots import SIZE, front_png
from search.records import Objective


def decoded(png: bytes) -> Any:
    return imread(io.BytesIO(png))


def test_picture_without_tasks_and_without_trials() -> None:
    assert len(panels(study(tasks=False))) == 1
    for summary in (study(tasks=False), empty_study()):
        assert decoded(front_png(summary)).shape[:2] == (SIZE[1], SIZE[0])
    name = "costs $5 and $x_{"  # half a formula
    assert front_png(dataclasses.replace(study(trials=5), study=name, model="m" * 500))


def test_broken_trials_do_not_squash_the_axis() -> None:
    loss, accuracy = panels(study())
    assert loss.limits[0] < DENSE_NLL
    assert loss.limits[1] < DENSE_NLL + SHOWN_EXCESS + 0.2
    assert {point.trial for point in loss.beyond} >= {40, 80}
    assert "above the axis" in loss.note
    assert "12.8" in loss.note
    assert not accuracy.beyond
    assert not set(loss.beyond) & set(loss.shown(loss.trials))


def test_an_axis_never_hides_most_of_the_front() -> None:
    rows = [trial(0, 1.0, DENSE_NLL, "dense"), *(trial(i, 1 - i / 10, 8.0 + i) for i in range(1, 5))]
    loss = panels(dataclasses.replace(study(), rows=tuple(rows), front=(0, 1, 2, 3, 4)))[0]
    assert len(loss.shown(loss.front)) >= 3


def test_perplexity_ticks_are_round_and_few() -> None:
    assert perplexity_ticks(math.log(9.5), math.log(101)) == [10, 15, 20, 30, 40, 50, 70, 100]
    for low, high in ((3.3, 3.6), (0.0, 1.0), (3.3, 5.5), (1.0, 12.0)):
        ticks = perplexity_ticks(low, high)
        assert 1 <= len(ticks) <= 12
        assert all(low <= math.log(tick) <= high for tick in ticks)


def test_hypervolume_figure_ends_at_the_summary_whatever_the_directions() -> None:
    figure = hypervolume_figure(study())
    assert figure is not None
    assert math.isclose(figure.data[0].y[-1], study().hypervolume)
    summary = study()
    rows = tuple(
        dataclasses.replace(row, values=(row.values[0], -row.values[1])) if row.values else row
        for row in summary.rows
    )
    objectives = (Objective("budget.model", True), Objective("negated", False))
    flipped = dataclasses.replace(summary, rows=rows, objectives=objectives, reference=(1.01, -6.0))
    figure = hypervolume_figure(flipped)
    assert figure is not None
    assert math.isclose(figure.data[0].y[-1], summary.hypervolume)


def test_rank_map_shows_shares_of_full_rank() -> None:
    summary = study()
    figure = rank_figure(summary, TARGETS)
    assert figure is not None
    assert len(figure.data) == len(summary.front)
    row = next(row for row in summary.rows if row.number == summary.front[-1])
    share = figure.data[-1].z
    for target in TARGETS:
        rank = row.allocation.to_dict()[target.name]
        assert share[MODULES.index(target.module)][target.block] == (1.0 if rank is None else rank / 576)


def test_seeds_have_marks_of_their_own() -> None:
    made = study()
    rows = [dataclasses.replace(row, origin="seed") if 10 <= row.number < 13 else row for row in made.rows]
    loss, _ = panels(dataclasses.replace(made, rows=tuple(rows)))
    assert [point.trial for point in loss.seeds] == [10, 11, 12]
    traces = {trace.name: trace for trace in panel_figure(loss).data if trace.name}
    assert list(traces["seed"].x) == [point.kept for point in loss.seeds]
    others = {*traces["trial"].x}
    assert not others & {*traces["seed"].x}
