"""`rankfront enqueue`: allocations of one's own, their methods, and what a file may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run, study_on_disk, trials, written
from fakes import TARGETS, score_of

from actors.types import Allocation
from search.config import parse_config
from search.folder import CONFIG, StudyFolder, summarise
from search.journal import JOURNAL, driver_lock, repair


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return study_on_disk(tmp_path)


def test_enqueue_adds_waiting_trials_under_the_numbers_it_says(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = [{"layers.0.q_proj": 3}, {"ranks": {"layers.1.up_proj": 4, "layers.0.q_proj": None}}]
    file = written(tmp_path / "mine.yaml", ranks)
    assert run(monkeypatch, "enqueue", folder.path, file) == 0
    assert "Enqueued as trials: 2, 3" in capsys.readouterr().out
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE", "COMPLETE", "WAITING", "WAITING"]
    rows = folder.open_study().rows()
    assert [row.allocation for row in rows[2:]] == [
        Allocation.of({"layers.0.q_proj": 3}, TARGETS),
        Allocation.of({"layers.1.up_proj": 4}, TARGETS),
    ]
    assert run(monkeypatch, "enqueue", folder.path, file) == 0
    assert "none; 2 are in the study already" in capsys.readouterr().out
    assert len(trials(folder)) == 4


@pytest.fixture
def choosing(folder: StudyFolder) -> StudyFolder:
    """The study of a config where q_proj is cut by weight and the search chooses a method."""
    changed = folder.config.model_dump(mode="json")
    changed["factors"]["methods"] = {"*.q_proj": "weight"}
    changed["space"]["methods"] = ["weight", "curvature"]
    (folder.path / CONFIG).write_text(parse_config(changed).to_yaml())
    (folder.path / JOURNAL).unlink()
    return StudyFolder.open(folder.path)


def test_methods_pass_from_a_file_to_the_front_and_back(
    choosing: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"layers.0.q_proj": "curvature", "layers.1.q_proj": "weight"}
    mine = {"ranks": {"layers.0.q_proj": 3, "layers.1.q_proj": 4}, "methods": methods}
    file = written(tmp_path / "mine.yaml", mine)
    assert run(monkeypatch, "enqueue", choosing.path, file) == 0
    study = choosing.open_study()
    planned = study.propose("random")
    assert planned.allocation.methods == (("layers.0.q_proj", "curvature"),)
    study.complete(planned, score_of(planned.allocation))
    assert run(monkeypatch, "report", choosing.path) == 0
    [member] = json.loads((choosing.path / "front.json").read_text())["front"]
    assert member["methods"] == {"layers.0.q_proj": "curvature"}
    capsys.readouterr()
    assert run(monkeypatch, "enqueue", choosing.path, written(tmp_path / "front.yaml", [member])) == 0
    assert "none; 1 are in the study already" in capsys.readouterr().out


def test_methods_without_factors_are_refused(
    choosing: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"ranks": {"layers.0.q_proj": 3}, "methods": {"layers.0.q_proj": "feature"}}
    assert run(monkeypatch, "enqueue", choosing.path, written(tmp_path / "bad.yaml", bad)) == 2
    said = capsys.readouterr().err
    assert (
        "bad.yaml[0].layers.0.q_proj: this study has no factors by 'feature'; one of weight, curvature"
        in said
    )
    assert choosing.open_study().rows() == ()


def test_the_report_says_how_targets_are_decomposed(folder: StudyFolder, choosing: StudyFolder) -> None:
    facts = [summarise(f, f.open_study()).facts["factors"] for f in (folder, choosing)]
    assert facts == [
        "curvature, bias mean, float32",
        "curvature, *.q_proj by weight, the search chooses among weight/curvature, bias mean, float32",
    ]


def test_enqueue_lists_every_mistake_of_a_file_and_adds_nothing(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Across the items of a list too."""
    bad = [
        {"layers.0.q_proj": 25, "layers.9.q_proj": 3, "layers.0.up_proj": 0},
        {"layers.1.q_proj": 3},
        {"layers.1.q_proj": "many", "layers.1.up_proj": True},
    ]
    before = (folder.path / JOURNAL).read_bytes()
    assert run(monkeypatch, "enqueue", folder.path, written(tmp_path / "bad.yaml", bad)) == 2
    said = capsys.readouterr().err
    expected = [
        "bad.yaml[0].layers.0.q_proj: rank 25 is not an integer in 1..24",
        "bad.yaml[0]: 'layers.9.q_proj' is no target",
        "bad.yaml[0].layers.0.up_proj: rank 0 is not",
        "bad.yaml[2].layers.1.q_proj: rank 'many' is not",
        "bad.yaml[2].layers.1.up_proj: rank True is not",
    ]
    assert [line for line in expected if line not in said] == []
    assert (folder.path / JOURNAL).read_bytes() == before


@pytest.mark.parametrize("text", ["[1, 2]", "a word", "{a: ["])
def test_a_file_without_ranks_is_refused(
    folder: StudyFolder,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert run(monkeypatch, "enqueue", folder.path, tmp_path / "bad.yaml") == 2
    assert "bad.yaml" in capsys.readouterr().err
    assert len(trials(folder)) == 2


def test_enqueue_after_a_crash_loses_nothing(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record written after a torn one would be joined to it, and be dropped with it at the next start."""
    journal = folder.path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-9])
    ranks = [{"layers.0.q_proj": 3}, {"layers.0.q_proj": 4}]
    assert run(monkeypatch, "enqueue", folder.path, written(tmp_path / "mine.yaml", ranks)) == 0
    repair(journal)
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE", "RUNNING", "WAITING", "WAITING"]


def test_enqueue_works_beside_a_driver(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "mine.yaml", {"layers.0.q_proj": 3})
    with driver_lock(folder.path):
        assert run(monkeypatch, "enqueue", folder.path, file) == 0
    assert [trial.state.name for trial in trials(folder)][2:] == ["WAITING"]
