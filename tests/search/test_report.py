"""The report of a made-up study: values survive, hostile names are text, files are whole."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread
from rich.console import Console

from actors.samples import pack_floats
from actors.types import Allocation, Score, TargetSpec, TaskScore, TextScore
from search.constraints import Constraint
from search.figures import hypervolume_figure, panel_figure, rank_figure
from search.files import write_atomic
from search.findings import front_cells
from search.panels import SHOWN_EXCESS, panels, perplexity_ticks
from search.pareto import front, hypervolume
from search.plots import SIZE, front_png
from search.records import Evaluation, Objective, StudySummary, TrialRow
from search.report import front_table, headline, report_html, write_report

EVIL = "<script>alert('x')</script>"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = tuple(
    TargetSpec(f"layers.{block}.{module}", 576, 576, False, block, module)
    for block in range(30)
    for module in MODULES
)
METHODS = ("feature", "weight")
DENSE_NLL = 3.4


def score(nll: float, split: str = "search", tasks: bool = True, tokens: int = 4096) -> Score:
    acc = max(0.25, 0.55 - 0.1 * (nll - DENSE_NLL))
    named = {
        "arc_easy": TaskScore(400, acc, acc - 0.02, -0.5),
        "boolq": TaskScore(300, acc + 0.05, None, 0.1),
    }
    text = TextScore("wikitext", nll * tokens, tokens, 0.02)
    return Score(split, text, named if tasks else {}, tokens + 900, 2.5, "replica-0")


def trial(number: int, kept: float, nll: float | None, origin: str = "tpe", **more: Any) -> TrialRow:
    rng = np.random.default_rng(number)
    ranks = {t.name: None if rng.random() < 0.2 else int(rng.integers(50, int(576 * kept))) for t in TARGETS}
    methods = {name: METHODS[number % 2] for name, rank in ranks.items() if rank and rank % 3 == 0}
    methods = {} if origin == "uniform" else methods
    allocation = Allocation.of(ranks, TARGETS, methods=methods)
    if origin == "dense":
        allocation = Allocation.dense(TARGETS)
    row = TrialRow(
        number=number,
        state="COMPLETE" if nll is not None else "FAIL",
        origin=origin,
        allocation=allocation,
        budget_linear=1 - (1 - kept) * 1.2,
        budget_model=kept,
        budget_bytes=kept + 0.001,
        macs=int(kept * 10**12) + number,
        values=(kept, nll) if nll is not None else None,
        score=score(nll, tasks=more.pop("tasks", True)) if nll is not None else None,
        seconds=3.0 if nll is not None else None,
        replica="replica-0",
        reason=None,
        copied_from=None,
    )
    return dataclasses.replace(row, **more)


def study(tasks: bool = True, trials: int = 120) -> StudySummary:
    """Random search around a known curve, broken and failed trials, dense and uniform ones."""
    rng = np.random.default_rng(0)
    rows = [trial(0, 1.0, DENSE_NLL, "dense", tasks=tasks)]
    for kept in (0.9, 0.8, 0.7):
        rows.append(trial(len(rows), kept, DENSE_NLL + 9 * (1 - kept) ** 1.3, "uniform", tasks=tasks))
    for number in range(len(rows), trials):
        kept = float(rng.uniform(0.6, 0.97))
        nll = DENSE_NLL + 5 * (1 - kept) ** 1.3 * (1 + float(rng.exponential(0.5)))
        nll = 12.0 + number / 100 if number % 40 == 0 else nll
        rows.append(trial(number, kept, nll, tasks=tasks))
    n = len(rows)
    rows.append(trial(n, 0.5, None, reason=f"nll is nan on the search split {EVIL}"))
    rows.append(trial(n + 1, 0.5, None, reason=f"nll is nan on the search split {EVIL}"))
    rows.append(trial(n + 2, 0.5, None, state="RUNNING", replica=None))
    rows.append(dataclasses.replace(rows[5], number=n + 3, copied_from=5))
    done = [row for row in rows if row.values is not None]
    values = np.array([row.values for row in done])
    chosen = sorted((done[i] for i in front(values)), key=lambda row: -row.budget_model)
    reference = (1.01, 6.0)
    tested = [
        Evaluation(r.number, "factors", "test", "f" * 8, score(r.score.text.nll + 0.05, "test", tasks))
        for r in chosen
        if r.score
    ]
    return StudySummary(
        study=f"demo {EVIL}",
        model=f"HuggingFaceTB/SmolLM2-135M {EVIL}",
        objectives=(Objective("budget.model", True), Objective("nll", True)),
        rows=tuple(rows),
        front=tuple(row.number for row in chosen),
        hypervolume=hypervolume(values, reference),
        reference=reference,
        evaluations=tuple(tested),
        macs_length=512,
        facts={"method": "curvature", "calibration": f"WikiText-2 train, 65,536 tokens {EVIL}"},
    )


def empty_study() -> StudySummary:
    return dataclasses.replace(study(trials=4), rows=(), front=(), evaluations=(), hypervolume=0.0)


def read(path: Path) -> pa.Table:
    return pq.read_table(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "new"
    paths = write_report(study(), folder, TARGETS)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in paths)
    return folder


def test_trials_come_back_from_parquet(written: Path) -> None:
    summary, table = study(), read(written / "trials.parquet")
    assert table.schema.metadata[b"macs_length"] == b"512"
    assert json.loads(table.schema.metadata[b"targets"]) == [target.name for target in TARGETS]
    assert table.schema.field("ranks").type == pa.list_(pa.int32())
    assert {method for found in table["methods"].to_pylist() for method in found} == {None, *METHODS}
    assert table.num_rows == len(summary.rows)
    for row, found in zip(summary.rows, table.to_pylist(), strict=True):
        assert [r for _, r in row.allocation] == found["ranks"]
        assert [row.allocation.method_of(target.name) for target in TARGETS] == found["methods"]
        for name in (
            "number",
            "state",
            "origin",
            "reason",
            "copied_from",
            "budget_linear",
            "budget_model",
            "budget_bytes",
            "macs",
            "seconds",
            "replica",
        ):
            assert found[name] == getattr(row, name)
        assert found["value.nll"] == (row.values[1] if row.values else None)
        if row.score is None:
            assert found["search.nll"] is None
            continue
        for name, value in row.score.metrics.items():
            assert found[f"search.{name}"] == value
        assert found["search.nll_stderr"] == row.score.text.stderr
        assert found["search.reasoning.acc_stderr"] == row.score.reasoning_stderr
        assert found["search.reasoning.boolq.acc_stderr"] == row.score.tasks["boolq"].stderr
        assert found["search.tokens"] == 4096
    assert "search.reasoning.boolq.acc_norm" not in table.column_names  # the harness does not define it


def test_evaluations_come_back_from_parquet(written: Path) -> None:
    summary, rows = study(), read(written / "evaluations.parquet").to_pylist()
    keys = [(row["trial"], row["variant"], row["split"], row["fingerprint"]) for row in rows]
    assert keys == [evaluation.key for evaluation in summary.evaluations]
    assert [row["nll"] for row in rows] == [evaluation.score.text.nll for evaluation in summary.evaluations]


def test_columns_have_their_types_when_nothing_was_scored(tmp_path: Path) -> None:
    objectives = (
        Objective("budget.model", True),
        Objective("nll", True),
        Objective("reasoning.margin", False),
    )
    empty = dataclasses.replace(empty_study(), objectives=objectives, reference=(1.0, 6.0, -1.0))
    running = dataclasses.replace(empty, rows=(trial(0, 0.5, None, state="RUNNING", replica=None),))
    for summary in (empty, running):
        write_report(summary, tmp_path, TARGETS)
        schema = read(tmp_path / "trials.parquet").schema
        for name in (
            "search.nll",
            "search.reasoning.acc_stderr",
            "search.reasoning.margin",
            "value.nll",
            "seconds",
        ):
            assert schema.field(name).type == pa.float64(), name
        for name in ("number", "copied_from", "search.tokens"):
            assert schema.field(name).type == pa.int64(), name
        assert schema.field("reason").type == pa.string()
        assert read(tmp_path / "evaluations.parquet").schema.field("nll").type == pa.float64()


def test_trials_of_other_targets_are_refused(tmp_path: Path) -> None:
    summary = study(trials=5)
    other = dataclasses.replace(summary.rows[1], allocation=Allocation((("elsewhere", 3),)))
    with pytest.raises(ValueError, match="trial 1: its targets differ"):
        write_report(dataclasses.replace(summary, rows=(summary.rows[0], other)), tmp_path)


def test_front_json_is_strict_and_complete(written: Path, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    summary = study()
    document = json.loads((written / "front.json").read_text(), parse_constant=refuse)
    by_number = {row.number: row for row in summary.rows}
    assert [member["trial"] for member in document["front"]] == list(summary.front)
    for member in document["front"]:
        row = by_number[member["trial"]]
        assert member["ranks"] == row.allocation.to_dict()
        assert member["methods"] == dict(row.allocation.methods)
        for name in ("budget_linear", "budget_model", "budget_bytes", "macs"):
            assert member[name] == getattr(row, name)
        assert row.score is not None
        assert member["search"]["nll"] == row.score.text.nll
        assert math.isclose(member["test"]["nll"], row.score.text.nll + 0.05)
    text = dataclasses.replace(score(3.4).text, stderr=math.nan)
    nan = dataclasses.replace(summary.rows[0], score=dataclasses.replace(score(3.4), text=text))
    write_report(dataclasses.replace(summary, rows=(nan, *summary.rows[1:]), hypervolume=math.inf), tmp_path)
    broken = json.loads((tmp_path / "front.json").read_text(), parse_constant=refuse)
    assert broken["hypervolume"] is None
    assert broken["front"][0]["search"]["nll_stderr"] is None


# -- constraints ------------------------------------------------------------------------------

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
    table = read(tmp_path / "trials.parquet")
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


def decoded(png: bytes) -> Any:
    return imread(io.BytesIO(png))


def test_picture_is_an_image_of_the_stated_size(written: Path) -> None:
    image = decoded((written / "front.png").read_bytes())
    assert image.shape[:2] == (SIZE[1], SIZE[0])
    blue = np.abs(image[..., :3] - np.array([0x24, 0x57, 0xC5]) / 255).max(axis=-1) < 0.02
    assert blue[:, :800].sum() > 300
    assert blue[:, 800:].sum() > 300  # the front is drawn in both panels


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


class Page(HTMLParser):
    """Tags and attributes of a page, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            (k, v or "") for k, v in attributes if k in ("src", "href", "action", "data", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_loads_nothing_and_runs_nothing_from_the_data(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert text.count('"modeBarButtonsToRemove": ["sendChartToCloud"') == 4  # no button uploads a chart
    assert page.tags.count("script") == 1 + 4  # plotly, then loss, accuracy, ranks, progress
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert EVIL not in text
    assert html.escape(EVIL) in text
    assert not re.search(r"url\(|@import", text.split("<style>")[1].split("</style>")[0])


def test_hostile_origins_and_target_names_stay_text() -> None:
    targets = tuple(
        dataclasses.replace(t, name=f"{t.name}{EVIL}", module=f"{t.module}{EVIL}") for t in TARGETS
    )
    summary = study(trials=8)
    rows = tuple(
        dataclasses.replace(
            row, origin=EVIL, allocation=Allocation(tuple((f"{n}{EVIL}", r) for n, r in row.allocation))
        )
        for row in summary.rows
    )
    hostile = dataclasses.replace(summary, rows=rows)
    text = report_html(hostile, targets)
    assert EVIL not in text
    assert Page(text).tags.count("script") == 5
    figures = [panel_figure(panels(hostile)[0]), rank_figure(hostile, targets)]
    for figure in figures:  # plotly reads a little HTML in its own labels, so they hold entities
        assert figure is not None
        assert EVIL not in json.dumps(figure.to_plotly_json(), default=str)


def test_page_says_what_was_found(written: Path) -> None:
    text, summary = (written / "report.html").read_text(), study()
    for sentence in headline(summary):
        assert html.escape(sentence) in text
    assert "<td>2</td><td>120, 121</td><td>nll is nan on the search split" in text
    assert Page(text).tags.count("option") == len(summary.front)
    assert "Where the ranks go" not in report_html(summary)  # ranks without a scale are not drawn


def test_trials_stopped_early_are_shown_with_their_part_and_drawn_nowhere(tmp_path: Path) -> None:
    whole = study()
    part = dataclasses.replace(score(1.0), stopped_by=7, forward_tokens=2048, tasks={})
    reason = "dominated by trial 7 after 2,048 tokens"
    stopped = [
        trial(len(whole.rows) + n, 0.8, None, state="PRUNED", score=part, reason=reason) for n in range(2)
    ]
    summary = dataclasses.replace(whole, rows=(*whole.rows, *stopped))
    numbers = ", ".join(str(row.number) for row in stopped)
    page = report_html(summary, TARGETS)
    assert f"<td>2,048</td><td>7</td><td>2</td><td>{numbers}</td>" in page
    assert "2 pruned" in page
    assert "Trials stopped early" not in report_html(whole)
    assert panels(summary) == panels(whole)
    assert headline(summary) == headline(whole)
    write_report(summary, tmp_path, TARGETS)
    for found in read(tmp_path / "trials.parquet").to_pylist()[-2:]:
        assert (found["state"], found["stopped_by"], found["reason"]) == ("PRUNED", 7, reason)
        assert (found["search.nll"], found["search.forward_tokens"], found["value.nll"]) == (1.0, 2048, None)


def test_pages_of_young_studies() -> None:
    for summary in (empty_study(), study(tasks=False, trials=2)):
        assert "<h2>Facts</h2>" in report_html(summary, TARGETS)


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


def three(**more: Any) -> StudySummary:
    """Dense at 3.0 nats, 88% at 3.25, 65% at 4.0; no tasks, no test scores."""
    rows = (
        trial(0, 1.0, 3.0, "dense", tasks=False),
        trial(1, 0.88, 3.25, tasks=False),
        trial(2, 0.65, 4.0, tasks=False),
    )
    return dataclasses.replace(study(), rows=rows, front=(0, 1, 2), evaluations=(), **more)


def test_headline_names_the_best_point_of_each_rung_once() -> None:
    assert headline(three()) == [
        "Keeping 88% of the parameters costs 0.25 nats/token (perplexity 20.1 -> 25.8).",
        "Keeping 65% of the parameters costs 1.00 nats/token (perplexity 20.1 -> 54.6).",
    ]
    tested = tuple(
        Evaluation(number, "factors", "test", "f", score(nll, "test", tasks=False))
        for number, nll in ((0, 3.1), (1, 3.4))
    )
    assert headline(dataclasses.replace(three(), evaluations=tested))[0] == (
        "Keeping 88% of the parameters costs 0.25 nats/token (perplexity 20.1 -> 25.8); "
        "on the test split it costs 0.30 nats/token (22.2 -> 30.0)."
    )
    assert headline(dataclasses.replace(three(), rows=three().rows[1:], front=(2,))) == [
        "Keeping 65% of the parameters gives 4.00 nats/token (perplexity 54.6)."
    ]
    assert headline(empty_study()) == []


def test_front_table_fits_a_terminal_and_prints_names_as_they_are() -> None:
    summary = dataclasses.replace(study(), study="[bold]name[/bold]")
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(front_table(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]name[/bold]" in text
    cells = front_cells(summary)
    for row in cells.rows:
        assert all(cell in text for cell in row)  # nothing was cut
    assert len(cells.rows) == len(summary.front)


def test_table_marks_only_what_cannot_be_told_apart() -> None:
    rows = (*three().rows, trial(3, 0.64, 4.03, tasks=False))  # se 0.02 each: 2 combined are 0.057
    cells = front_cells(dataclasses.replace(three(), rows=rows, front=(1, 2, 3)))
    assert cells.columns == ("trial", "kept", "nll", "ppl", "Δ dense", "origin")
    assert [row[0] for row in cells.rows] == ["0", "1", "2", "3"]  # dense leads though it is off the front
    assert [row[2].startswith("≈") for row in cells.rows] == [False, False, False, True]
    assert cells.rows[1][4] == "+0.250"


def test_losses_of_the_same_windows_are_told_apart_by_their_differences() -> None:
    """0.03 nats on each of 16 windows is no noise, though it is within two combined standard errors."""

    def on_windows(row: TrialRow, gap: list[float]) -> TrialRow:
        assert row.score is not None
        packed = pack_floats([3 + index / 9 + gap[index % 2] for index in range(16)])
        text = dataclasses.replace(row.score.text, windows=packed)
        return dataclasses.replace(row, score=dataclasses.replace(row.score, text=text))

    close = [trial(3, 0.64, 4.03, tasks=False), trial(4, 0.63, 4.04, tasks=False)]
    gaps = ([0.0, 0.0], [0.029, 0.031], [0.2, -0.1])
    paired = [on_windows(row, gap) for row, gap in zip([three().rows[2], *close], gaps, strict=True)]
    rows = (*three().rows[:2], *paired)
    cells = front_cells(dataclasses.replace(three(), rows=rows, front=(1, 2, 3, 4)))
    assert [row[2].startswith("≈") for row in cells.rows] == [False, False, False, False, True]


def test_extreme_losses_are_written_not_raised() -> None:
    rows = (three().rows[0], trial(1, 0.5, 900.0, tasks=False))
    summary = dataclasses.replace(three(), rows=rows, front=(0, 1))
    assert front_cells(summary).rows[1][3] == "e^900.0"
    assert report_html(summary, TARGETS)
    assert front_png(summary)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_midway_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "front.json"
    write_atomic(path, "old é")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"search.files.os.{step}", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old é"
    assert list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_seeds_have_marks_of_their_own() -> None:
    made = study()
    rows = [dataclasses.replace(row, origin="seed") if 10 <= row.number < 13 else row for row in made.rows]
    loss, _ = panels(dataclasses.replace(made, rows=tuple(rows)))
    assert [point.trial for point in loss.seeds] == [10, 11, 12]
    traces = {trace.name: trace for trace in panel_figure(loss).data if trace.name}
    assert list(traces["seed"].x) == [point.kept for point in loss.seeds]
    others = {*traces["trial"].x}
    assert not others & {*traces["seed"].x}
