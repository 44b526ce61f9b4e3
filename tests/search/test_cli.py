"""What the command line refuses, prints at the end, and exits with."""

from __future__ import annotations

import errno
import io
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from commands import run, study_on_disk, written
from rich.console import Console

from actors.types import RankfrontError
from search.cli import app
from search.cluster import connect
from search.folder import CONFIG, StudyFolder, summarise
from search.journal import JOURNAL
from search.runner import Stop
from search.sections import StopSection
from search.signals import stop_on_signals


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return study_on_disk(tmp_path)


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


def test_what_the_file_system_refuses_is_said_in_one_line(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no advice to make room; what is no answer of the system keeps its traceback."""
    error = OSError(errno.EROFS, "Read-only file system", "a/b")

    def refused(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("search.cli.report", refused)
    assert run(monkeypatch, "report", folder.path) == 2
    assert capsys.readouterr().err == "rankfront: Read-only file system (a/b)\n"
    error = OSError("a library's own words")
    with pytest.raises(OSError, match="own words"):
        run(monkeypatch, "report", folder.path)


def test_a_name_that_no_file_can_have_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "report", "n" * 300) == 2
    assert capsys.readouterr().err.startswith("rankfront: File name too long (")


def test_an_encoding_that_lacks_a_sign_ends_no_command(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    assert run(monkeypatch, "report", folder.path) == 0
    out.flush()
    assert "? dense" in out.buffer.getvalue().decode("latin-1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "no-such-study"], "no-such-study holds no study, nor does runs/no-such-study: no config"),
        (["report", "runs/nosuch"], "runs/nosuch holds no study, nor does runs/runs/nosuch: no config"),
        (
            ["status", "model"],
            "model holds no study, nor does runs/model: no config.yaml and prepared",
        ),
        (["report", "/no/such"], "/no/such holds no study: no config.yaml and prepared.json in it"),
        (["export"], "name a study, or a folder with --check"),
        (["export", "made-up"], "give one of --trial N, --budget B, --max-nll X and --all-front"),
        (["export", "made-up", "--trial", "1", "--budget", "0.9"], "give one of --trial N, --budget B"),
        (["export", "made-up", "--trial", "0", "--all-front"], "give one of --trial N, --budget B"),
        (["export", "made-up", "--trial", "77"], "trials 0..1"),
        (["export", "made-up", "--budget", "90"], "--budget 90: a share above 0, at most 1; 0.9 is 90%"),
        (["refine", "made-up", "--budget", "0"], "--budget 0: a share above 0"),
        (["refine", "made-up"], "give one of --trial N and --budget B\n"),
        (["evaluate", "made-up", "--budget", "1.01"], "--budget 1.01: a share above 0"),
        (["export", "made-up", "--budget", "0.01"], "the front reaches down to"),
        (["export", "made-up", "--max-nll", "0.01"], "--max-nll 0.01: no front point at or under it; the"),
        (["export", "made-up", "--check", "made-up"], "a study or --check FOLDER, not both"),
        (["export", "--check", "nowhere"], "nowhere: no such folder"),
        (["export", "--check", "."], "no export, there is no ranks.yaml in it"),
        (["evaluate", "runs", "--tasks", "arc_easy"], "neither a study (config.yaml) nor a model folder"),
        (["export", "made-up", "--trial", "0", "--set", "a=1"], "--set is for --check"),
        (["export", "--check", "new", "--trial", "1", "--format", "dense"], "--trial and --format: not with"),
        (
            ["export", "--check", "new", "--budget", "0.9", "--to", "x"],
            "--budget and --to: not with --check",
        ),
        (
            ["export", "--check", "new", "--max-nll", "3", "--all-front"],
            "--max-nll and --all-front: not",
        ),
        (["export", "--check", "new", "--variant", "a", "--config-only"], "--variant and --config-only: not"),
        (
            ["export", "made-up", "--trial", "1", "--config-only", "--format", "dense"],
            "export: --format: not with --config-only, which writes no model\n",
        ),
        (["status", "made-up", "--study", "other"], "--study other: of a database by its URL; made-up names"),
        (["apply", "none.yaml", "./model", "--to", "new"], "none.yaml"),
        (["apply", "twice.yaml", "./model", "--to", "new"], "'ranks' is there twice"),
        (["search", "config.yaml", "--set", "stop.trials"], "KEY=VALUE"),
        (
            ["search", "config.yaml", "--set", "stop.trials=[1"],
            "stop.trials: '[1' is no YAML value: while",
        ),
        (["search", "config.yaml", "--set", "stop={trials: 1, trials: 2}"], "'trials' is there twice"),
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
    (tmp_path / "twice.yaml").write_text("ranks: {a: 1}\nranks: {a: 2}\n")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize("given", [(), ("--trial", 77), ("--budget", 0.01), ("--trial", 0)])
def test_a_refused_refinement_writes_nothing(
    given: tuple[object, ...], folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No report either: it takes long, and another driver may be writing it."""
    before = {file: file.stat().st_mtime_ns for file in folder.path.rglob("*")}
    assert run(monkeypatch, "refine", folder.path, *given) == 2
    assert {file: file.stat().st_mtime_ns for file in folder.path.rglob("*")} == before


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


def test_a_search_without_a_single_score_fails(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summarise(folder, folder.open_study())
    unscored = tuple(row for row in summary.rows if not row.finished)
    none = replace(summary, rows=unscored, front=())
    reason = "no trial has a score, 16 failed; the last, trial 15: out of memory"
    monkeypatch.setattr("search.cli.search", lambda config, console: (folder, none, reason))
    assert run(monkeypatch, "search", folder.path / CONFIG) == 1
    assert reason in " ".join(capsys.readouterr().out.split())


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
    summary = summarise(folder, folder.open_study())
    few = folder.config.model_copy(update={"stop": StopSection(trials=1)})  # a walk leaves more than that
    moved = replace(folder, path=place, config=few)
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
    assert int(found[further][-1]) == len(summary.rows) + 40
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


def test_a_folder_to_write_in_a_home_of_nobody_is_refused(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of both commands that write models; a shell leaves such a word as it is."""
    export = ("export", folder.path, "--trial", 1, "--config-only", "--to")
    assert run(monkeypatch, *export, tmp_path / "new") == 0
    apply = ("apply", tmp_path / "new" / "ranks.yaml", tmp_path / "model", "--to")
    for command in (export, apply):
        assert run(monkeypatch, *command, "~nobody-is-called-so/x") == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "--to: '~nobody-is-called-so/x': there is no such home" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    stop, before = Stop(), signal.getsignal(number)
    with stop_on_signals(stop, Console(file=io.StringIO())):
        signal.raise_signal(number)
        assert stop.reason == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        (
            "auto",
            ConnectionError("Could not find any running Ray instance."),
            "RAY_ADDRESS=auto: no cluster answers there (Could not find",
        ),
        ("garbage", ValueError("Invalid address format: garbage"), "RAY_ADDRESS=garbage: Invalid address"),
        (
            "ray://127.0.0.1:1",
            None,
            "RAY_ADDRESS=ray://127.0.0.1:1: a driver joins the cluster itself; set it to HOST:PORT",
        ),
        (
            "auto",
            Exception("Timed\nout."),
            "RAY_ADDRESS=auto: cannot be joined: Timed out.",
        ),
        (
            None,
            Exception("The current node timed out during startup."),
            "timed out during startup.). Try again when it is less busy, or join a cluster that runs by "
            "RAY_ADDRESS=HOST:PORT or RAY_ADDRESS=auto",
        ),
    ],
)
def test_a_cluster_that_cannot_be_had_is_said(
    address: str | None,
    error: Exception | None,
    says: str,
    folder: StudyFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(**settings: object) -> None:
        assert error is not None, "Ray was asked"
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    assert run(monkeypatch, "search", folder.path / CONFIG) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("address", ["garbage", "192.0.2.1:port", ":6379"])
def test_an_address_that_is_none_is_refused_by_ray_as_expected(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RankfrontError, match=f"^RAY_ADDRESS={address}: .*; set it to HOST:PORT.*or auto"):
        connect()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_a_port_where_nothing_listens_is_said_at_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray alone would ask it for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, and not listened at: nobody else opens it meanwhile
        address = f"{host}:{free.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        start = time.monotonic()
        with pytest.raises(RankfrontError, match=f"^RAY_ADDRESS={address}: no cluster answers there .*auto"):
            connect()
        assert time.monotonic() - start < 20


def test_what_listens_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: the look at the port refuses no cluster."""
    asked: list[object] = []

    def init(**settings: object) -> None:
        asked.append(settings)
        raise ConnectionError("no Ray")

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        with pytest.raises(RankfrontError, match=r"no cluster answers there \(no Ray\)"):
            connect()
    assert len(asked) == 1


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
