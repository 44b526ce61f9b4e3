"""Finalists of a tiny study, by a worker and a replica in this process; and who they are."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import MadeUpPool, open_study, propose_and_complete
from ray.exceptions import ActorDiedError, RayTaskError
from rich.console import Console
from tiny_study import MACHINE, Tiny
from typer.testing import CliRunner

import search.finalists
import search.opening
import search.session
from actors.types import Allocation, RankfrontError
from search.choosing import chosen, untold
from search.cli import app
from search.config import parse_config
from search.evaluations import Evaluations
from search.event_log import LOG
from search.events import Note
from search.finalist_table import finalist_cells
from search.finalists import finalists, reported, run_finalists
from search.folder import StudyFolder, summarise
from search.journal import driver_lock
from search.opening import Session
from search.pool import Job, Machine, Outcome
from search.records import StudySummary, TrialRow
from search.sections import FinalistSection


@pytest.fixture
def started(study: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The study is opened and its processes started without Ray; the list says which were."""
    started: list[str] = []

    @contextlib.contextmanager
    def reopened(folder: StudyFolder, console: Any) -> Iterator[Session]:
        with driver_lock(folder.path):
            yield Session(folder, MACHINE, console.print)

    @contextlib.contextmanager
    def replicas(session: Session, note: Note) -> Iterator[MadeUpPool]:
        started.append("replicas")
        note("replica started", replica="replica-0", starts=1)
        with study.refiner(session.folder, session.machine) as worker:

            def answer(job: Job) -> Outcome:
                return Outcome(job, worker.score(job.allocation, job.split, None))

            yield MadeUpPool(answer)

    @contextlib.contextmanager
    def refiner(folder: StudyFolder, machine: Any, workers: int, say: Any) -> Iterator[Any]:
        started.append("refiner")
        with study.refiner(folder, machine) as worker:
            yield worker

    for name, value in (("reopened", reopened), ("replicas", replicas), ("refiner", refiner)):
        monkeypatch.setattr(search.finalists, name, value)
    return started


