"""Commands that need no worker: enqueue, and what the command line refuses."""

from __future__ import annotations

import errno
import io
import json
import math
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from fakes import MODEL_PARAMETERS, TARGETS, energy_of, score_of, write_store
from rich.console import Console

from actors.types import Allocation, Prepared, RankfrontError
from search.cli import app, main
from search.config import parse_config
from search.finals import finished_numbers
from search.folder import CONFIG, PREPARED, StudyFolder, summarise
from search.journal import JOURNAL, driver_lock, open_journal, repair
from search.runner import Stop
from search.signals import stop_on_signals


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    """A study on disk, as a driver leaves it: dense and another trial scored, none in flight."""
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("some words of text\n" * 2_000)
    config = parse_config(
        {
            "study": "made-up",
            "runs": str(tmp_path / "runs"),
            "model": {"source": str(tmp_path / "model")},
            "text": {"source": str(tmp_path / "text.txt")},
            "space": {"group": "module"},
            "sampler": {"name": "random"},
        }
    )
    sizes = {"search": 100, "test": 100, "search.forward": 100, "test.forward": 100, "calibration": 100}
    keys = ("model", "tokenizer", "calibration", "search", "test", "factors")
    prepared = Prepared(
        model_folder=str(tmp_path / "model"),
        factor_store=str(tmp_path / "store"),
        targets=TARGETS,
        model_parameters=MODEL_PARAMETERS,
        fingerprints=dict.fromkeys(keys, "0" * 64),
        tokens=sizes,
        examples={"search": {}, "test": {}},
        seconds={},
        reused=False,
    )
    path = config.folder
    path.mkdir(parents=True)
    (path / CONFIG).write_text(config.to_yaml())
    (path / PREPARED).write_text(json.dumps(prepared.to_dict()))
    made = StudyFolder.open(path)
    study = made.open_study()
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    for _ in range(2):
        planned = study.propose("random")
        study.complete(planned, score_of(planned.allocation))
    return made


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


def trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="made-up", storage=open_journal(folder.path)).get_trials()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["rankfront", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def written(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


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


def test_a_full_disk_is_no_crash(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the journal, which is left as it was, and of any other file."""
    file = written(tmp_path / "mine.yaml", [{"layers.0.q_proj": 3}])
    journal = folder.path / JOURNAL
    before = journal.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
    try:
        assert run(monkeypatch, "enqueue", folder.path, file) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "study.journal cannot be written: File too large" in capsys.readouterr().err
    assert journal.read_bytes() == before

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "front.png")

    monkeypatch.setattr("search.cli.report", full)
    assert run(monkeypatch, "report", folder.path) == 2
    assert "No space left on device (front.png): every finished trial is saved" in capsys.readouterr().err


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


def test_enqueue_works_beside_a_driver(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "mine.yaml", {"layers.0.q_proj": 3})
    with driver_lock(folder.path):
        assert run(monkeypatch, "enqueue", folder.path, file) == 0
    assert [trial.state.name for trial in trials(folder)][2:] == ["WAITING"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "no-such-study"], "holds no study"),
        (["export"], "name a study, or a folder with --check"),
        (["export", "made-up"], "give one of --trial N, --budget B, --max-nll X and --all-front"),
        (["export", "made-up", "--trial", "1", "--budget", "0.9"], "give one of --trial N, --budget B"),
        (["export", "made-up", "--trial", "0", "--all-front"], "give one of --trial N, --budget B"),
        (["export", "made-up", "--trial", "77"], "trials 0..1"),
        (["export", "made-up", "--budget", "0.01"], "the front reaches down to"),
        (["export", "made-up", "--max-nll", "0.01"], "--max-nll 0.01: no front point at or under it; the"),
        (["export", "made-up", "--check", "made-up"], "a study or --check FOLDER, not both"),
        (["export", "--check", "nowhere"], "nowhere: no such folder"),
        (["export", "--check", "."], "ranks.yaml"),
        (["export", "made-up", "--trial", "0", "--set", "a=1"], "--set is for --check"),
        (["apply", "none.yaml", "./model", "--to", "new"], "none.yaml"),
        (["search", "config.yaml", "--set", "stop.trials"], "KEY=VALUE"),
        (["search", "config.yaml", "--set", "stop.trials=[1"], "stop.trials"),
        (["search", "config.yaml", "--set", "study.x=1"], "not a section"),
        (["search", "none.yaml"], "none.yaml"),
    ],
)
def test_mistakes_are_said_without_a_traceback(
    folder: StudyFolder,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text((folder.path / CONFIG).read_text())
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.out + said.err


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


@pytest.mark.parametrize(("reason", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("200 trials", 0)])
def test_the_exit_code_says_what_stopped_the_search(
    folder: StudyFolder,
    tmp_path: Path,
    reason: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "search.cli.search",
        lambda config, console: (folder, summarise(folder, folder.open_study()), reason),
    )
    assert run(monkeypatch, "search", folder.path / CONFIG) == code
    said = capsys.readouterr().out
    assert f"Stopped: {reason}" in said
    assert ("goes on where it stopped" in said) == (code > 0)


def test_the_closing_screen_gives_commands_that_a_shell_reads_as_they_were_given(
    folder: StudyFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lists in a `--set` and paths with spaces and brackets: none is markup, each is one word."""
    place = tmp_path / "my [/b] runs"
    place.mkdir(parents=True)
    config = place / "a [bold]config.yaml"
    config.write_text((folder.path / CONFIG).read_text())
    summary, moved = summarise(folder, folder.open_study()), replace(folder, path=place)
    sets = ("--set", "warm_start.sources=[/data/runs/other]", "--set", "objectives=[budget.model,nll]")
    given = [str(config), *sets]
    monkeypatch.setattr("search.cli.search", lambda config, console: (moved, summary, "SIGINT"))
    monkeypatch.setattr("search.cli.surgical", lambda config, console: (moved, summary, "SIGINT"))
    monkeypatch.setattr("search.cli.sensitivity", lambda config, console: (place, None, "SIGINT"))

    def printed(*arguments: str) -> dict[str, list[str]]:
        """The commands by their comments, without the program."""
        assert run(monkeypatch, *arguments) == 130
        said = capsys.readouterr().out
        assert f"saved in {place}/" in said
        lines = [line for line in said.splitlines() if "   # " in line]
        return {line.split("   # ")[1]: shlex.split(line, comments=True)[1:] for line in lines}

    goes_on, further = "goes on where it stopped", "search further"
    again = ["search", *given, "--deterministic", "--trials", "7"]
    found = printed(*again)
    assert found[goes_on] == again
    assert found[further][:-1] == again[:-1]
    assert found["write the report again"] == ["report", str(place)]
    assert found["write the best model at <= 90%"] == ["export", str(place), "--budget", "0.9"]
    for command in ("surgical", "sensitivity"):
        assert printed(command, *given)[goes_on] == [command, *given]


def test_a_mistake_is_shown_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "no\\[/such] :boom: [red]file.yaml"
    assert run(monkeypatch, "search", named) == 2
    assert f"{named}: 1 mistake" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    stop, before = Stop(), signal.getsignal(number)
    with stop_on_signals(stop, Console(file=io.StringIO())):
        signal.raise_signal(number)
        assert stop.reason == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_cluster_that_does_not_answer_is_said(
    folder: StudyFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unreachable(**settings: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")

    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    assert run(monkeypatch, "search", folder.path / CONFIG) == 2
    assert "192.0.2.1:6379" in capsys.readouterr().err


def test_every_command_has_help() -> None:
    names = [command.name for command in app.registered_commands]
    assert names == [
        "search",
        "surgical",
        "sensitivity",
        "report",
        "enqueue",
        "export",
        "apply",
        "evaluate",
        "refine",
        "status",
        "finalists",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "search.cli", "--help"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in names if name)
