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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import EVIL, METHODS, TARGETS, empty_study, score, study, three, trial
from matplotlib.image import imread
from rich.console import Console

from actors.samples import pack_floats
from actors.types import Allocation, Score, TaskScore
from search.figures import panel_figure, rank_figure
from search.files import write_atomic
from search.findings import front_cells
from search.panels import panels
from search.plots import SIZE, front_png
from search.records import Evaluation, Objective, TrialRow
from search.report import front_table, headline, report_html, write_report


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


def test_picture_is_an_image_of_the_stated_size(written: Path) -> None:
    image = imread(written / "front.png")
    assert image.shape[:2] == (SIZE[1], SIZE[0])
    blue = np.abs(image[..., :3] - np.array([0x24, 0x57, 0xC5]) / 255).max(axis=-1) < 0.02
    assert blue[:, :800].sum() > 300
    assert blue[:, 800:].sum() > 300  # the front is drawn in both panels


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


def test_headline_names_the_best_point_of_each_rung_once() -> None:
    assert headline(three()) == [
        "Keeping 88% of the parameters costs 0.25 nats/token (perplexity 20.1 -> 25.8).",
        "Keeping 65% of the parameters costs 1.00 nats/token (perplexity 20.1 -> 54.6).",
    ]
    tested = tuple(
        Evaluation(number, "factors", "test", "f", score(nll, "test", tasks=False))
        for number, nll in ((0, 3.1), (1, 3.4))
    )
    summary = three(fingerprints={"test": "f"})
    assert headline(dataclasses.replace(summary, evaluations=tested))[0] == (
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


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (80, ["test acc", "test ppl"]),
        (60, ["test acc", "test ppl", "origin", "Δ dense"]),
        (40, ["test acc", "test ppl", "origin", "Δ dense", "acc", "test nll"]),
    ],
)
def test_a_narrow_terminal_shows_numbers_whole_and_says_which_it_has_no_room_for(
    width: int, missing: list[str]
) -> None:
    summary = study()
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(front_table(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert f"no room for {', '.join(missing)}: report.html has them" in " ".join(text.split())
    cells = front_cells(summary)
    shown = [index for index, name in enumerate(cells.columns) if name not in missing]
    for row in cells.rows:
        assert [row[index] for index in shown] in [line.split() for line in text.splitlines()]


def test_no_digit_is_lost_where_not_even_the_loss_has_room() -> None:
    console = Console(width=20, file=io.StringIO(), color_system=None)
    console.print(front_table(three()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 20 for line in text.splitlines())
    shown = "".join(cell for row in front_cells(three()).rows for cell in row[:3])
    title = "3"  # on the front
    assert sorted(filter(str.isdigit, text)) == sorted(filter(str.isdigit, shown + title))


def test_every_objective_has_a_column_with_its_standard_error() -> None:
    """Those that another table shows have none here."""
    names = ("reasoning.margin", "reasoning.boolq.acc", "budget.bytes", "budget.model", "nll", "kl", "nll.c4")
    rows = tuple(
        dataclasses.replace(row, score=dataclasses.replace(row.score, tasks=with_margins(row.score)))
        for row in study().rows[:3]
        if row.score
    )
    objectives = tuple(Objective(name, not name.startswith("reasoning")) for name in names)
    summary = dataclasses.replace(study(), rows=rows, objectives=objectives, front=(1, 2), reference=())
    cells = front_cells(summary)
    assert cells.columns[-4:] == (*names[:3], "origin")
    for row, shown in zip(rows, cells.rows, strict=True):
        assert row.score is not None
        boolq = row.score.tasks["boolq"]
        assert shown[-4:-1] == (
            "0.000±0.408",  # two tasks, sqrt(1/3) of margins 1, 0, -1 each: sqrt(2/3) / 2
            f"{100 * boolq.acc:.1f}±{100 * boolq.stderr:.1f}",
            f"{100 * row.budget_bytes:.1f}%",
        )
    assert all(name in html.unescape(report_html(summary)) for name in names[:3])


def with_margins(score: Score) -> dict[str, TaskScore]:
    kept = pack_floats([1.0, 0.0, -1.0])
    return {name: dataclasses.replace(task, margin=0.0, margins=kept) for name, task in score.tasks.items()}


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