def command(study: Tiny, *arguments: str, name: str = "finalists") -> str:
    """What `rankfront finalists`, or another command, printed.

    Raises:
        RankfrontError: as the command does.
    """
    result = CliRunner().invoke(app, [name, str(study.folder.path), *arguments])
    if isinstance(result.exception, RankfrontError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def evaluations(study: Tiny) -> Evaluations:
    return Evaluations(study.folder.path, study.folder.open_study().rows())


def test_a_finalist_is_scored_and_refined_once(study: Tiny, started: list[str]) -> None:
    path = study.folder.path
    before = study.folder.open_study().rows()
    command(study, "--budget", "0.99", "--no-refine")
    assert started == ["replicas"]
    assert sorted(study.asked) == [("test", None), ("test", None)], "the finalist and the dense model"
    events = [json.loads(line) for line in (path / LOG).read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "replica started", "stopped"]
    assert (events[0]["command"], events[2]["reason"]) == ("finalists", "done")

    out = command(study, "--budget", "0.99", "--budget", "0.98")
    assert started == ["replicas", "refiner"]
    found = study.refine()
    assert found.ended == "it was refined before", "what `rankfront refine` does, under the same name"
    rows = {(e.trial, e.variant, e.split): e.score for e in evaluations(study).rows}
    tested = {(0, "factors", "test"), (1, "factors", "test")}
    assert rows.keys() == tested | {(1, found.variant, "search"), (1, found.variant, "test")}
    assert study.asked[2:] == [("search", found.path.name), ("test", found.path.name)]
    assert "--trial N --variant VARIANT" in out
    own, test = before[1].score, rows[1, "factors", "test"]
    assert own is not None
    for score in (own, test, rows[1, found.variant, "search"], rows[1, found.variant, "test"]):
        assert f"{score.text.nll:.3f}±{score.text.stderr:.3f}" in out
    gap = rows[1, found.variant, "test"].minus(test, "nll")
    cells = finalist_cells(summarise(study.folder, study.folder.open_study()))
    assert cells is not None
    assert [row[0] for row in cells.rows] == ["0", "1"]
    assert cells.rows[1][-2:] == (f"{gap.mean:+.4f} ± {gap.stderr:.4f}", found.variant)

    command(study, "--count", "3")
    assert started == ["replicas", "refiner"], "all is there"
    assert study.folder.open_study().rows() == before
    assert "<h2>Refined finalists</h2>" in (path / "report.html").read_text()


def test_a_larger_text_chooses_among_trials_that_the_search_text_cannot_tell_apart(
    study: Tiny, started: list[str]
) -> None:
    path, opened = study.folder.path, study.folder.open_study()
    similar = {name: rank and rank - 1 for name, rank in study.row(1).allocation}
    opened.enqueue([(Allocation.of(similar, study.folder.prepared.targets), "seed")])
    planned = opened.propose("random")
    with study.refiner(study.folder, MACHINE) as worker:
        opened.complete(planned, worker.score(planned.allocation, "search", None))
    study.asked.clear()
    export = ("--budget", "0.99", "--config-only", "--to")
    note = "Note: the search text cannot tell trial"
    assert note in command(study, *export, str(path / "before"), name="export")

    out = command(study, "--budget", "0.99", "--no-refine")
    assert started == ["replicas"], "of both splits"
    assert study.asked[:2] == [("choice", None), ("choice", None)]
    rows = {(e.trial, e.split): e.score for e in evaluations(study).rows}
    best = min((1, 2), key=lambda number: rows[number, "choice"].text.nll)
    assert rows.keys() == {(1, "choice"), (2, "choice"), (0, "test"), (best, "test")}
    assert rows[1, "choice"].text.tokens > 2 * 128
    tokens = study.folder.prepared.tokens["choice.forward"]
    assert f"choice split: scoring 2 trials, {tokens:,} tokens each" in out
    summary = summarise(study.folder, study.folder.open_study())
    assert [row.number for row in chosen(summary, budget=0.99)] == [best]
    out = command(study, *export, str(path / "after"), name="export")
    assert f"Trial {best}: ranks.yaml" in out
    assert note not in out

    command(study, "--budget", "0.99", "--no-refine")
    assert started == ["replicas"], "all is there"

    prepared = study.folder.prepared
    larger = replace(prepared, fingerprints={**prepared.fingerprints, "choice": "larger"})
    summary = summarise(replace(study.folder, prepared=larger), study.folder.open_study())
    assert sorted(untold(summary, 0.99)) == [1, 2], "scores on what that text was before are no answers"


@pytest.mark.parametrize(
    ("error", "said", "closed"),
    [
        (RankfrontError("no step before it was better"), "no step before it was better", 0),
        (
            RayTaskError("refine", "File x\nLinAlgError: no such root", ValueError()),
            "LinAlgError: no such",
            1,
        ),
        (ActorDiedError(), "the worker's process died", 0),
    ],
    ids=["a mistake", "unforeseen", "a death"],
)
def test_a_finalist_that_cannot_be_refined_is_passed_over(
    study: Tiny,
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
    closed: int,
) -> None:
    """A process in which an error came that nobody foresaw may be broken: it is replaced."""
    opened = study.folder.open_study()
    opened.enqueue([(study.folder.cost.uniform(0.4), "uniform")])
    planned = opened.propose("random")
    with study.refiner(study.folder, MACHINE) as worker:
        opened.complete(planned, worker.score(planned.allocation, "search", None))
    usual = search.finalists.refine_by

    def refused(worker: Any, folder: StudyFolder, row: TrialRow, *others: Any) -> Any:
        if row.number == 1:
            raise error
        return usual(worker, folder, row, *others)

    monkeypatch.setattr(search.finalists, "refine_by", refused)
    (study.folder.path / "report.html").unlink(missing_ok=True)
    result = CliRunner().invoke(app, ["finalists", str(study.folder.path), "--count", "2"])
    assert "finalists: trial 1 is not refined, as is said above" in str(result.exception)
    assert f"trial 1 is not refined: {said}" in " ".join(result.output.split())
    assert study.closed == closed
    variants = {e.trial for e in evaluations(study).rows if e.variant.startswith("refined")}
    assert variants == {2}
    assert "Refined finalists" in (study.folder.path / "report.html").read_text()


def test_more_workers_than_ever_run_at_once_are_refused_before_anything_is_scored(
    study: Tiny, started: list[str]
) -> None:
    config = study.folder.config
    many = config.model_copy(update={"refine": config.refine.model_copy(update={"workers": 5})})
    folder, screen = replace(study.folder, config=many), Console(file=io.StringIO())
    with pytest.raises(RankfrontError, match=r"^refine\.workers: 5 never run at once: .*; 1 at most"):
        run_finalists(folder, FinalistSection(count=1), screen)
    assert started == []
    run_finalists(folder, FinalistSection(count=1, refine=False), screen)
    assert started == ["replicas"]


@pytest.mark.parametrize(
    ("finalists", "refused"), [({"count": 3}, True), ({"count": 3, "refine": False}, False), ({}, False)]
)
def test_a_search_is_refused_at_once_whose_finalists_could_not_be_refined(
    finalists: dict[str, Any], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*arguments: Any) -> Any:
        raise RankfrontError("the long work has begun")

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(2, 0, 2**40))
    monkeypatch.setattr(search.opening, "prepare", prepare)
    hub = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}
    raw = {"study": "s", "runs": str(tmp_path), **hub, "refine": {"workers": 3}, "finalists": finalists}
    words = r"^refine\.workers: 3 never run at once: .* 2 at most" if refused else "the long work has begun"
    with pytest.raises(RankfrontError, match=words):
        search.session.search(parse_config(raw), Console(file=io.StringIO()))
    assert not (tmp_path / "s").exists()


