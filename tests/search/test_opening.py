"""Opening a study: what its preparation says is on the screen, what it runs on, what is left of a failure."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import MODEL_PARAMETERS, TARGETS, score_of
from openings import PREPARED, config_of
from rich.console import Console

import search.opening
import search.replicas
from actors.types import Prepared, RankfrontError
from search.database import open_database
from search.folder import CONFIG, StudyFolder
from search.identity import FIXED_FINGERPRINTS
from search.journal import JOURNAL, LOCK, open_journal
from search.pool import Machine
from search.study import IDENTITY


def test_all_that_the_preparation_says_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets too, which a terminal's markup would swallow."""
    lines = ["model: no family of its own for 'x': every linear layer is a target", "model: ./a[b]/[red]c"]

    def prepare(spec: Any, machine: Any, count: int, say: Any, *rest: Any) -> Prepared:
        for line in lines:
            say(line)
        raise RankfrontError("enough")

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", prepare)
    shown = io.StringIO()
    config = config_of(tmp_path)
    with pytest.raises(RankfrontError, match="enough"), search.opening.opened(config, Console(file=shown)):
        pass
    assert [line.partition(" s  ")[2] for line in shown.getvalue().splitlines()] == lines
    assert not config.folder.exists()


@pytest.mark.parametrize("database", [None, "${STUDIES}"], ids=["journal", "database"])
def test_what_was_begun_without_a_trial_follows_the_config(
    database: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a search leaves it that was stopped at once: neither directions nor their number stay."""
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    prints = iter(f"f{number}" for number in range(9))

    def prepare(spec: Any, machine: Any, count: int, say: Any, bar: Any, check: Any, *rest: Any) -> Prepared:
        found = dict.fromkeys(FIXED_FINGERPRINTS, next(prints))
        check(found)
        return replace(
            PREPARED, targets=TARGETS, model_parameters=MODEL_PARAMETERS, fingerprints=found, reused=False
        )

    def opening(*objectives: str) -> contextlib.AbstractContextManager[search.opening.Session]:
        scoring = {"tasks": ["boolq"]}
        config = config_of(tmp_path, database=database, objectives=objectives, scoring=scoring)
        return search.opening.opened(config, Console(file=io.StringIO()))

    monkeypatch.setattr(search.opening, "prepare", prepare)
    for objectives in (("budget.model", "nll"), ("nll", "budget.linear", "reasoning.acc")):
        with opening(*objectives) as session:
            assert session.folder.open_study().rows() == ()
    with opening("budget.model", "reasoning.acc") as session:
        study = session.folder.open_study()
        planned = study.propose("random")
        study.complete(planned, score_of(planned.allocation))
        plain = optuna.load_study(study_name="s", storage=session.folder._storage())
        assert [direction.name for direction in plain.directions] == ["MINIMIZE", "MAXIMIZE"]
        assert study.signs.tolist() == [1.0, -1.0]
        assert [trial.number for trial in plain.best_trials] == [row.number for row in study.front] == [0]
        if database is not None:
            assert plain.user_attrs[IDENTITY]["config"]["objectives"] == ["budget.model", "reasoning.acc"]
    before = content(tmp_path)
    with pytest.raises(RankfrontError, match="objectives: was"), opening("budget.model", "nll"):
        pass
    assert content(tmp_path) == before


@pytest.mark.parametrize("database", [None, "${STUDIES}"], ids=["journal", "database"])
def test_what_is_refused_after_the_preparation_saves_nothing(
    database: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", lambda *_: replace(PREPARED, targets=TARGETS))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")

    def opening(*check: Any, **stop: int) -> contextlib.AbstractContextManager[search.opening.Session]:
        config = config_of(tmp_path, database=database, stop=stop)
        return search.opening.opened(config, Console(file=io.StringIO()), None, *check)

    def check(session: search.opening.Session) -> None:
        assert session.folder.prepared.targets == TARGETS
        raise RankfrontError("not these targets")

    with pytest.raises(RankfrontError, match="not these targets"), opening(check, trials=7):
        pass
    assert not (tmp_path / "s").exists()
    with opening(trials=7) as session:
        session.folder.open_study().propose("random")
    before = content(tmp_path)
    with pytest.raises(RankfrontError, match="not these targets"), opening(check, trials=9):
        pass
    assert content(tmp_path) == before


def test_what_a_command_refuses_is_refused_before_the_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: what it says is not said again of what was prepared."""
    done = replace(PREPARED, targets=TARGETS, reused=False)
    happened: list[str] = []

    def prepare(*arguments: Any) -> Prepared:
        foresee = arguments[-1]
        foresee(done)
        foresee(done)  # a build that was begun again
        happened.append("factors")
        return done

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", prepare)

    def refuse(session: search.opening.Session) -> None:
        raise RankfrontError(f"not {len(session.folder.cost.targets)} targets")

    def agree(session: search.opening.Session) -> None:
        happened.append("asked")

    config = config_of(tmp_path)
    with pytest.raises(RankfrontError, match=f"not {len(TARGETS)} targets"):
        search.opening.opened(config, Console(file=io.StringIO()), None, refuse).__enter__()
    assert happened == []
    assert not config.folder.exists()
    with search.opening.opened(config, Console(file=io.StringIO()), None, agree):
        assert happened == ["asked", "factors"]


def test_trials_that_another_program_added_are_not_taken_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study in a database that no driver prepared: its trials bind all the same."""
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", lambda *_: PREPARED)
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    storage = open_database("${STUDIES}")
    optuna.create_study(study_name="s", storage=storage, directions=["maximize"]).enqueue_trial({"x": 1})
    config = config_of(tmp_path, database="${STUDIES}")
    with (
        pytest.raises(RankfrontError, match=r"'s': its objectives are unnamed \(maximize\); those of this"),
        search.opening.opened(config, Console(file=io.StringIO())),
    ):
        pass
    assert not config.folder.exists()


@pytest.mark.parametrize("to", [None, "${OTHERS}"], ids=["journal", "another"])
@pytest.mark.parametrize("has", ["none", "one", "unknown"])
def test_a_study_leaves_a_database_that_is_known_to_have_no_trial_of_it(
    has: str, to: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", lambda *_: replace(PREPARED, targets=TARGETS))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    monkeypatch.setenv("OTHERS", f"sqlite:///{tmp_path / 'others.db'}")
    config = config_of(tmp_path, database="${STUDIES}")
    with search.opening.opened(config, Console(file=io.StringIO())) as session:
        if has == "one":
            session.folder.open_study().propose("random")
    if has == "unknown":
        monkeypatch.delenv("STUDIES")
    refusal = pytest.raises(
        RankfrontError, match=rf"database: was '\${{STUDIES}}', now {re.escape(repr(to))}"
    )
    with (
        contextlib.nullcontext() if has == "none" else refusal,
        search.opening.opened(config_of(tmp_path, database=to), Console(file=io.StringIO())) as session,
    ):
        assert session.folder.open_study().propose("random").number == 0


def content(path: Path) -> dict[str, bytes]:
    """Every file but the locks, which say when they were taken."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LOCK)
    return {str(file): file.read_bytes() for file in files}


def test_a_study_in_a_database_is_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another machine: what it was begun with is in the database, and binds the config there too."""
    prints = dict.fromkeys(FIXED_FINGERPRINTS, "f1")
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")

    def drive(runs: str, fingerprint: str = "f1", **changes: Any) -> int:
        def prepare(
            spec: Any, machine: Any, count: int, say: Any, bar: Any, check: Any, *rest: Any
        ) -> Prepared:
            check({**prints, "search": fingerprint})
            return replace(PREPARED, targets=TARGETS, fingerprints=prints)

        monkeypatch.setattr(search.opening, "prepare", prepare)
        config = config_of(tmp_path, **{"runs": str(tmp_path / runs), "database": "${STUDIES}", **changes})
        with search.opening.opened(config, Console(file=io.StringIO())) as session:
            planned = session.folder.open_study().propose("random")
            assert not (config.folder / JOURNAL).exists()
            return planned.number

    assert drive("here") == 0
    assert drive("there", sampler={"name": "random"}) == 1
    with pytest.raises(RankfrontError, match="objectives: was"):
        drive("there", objectives=["budget.linear", "nll"])
    with pytest.raises(RankfrontError, match="search: the content differs"):
        drive("elsewhere", "f2")
    with pytest.raises(RankfrontError, match=r"database: was '\${STUDIES}', now None"):
        drive("there", database=None)
    (tmp_path / "journal" / "s").mkdir(parents=True)
    (tmp_path / "journal" / "s" / CONFIG).write_text(config_of(tmp_path).to_yaml())
    journal = open_journal(tmp_path / "journal" / "s")
    optuna.create_study(study_name="s", storage=journal).enqueue_trial({"x": 1})
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'others.db'}")
    with pytest.raises(RankfrontError, match="database: was None, now"):
        drive("journal")
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    assert StudyFolder.open(tmp_path / "there" / "s").open_study().propose("random").number == 2
