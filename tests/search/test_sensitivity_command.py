"""`rankfront sensitivity` without workers: what it writes and says, what it refuses, how it is stopped."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import (
    MODEL_PARAMETERS,
    TARGETS,
    MadeUpPool,
    energy_of,
    score_of,
    write_store,
)
from rich.console import Console

import search.opening
import search.replicas
import search.sensitivity
from actors.types import Allocation, Prepared, RankfrontError
from search.alone import FILE
from search.cli import main
from search.config import Config, parse_config
from search.event_log import LOG
from search.journal import JOURNAL, driver_lock
from search.pool import Job, Machine, Outcome
from search.sensitivity import sensitivity

SHARES = (0.75, 0.25)
PRINTS = {"search": "s" * 64, "factors": "f" * 64}
DENSE = Allocation.dense(TARGETS)
COUNT = 1 + len(SHARES) * len(TARGETS)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("some words of text\n" * 2_000)
    return parse_config(
        {
            "study": "made-up",
            "runs": str(tmp_path / "runs"),
            "model": {"source": str(tmp_path / "model")},
            "text": {"source": str(tmp_path / "text.txt")},
            "factors": {"bias": "none"},
            "sensitivity": {"shares": list(SHARES)},
        }
    )


class Machinery:
    """Stands for Ray: a preparation that is done at once, and a pool of our own."""

    def __init__(self, folder: Path) -> None:
        self.fingerprints = dict.fromkeys(("model", "tokenizer", "calibration", "test"), "0" * 64) | PRINTS
        self.store = write_store(
            folder / "store", {t.name: {m: energy_of(t) for m in ("feature", "curvature")} for t in TARGETS}
        )
        self.answer: Callable[[Job], Outcome] | None = None
        self.pools: list[MadeUpPool] = []

    def prepare(self, *arguments: Any) -> Prepared:
        check: Callable[[Mapping[str, str]], None] = arguments[5]
        check(self.fingerprints)
        sizes = dict.fromkeys(("search", "test", "search.forward", "test.forward", "calibration"), 100)
        return Prepared(
            model_folder="",
            factor_store=str(self.store),
            targets=TARGETS,
            model_parameters=MODEL_PARAMETERS,
            fingerprints=self.fingerprints,
            tokens=sizes,
            examples={"search": {}, "test": {}},
            seconds={},
            reused=False,
        )

    def pool(self, *arguments: Any) -> MadeUpPool:
        self.pools.append(MadeUpPool(self.answer))
        return self.pools[-1]


@pytest.fixture
def machinery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machinery:
    made = Machinery(tmp_path)
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=2, gpus=0, memory=2**34))
    monkeypatch.setattr(search.opening, "prepare", made.prepare)
    monkeypatch.setattr(search.replicas, "Pool", made.pool)
    return made


@pytest.fixture
def file(config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture
def command(file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`rankfront sensitivity` on the config, with options; its exit code."""

    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["rankfront", "sensitivity", str(file), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_the_command_writes_its_files_and_says_what_they_show(
    command: Callable[..., int],
    config: Config,
    machinery: Machinery,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command() == 0
    said = capsys.readouterr().out
    for part in ("Lose least", "Lose most", "By module type", "sensitivity.html", str(config.folder)):
        assert part in said
    written = {path.name for path in config.folder.iterdir()}
    assert {FILE, "sensitivity.parquet", "sensitivity.html", "sensitivity.png"} <= written
    assert JOURNAL not in written
    lines = pq.read_table(config.folder / "sensitivity.parquet").to_pylist()
    assert len(lines) == COUNT - 1
    assert all(line["nll_increase"] > 0 for line in lines)
    assert command("--set", "sensitivity.shares=[0.75, 0.5]") == 0
    [_, second] = machinery.pools
    assert len(second.submitted) == len(TARGETS), "one share is known"
    assert command() == 0
    assert len(machinery.pools) == 2, "no replica is started for nothing"


def test_titles_have_the_share_that_was_configured(
    command: Callable[..., int],
    config: Config,
    machinery: Machinery,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("--set", "sensitivity.shares=[0.125]") == 0
    for shown in (capsys.readouterr().out, (config.folder / "sensitivity.html").read_text()):
        assert "alone at 12.5% of its parameters" in " ".join(shown.split())


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_command_says_how_to_go_on(
    file: Path,
    config: Config,
    machinery: Machinery,
    name: str,
    code: int,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import signal

    def answer(job: Job) -> Outcome:
        if job.key == 3:
            signal.raise_signal(signal.Signals[name])
        return Outcome(job, score_of(job.allocation))

    machinery.answer = answer
    assert command("--set", "replicas.count=1") == code
    said = capsys.readouterr().out
    assert f"Stopped: {name}" in said
    assert f"sensitivity {file} --set replicas.count=1   # goes on where it stopped" in said
    assert len((config.folder / FILE).read_text().splitlines()) == 4
    lines = pq.read_table(config.folder / "sensitivity.parquet").to_pylist()
    assert [line["reason"] for line in lines].count("not scored yet") == COUNT - 4


@pytest.mark.parametrize("name", ["sensitivity", "search", "surgical"])
def test_a_signal_as_replicas_are_made_leaves_none_behind(
    file: Path, machinery: Machinery, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[MadeUpPool] = []

    def pool(*arguments: Any) -> MadeUpPool:
        import signal

        signal.raise_signal(signal.SIGINT)
        return machinery.pool(*arguments)

    monkeypatch.setattr(search.replicas, "Pool", pool)
    monkeypatch.setattr(MadeUpPool, "close", lambda pool: closed.append(pool))
    monkeypatch.setattr(sys, "argv", ["rankfront", name, str(file), "--set", "surgical.skip_blocks=0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert closed == machinery.pools != []


def test_it_tells_the_log_of_the_study(config: Config, machinery: Machinery) -> None:
    sensitivity(config, Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (config.folder / LOG).read_text().splitlines()]
    assert [(line["event"], line.get("command"), line.get("reason")) for line in lines] == [
        ("started", "sensitivity", None),
        ("stopped", None, "done"),
    ]


def test_a_second_process_is_refused(file: Path, config: Config, machinery: Machinery) -> None:
    config.folder.mkdir(parents=True)
    with driver_lock(config.folder), pytest.raises(RankfrontError, match="has a driver already"):
        sensitivity(config, Console(file=io.StringIO()))


def test_a_torn_tail_is_said_aloud(
    config: Config, machinery: Machinery, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivity(config, Console(file=io.StringIO()))
    path = config.folder / FILE
    path.write_bytes(path.read_bytes()[:-9])
    out = io.StringIO()
    sensitivity(config, Console(file=out))
    assert "sensitivity: dropped" in out.getvalue()
    assert len(machinery.pools[-1].submitted) == 1


def test_before_its_first_trial_a_study_may_still_change(config: Config, machinery: Machinery) -> None:
    """Sensitivity comes before a search: what it found may change the space, the text, the method."""
    sensitivity(config, Console(file=io.StringIO()))
    machinery.fingerprints["search"] = "x" * 64
    other = config.model_copy(update={"objectives": ("budget.linear", "nll")})
    with search.opening.opened(other, Console(file=io.StringIO())) as session:
        assert session.folder.open_study().rows() == ()
    assert "budget.linear" in (config.folder / "config.yaml").read_text()
    with search.opening.opened(config, Console(file=io.StringIO())):
        pass
    with search.opening.opened(other, Console(file=io.StringIO())) as session:
        session.folder.open_study().enqueue([(DENSE, "dense")])
    with (
        pytest.raises(RankfrontError, match="objectives: was"),
        search.opening.opened(config, Console(file=io.StringIO())),
    ):
        pass


def test_beside_a_study_it_obeys_the_study_and_leaves_it_alone(config: Config, machinery: Machinery) -> None:
    out = Console(file=io.StringIO())
    with search.opening.opened(config, out) as session:
        study = session.folder.open_study()
        study.enqueue([(DENSE, "dense")])
        planned = study.propose("random")
        study.complete(planned, score_of(planned.allocation))
    before = (config.folder / JOURNAL).read_bytes()
    _, table, _ = sensitivity(config, out)
    assert table is not None
    assert (config.folder / JOURNAL).read_bytes() == before
    other = config.model_copy(update={"storage": "factored"})
    with pytest.raises(RankfrontError, match="storage: was"):
        sensitivity(other, out)
    machinery.fingerprints["search"] = "x" * 64
    with pytest.raises(RankfrontError, match="search: the content differs"):
        sensitivity(config, out)


def test_spectra_that_cannot_be_read_are_found_before_the_long_work(
    config: Config, machinery: Machinery
) -> None:
    (machinery.store / "manifest.json").unlink()
    with pytest.raises(RankfrontError, match="factor store"):
        sensitivity(config, Console(file=io.StringIO()))
    assert machinery.pools == []


@pytest.mark.parametrize(
    ("shares", "says"),
    [([], "at least 1"), ([1.0], "less than 1"), ([0.0], "greater than 0"), ([0.5, 0.5], "there twice")],
)
def test_shares_that_make_no_sense_are_refused(config: Config, shares: list[float], says: str) -> None:
    raw = config.model_dump(mode="json") | {"sensitivity": {"shares": shares}}
    with pytest.raises(RankfrontError, match=f"sensitivity.shares.*{says}"):
        parse_config(raw)