def test_an_error_of_our_own_leaves_a_report(study: Tiny) -> None:
    (study.folder.path / "report.html").unlink(missing_ok=True)
    with pytest.raises(ZeroDivisionError), reported(study.folder, study.folder.open_study()):
        raise ZeroDivisionError
    assert (study.folder.path / "report.html").exists()


def test_what_was_not_asked_for_is_said(study: Tiny, started: list[str]) -> None:
    with pytest.raises(RankfrontError, match="give --budget B or --count N, or set finalists"):
        command(study)
    with pytest.raises(RankfrontError, match=r"--budget 90: a share above 0, at most 1; 0\.9 is 90%"):
        command(study, "--budget", "90")
    with pytest.raises(RankfrontError, match="the front has no compressed model"):
        command(study, "--budget", "0.01")
    assert started == []


@pytest.mark.parametrize(
    ("section", "places"),
    [
        ({"count": 1}, [0]),
        ({"count": 3}, [0, 2, 4]),
        ({"count": 99}, [0, 1, 2, 3, 4]),
        ({}, []),
    ],
)
def test_a_count_is_spread_over_the_front(tmp_path: Path, section: dict[str, int], places: list[int]) -> None:
    summary = made_up(tmp_path)
    said: list[str] = []
    found = finalists(summary, FinalistSection(**section), said.append)
    assert [row.number for row in found] == [summary.front[place] for place in places]
    assert said == []


def test_budgets_name_the_best_at_or_under_each(tmp_path: Path) -> None:
    summary = made_up(tmp_path)
    rows = [summary.rows[number] for number in summary.front]
    smallest = min(row.budget_model for row in rows)
    said: list[str] = []
    section = FinalistSection(budgets=(smallest, 1.0, smallest / 2))
    found = finalists(summary, section, said.append)
    best = min(rows, key=lambda row: row.score.text.nll)
    least = next(row for row in rows if row.budget_model == smallest)
    assert {row.number for row in found} == {best.number, least.number}
    assert len(said) == 1
    assert f"--budget {smallest / 2}: no front point at or under it" in said[0]


def made_up(folder: Path) -> StudySummary:
    """Five compressed trials, all taken for the front."""
    study = open_study(folder, "random")
    propose_and_complete(study, 5)
    rows = study.rows()
    order = tuple(row.number for row in sorted(rows, key=lambda row: -row.budget_model))
    return StudySummary("s", "m", study.objectives, rows, order, 0.0, (), (), {})
