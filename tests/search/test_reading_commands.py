"""Commands that only read a study, in whatever state it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from commands import run, study_on_disk, trials, written
from fakes import TARGETS, energy_of, score_of, write_store

from actors.types import RankfrontError
from search.finals import finished_numbers
from search.folder import CONFIG, PREPARED, StudyFolder
from search.journal import JOURNAL, open_journal, repair


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return study_on_disk(tmp_path)


def test_report_writes_the_study_anew(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder.path / JOURNAL).read_bytes()
    assert run(monkeypatch, "report", "made-up", "--runs", folder.path.parent) == 0
    assert (folder.path / JOURNAL).read_bytes() == before, "a report writes nothing to the study"
    front = json.loads((folder.path / "front.json").read_text())
    assert {member["trial"] for member in front["front"]} <= {0, 1}
    assert (folder.path / "report.html").exists()
    assert "report.html" in capsys.readouterr().out


def test_a_torn_journal_survives_commands_that_only_read(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may be written behind a torn record: it would turn a torn tail into damage."""
    journal = folder.path / JOURNAL
    torn = journal.read_bytes()[:-9]
    journal.write_bytes(torn)
    for _ in range(3):
        assert run(monkeypatch, "report", folder.path) == 0
    assert journal.read_bytes() == torn
    repair(journal)
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE", "RUNNING"]


@pytest.mark.parametrize("lost", ["gone", "zeros"])
def test_a_lost_journal_takes_no_result_with_it(
    folder: StudyFolder, lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of what only reads, nor of what would begin the study anew."""
    assert run(monkeypatch, "report", folder.path) == 0
    before = {name: (folder.path / name).read_bytes() for name in ("front.json", "trials.parquet")}
    (folder.path / JOURNAL).unlink()
    if lost == "zeros":
        (folder.path / JOURNAL).write_bytes(b"\0" * 5_000)
    mine = written(folder.path / "mine.yaml", {TARGETS[0].name: 3})
    search_again = ("search", folder.path / CONFIG)
    for command in (("report", folder.path), ("status", folder.path), search_again):
        assert run(monkeypatch, *command) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "trials.parquet lists 2 trials, the study has none of them" in error, command
    assert run(monkeypatch, "enqueue", folder.path, mine) == 2
    assert ("holds no record" if lost == "zeros" else "lists 2 trials") in capsys.readouterr().err
    assert {name: (folder.path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("command", ["report", "status"])
@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (CONFIG, lambda content: content + b"\n  - [", "is damaged: while parsing"),
        (CONFIG, lambda content: b"", "is damaged: it holds NoneType, no mapping of keys"),
        (PREPARED, lambda content: content[:-9], "is damaged: "),
        (PREPARED, lambda content: b'{"targets": []}', "is damaged: "),
        (JOURNAL, lambda content: content.replace(b'{"', b"{", 1), "record 1 is damaged"),
        (JOURNAL, lambda content: content.replace(b'\n{"', b"\n{", 3), "record 2 is damaged"),
    ],
)
def test_a_damaged_file_of_a_study_is_named(
    folder: StudyFolder,
    command: str,
    name: str,
    damage: Callable[[bytes], bytes],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = folder.path / name
    file.write_bytes(damage(file.read_bytes()))
    assert run(monkeypatch, command, folder.path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert says in line


@pytest.mark.parametrize("database", [None, "${STUDIES}"], ids=["journal", "database"])
def test_a_look_begins_no_study(
    folder: StudyFolder, tmp_path: Path, database: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was prepared and has no trial, as `rankfront sensitivity` leaves it."""
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    config = folder.config.model_copy(update={"database": database})
    (folder.path / CONFIG).write_text(config.to_yaml())
    (folder.path / JOURNAL).unlink()
    assert run(monkeypatch, "report", folder.path) == 0
    assert json.loads((folder.path / "front.json").read_text())["front"] == []
    for command in ("export", "evaluate", "refine"):
        assert run(monkeypatch, command, folder.path, "--budget", "0.9") == 2
    assert not (folder.path / JOURNAL).exists()
    assert not (tmp_path / "studies.db").exists()


@pytest.mark.parametrize(
    "command", ["report STUDY", "status STUDY", "enqueue STUDY FILE", "export STUDY --trial 1 --config-only"]
)
def test_what_needs_neither_model_nor_text_does_without(
    folder: StudyFolder, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have moved, or were purged, since the config was saved."""
    (tmp_path / "model").rmdir()
    (tmp_path / "text.txt").rename(tmp_path / "texts.txt")
    mine = written(tmp_path / "mine.yaml", {"layers.0.q_proj": 3})
    places = {"STUDY": folder.path, "FILE": mine}
    assert run(monkeypatch, *(places.get(word, word) for word in command.split())) == 0
    if command.startswith("export"):
        [ranks] = (folder.path / "exports").rglob("ranks.yaml")
        assert yaml.safe_load(ranks.read_text())["text"]["source"] == str(tmp_path / "text.txt")


def test_a_study_without_a_dense_trial_has_a_report(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`references: {dense: false}`, or a search that was stopped before its first trial ended."""
    (folder.path / JOURNAL).unlink()
    assert run(monkeypatch, "report", folder.path) == 0
    study = folder.open_study()
    planned = study.propose("random")
    study.complete(planned, score_of(planned.allocation))
    assert run(monkeypatch, "report", folder.path) == 0
    [member] = json.loads((folder.path / "front.json").read_text())["front"]
    assert member["trial"] == 0


def test_a_trial_that_another_program_completed_is_shown_as_what_it_is(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without levels of this space, and with values that no score has: by every command that reads."""
    other = optuna.load_study(study_name="made-up", storage=open_journal(folder.path))
    other.tell(other.ask(), [0.1, -math.inf])
    for command in ("report", "status"):
        assert run(monkeypatch, command, folder.path) == 0
    front = json.loads((folder.path / "front.json").read_text())["front"]
    assert {member["trial"] for member in front} <= {0, 1}
    told = pq.read_table(folder.path / "trials.parquet").to_pylist()[2]
    assert (told["value.budget.model"], told["value.nll"]) == (0.1, -math.inf)
    of_ranks = ("budget_linear", "budget_model", "budget_bytes", "macs", "ranks", "methods")
    assert [told[name] for name in (*of_ranks, "search.nll")] == [None] * 7
    capsys.readouterr()
    assert run(monkeypatch, "export", folder.path, "--trial", 2) == 2
    assert "--trial 2: it is COMPLETE: another program completed it" in capsys.readouterr().err
    with pytest.raises(RankfrontError, match="--trial 2: no finished trial of this study"):
        finished_numbers(folder.open_study(), [2])


def test_a_sampler_is_told_what_the_factors_predict(folder: StudyFolder) -> None:
    """By the configured method; nothing, and so an even guess, where one target has no prediction."""
    store = Path(folder.prepared.factor_store)
    losses = {target.name: {"curvature": energy_of(target)} for target in TARGETS}
    write_store(store, losses, losses)
    found = folder.landscape()
    target = TARGETS[4]
    lost = [energy_of(target)[rank:].sum() for rank in range(1, target.full_rank + 1)]
    start = int(found.offsets[4])
    assert found.rank_losses[start : start + 25].tolist() == pytest.approx([0.0, *lost])
    assert found.rooms.tolist() == [np.inf, pytest.approx(np.log(10))]
    write_store(store, losses, {name: losses[name] for name in list(losses)[1:]})
    even = folder.landscape()
    assert even.rank_losses[1] == pytest.approx((1 - even.rank_sizes[1] / even.rank_sizes[0]) ** 2 / 20)
