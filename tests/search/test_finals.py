"""The test split: finished trials are scored on it once, into the evaluations table and nowhere else."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import MadeUpPool, open_study, propose_and_complete, score_of, stored
from rich.console import Console
from tiny_study import MACHINE, Tiny

import search.finals
import search.opening
from actors.harness_results import HarnessScore
from actors.samples import pack_floats
from actors.types import PreparationSpec
from search.evaluations import FILE, Evaluations
from search.finalist_table import finalist_cells
from search.finals import evaluate_study, reopened, score_finished, split_cells
from search.findings import front_cells, headline
from search.folder import CONFIG, PREPARED, StudyFolder, summarise
from search.journal import JOURNAL, lock_holder
from search.opening import Session
from search.pool import Job, Outcome
from search.records import Evaluation, HarnessEvaluation, StudySummary
from search.refine import comparison_cells
from search.runner import Stop


@dataclass(frozen=True)
class Prepared:
    fingerprints: dict[str, str]
    tokens: dict[str, int]


@dataclass(frozen=True)
class Folder:
    path: Path
    prepared: Prepared


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    return Folder(tmp_path, Prepared({"test": "f1"}, {"test.forward": 100}))


def answer(job: Job) -> Outcome:
    if job.key == 1:
        return Outcome(job, None, "made-up reason")
    return Outcome(job, replace(score_of(job.allocation, 2.0 + job.key), split="test"))


def test_what_a_crash_left_of_a_row_is_said(folder: Any) -> None:
    study, said = open_study(folder.path, "random"), []
    propose_and_complete(study, 3)
    score_finished(folder, study, [0, 2], MadeUpPool(answer), Stop(), print)
    table = folder.path / FILE
    table.write_bytes(table.read_bytes()[:-9])
    score_finished(folder, study, [0, 2], MadeUpPool(answer), Stop(), said.append)
    assert said[0] == "test split: scoring 1 trials, 100 tokens each"
    assert said[1].startswith("evaluations: dropped ")
    assert len(said) == 2


def test_the_world_is_told_while_trials_are_scored(folder: Any) -> None:
    """After each look at the pool, by when the scores that it brought are kept."""
    study, kept = open_study(folder.path, "random"), list[int]()
    propose_and_complete(study, 3)
    count = lambda: kept.append(len(Evaluations(folder.path, study.rows()).rows))  # noqa: E731
    score_finished(folder, study, [0, 2], MadeUpPool(answer), Stop(), print, look=count)
    assert kept == [1, 2]


def test_trials_are_scored_once_and_left_as_they_are(folder: Any) -> None:
    study = open_study(folder.path, "random")
    propose_and_complete(study, 4)
    before = [(t.state, t.values, t.user_attrs) for t in stored(folder.path)]
    pool, said = MadeUpPool(answer), []
    score_finished(folder, study, [0, 1, 3], pool, Stop(), said.append)
    assert {job.key for job in pool.submitted} == {0, 1, 3}
    assert {job.split for job in pool.submitted} == {"test"}
    assert [row.key for row in Evaluations(folder.path, study.rows()).rows] == [
        (0, "factors", "test", "f1"),
        (3, "factors", "test", "f1"),
    ]
    assert said == [
        "test split: scoring 3 trials, 100 tokens each",
        "trial 1 has no test score: made-up reason",
    ]
    again = MadeUpPool(answer)
    score_finished(folder, study, [0, 2, 3], again, Stop(), said.append)
    assert [job.key for job in again.submitted] == [2]
    assert [(t.state, t.values, t.user_attrs) for t in stored(folder.path)] == before


def test_the_table_shows_the_trials_that_were_asked_for(folder: Any) -> None:
    study = open_study(folder.path, "random")
    propose_and_complete(study, 3)
    score_finished(folder, study, [0, 2], MadeUpPool(answer), Stop(), print)
    rows, now = study.rows(), folder.prepared.fingerprints
    evaluations = Evaluations(folder.path, rows).rows
    summary = StudySummary("s", "m", study.objectives, rows, (), 0.0, (), evaluations, {}, fingerprints=now)
    (row,) = split_cells(summary, [2, 1]).rows
    assert row[0] == "2"
    assert row[2:] == ("4.000±0.010", "54.6", "60.0±16.3", "")
    kept = [float(cells[1].rstrip("%")) for cells in split_cells(summary, []).rows]
    assert len(kept) == 2
    assert kept == sorted(kept, reverse=True)


def test_one_window_has_no_standard_error_to_show(folder: Any) -> None:
    """In no table of what is measured after a search; nor in that of the front."""

    def of_one_window(job: Job) -> Outcome:
        score = score_of(job.allocation, 3.0 + job.key)
        text = replace(score.text, stderr=math.nan, windows=pack_floats([3.0 + job.key]))
        return Outcome(job, replace(score, split="test", text=text))

    study = open_study(folder.path, "random")
    for _ in range(2):
        planned = study.propose("random")
        score = of_one_window(Job(planned.number, planned.allocation)).score
        assert score is not None
        study.complete(planned, replace(score, split="search"))
    score_finished(folder, study, [0, 1], MadeUpPool(of_one_window), Stop(), print)
    rows, now = study.rows(), folder.prepared.fingerprints
    evaluations = Evaluations(folder.path, rows).rows
    found = (*evaluations, replace(evaluations[1], variant="refined-1"))
    summary = StudySummary("s", "m", study.objectives, rows, (0, 1), 0.0, (), found, {}, fingerprints=now)
    finalists = finalist_cells(summary, (1,))
    assert finalists is not None
    first, second = evaluations[0].score, evaluations[1].score
    compared = comparison_cells({"test": (first, second)})
    losses = [row[2] for row in split_cells(summary, [0, 1]).rows]
    assert sorted(losses) == ["3.000", "4.000"]
    [row] = finalists.rows
    assert (row[2], row[3], row[5], row[8]) == ("4.000", "4.000", "", "+0.0000")
    assert compared.rows[1] == ("test", "nll", "3.0000", "4.0000", "+1.0000")
    assert front_cells(summary).rows[0][2].lstrip("≈") in losses


@pytest.fixture
def prepared_in(study: Tiny, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The study is opened without Ray; the list says in which folders its factors were looked for."""
    looked: list[str] = []

    def prepare(spec: PreparationSpec, *arguments: Any) -> Any:
        looked.append(spec.cache)
        return study.folder.prepared

    @contextlib.contextmanager
    def replicas(session: Session, note: Any) -> Iterator[MadeUpPool]:
        assert lock_holder(session.folder.path) is not None
        nll = 5.0 if session.folder.prepared.fingerprints["test"] == "another" else 3.0

        def answer(job: Job) -> Outcome:
            study.asked.append((job.split, str(job.key)))
            return Outcome(job, replace(score_of(job.allocation, nll), split="test"))

        yield MadeUpPool(answer)

    monkeypatch.setattr(search.opening, "connect", lambda: MACHINE)
    monkeypatch.setattr(search.opening, "prepare", prepare)
    monkeypatch.setattr(search.finals, "replicas", replicas)
    return looked


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_copy_under_another_name_is_measured_itself(
    study: Tiny, prepared_in: list[str], tmp_path: Path
) -> None:
    """And the study it is a copy of, whose folder has the study's name, is not touched."""
    copy = tmp_path / "backup"
    shutil.copytree(study.folder.path, copy)
    before = content(study.folder.path)
    assert study.folder.path.name == study.folder.config.study
    summary, stopped = evaluate_study(StudyFolder.open(copy), [1], Console(file=io.StringIO()))
    assert (stopped, len(summary.rows)) == (None, 2)
    assert [row.trial for row in Evaluations(copy, summary.rows).rows] == [1]
    assert content(study.folder.path) == before
    assert prepared_in == [str(Path(study.folder.prepared.factor_store).parent)]


@pytest.mark.parametrize("named", ["old", "."])
def test_a_renamed_folder_is_no_new_study(
    study: Tiny, prepared_in: list[str], tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where it is named from inside."""
    renamed = study.folder.path.rename(tmp_path / "old")
    monkeypatch.chdir(renamed if named == "." else tmp_path)
    config = (renamed / CONFIG).read_bytes()
    with reopened(StudyFolder.open(Path(named)), Console(file=io.StringIO())) as session:
        assert session.folder.path.resolve() == renamed
        assert len(session.folder.open_study().rows()) == 2
    assert (renamed / CONFIG).read_bytes() == config, "only its driver changes it"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["old"]
    assert prepared_in == [str(Path(study.folder.prepared.factor_store).parent)]


def store_in(folder: Path, name: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "manifest.json").touch()
    return str(folder / name)


def prepared_with(study: Tiny, store: str) -> None:
    prepared = replace(study.folder.prepared, factor_store=store)
    (study.folder.path / PREPARED).write_text(json.dumps(prepared.to_dict()))


def test_factors_that_moved_with_their_study_are_found_beside_it(
    study: Tiny, prepared_in: list[str], tmp_path: Path
) -> None:
    """`runs` was fetched from a cluster: the store is not where it was made."""
    prepared_with(study, "/home/ubuntu/runs/factors/0123456789abcdef")
    store = store_in(study.folder.path.parent / "factors", "0123456789abcdef")
    folder = StudyFolder.open(study.folder.path)
    assert folder.prepared.factor_store == store
    with reopened(folder, Console(file=io.StringIO())):
        assert prepared_in == [str(Path(store).parent)]


def test_factors_of_a_study_that_is_named_from_elsewhere_are_found_where_they_were_made(
    study: Tiny, prepared_in: list[str], tmp_path: Path
) -> None:
    """By a link, or as a copy of its folder alone: they are not built again beside that."""
    prepared_with(study, store_in(tmp_path / "scratch", "0123456789abcdef"))
    link, copy, late = tmp_path / "home" / "link", tmp_path / "archive" / "copy", tmp_path / "late" / "copy"
    link.parent.mkdir()
    link.symlink_to(study.folder.path)
    for path in (copy, late):
        shutil.copytree(study.folder.path, path)
    for path in (link, copy):
        with reopened(StudyFolder.open(path), Console(file=io.StringIO())):
            assert prepared_in.pop() == str(tmp_path / "scratch")
    shutil.rmtree(tmp_path / "scratch")
    with reopened(StudyFolder.open(late), Console(file=io.StringIO())):
        assert prepared_in == [str(late.parent / "factors")], "built anew, where the study is now"


def evaluated(study: Tiny, *numbers: int, **prints: str) -> StudySummary:
    """What `rankfront evaluate` shows where the splits are those of the fingerprints `prints`."""
    prepared = study.folder.prepared
    prepared = replace(prepared, fingerprints={**prepared.fingerprints, **prints})
    study.folder = replace(study.folder, prepared=prepared)
    study.asked.clear()
    return evaluate_study(study.folder, numbers, Console(file=io.StringIO()))[0]


def test_scores_of_different_test_splits_are_kept_apart(study: Tiny, prepared_in: list[str]) -> None:
    """Where `scoring.tokens.test` is changed, and put back: no table mixes them, none is scored again."""
    before = study.folder.prepared.fingerprints["test"]

    def shown(summary: StudySummary) -> tuple[list[float | None], list[float | None], bool]:
        """Scores of both trials, those of the front in `front.json`, whether the headline compares any."""
        tests = [summary.test_score(number) for number in (0, 1)]
        front = json.loads((study.folder.path / "front.json").read_text())["front"]
        told = [member["test"] and member["test"]["nll"] for member in front]
        compared = any("on the test split" in line for line in headline(summary))
        return [test and test.text.nll for test in tests], told, compared

    assert shown(evaluated(study, 0, 1)) == ([3.0, 3.0], [3.0], True)
    assert shown(evaluated(study, 1, test="another")) == ([None, 5.0], [5.0], False)
    assert study.asked == [("test", "1")]
    assert shown(evaluated(study, 1, test=before)) == ([3.0, 3.0], [3.0], True)
    assert study.asked == []
    kept = pq.read_table(study.folder.path / "evaluations.parquet").to_pylist()
    assert [(row["trial"], row["fingerprint"]) for row in kept] == [(0, before), (1, before), (1, "another")]


def test_refined_factors_are_shown_by_their_scores_on_the_splits_as_they_are(folder: Any) -> None:
    study = open_study(folder.path, "random")
    propose_and_complete(study, 2)
    row = study.rows()[1]
    found = [
        Evaluation(1, variant, split, fingerprint, score_of(row.allocation, nll))
        for variant, split, fingerprint, nll in (
            ("factors", "test", "f1", 2.0),
            ("refined-1", "search", "s1", 1.0),
            ("refined-1", "search", "s0", 7.0),
            ("refined-1", "test", "f0", 8.0),
            ("refined-2", "search", "s0", 9.0),
        )
    ]
    now = {"test": "f1", "search": "s1"}
    summary = StudySummary(
        "s", "m", study.objectives, study.rows(), (), 0.0, (), tuple(found), {}, fingerprints=now
    )
    cells = finalist_cells(summary)
    assert cells is not None
    [shown] = cells.rows
    assert shown[3:] == ("2.000±0.010", "7.39", "1.000±0.010", "", "", "", "refined-1")


def test_scores_of_another_trial_of_the_same_number_do_not_count(
    study: Tiny, prepared_in: list[str], tmp_path: Path
) -> None:
    """The journal is lost and so is the table, the search begun anew, and then a backup found."""
    path = study.folder.path
    backup = (path / JOURNAL).read_bytes()
    evaluated(study, 1)
    gone = HarnessEvaluation(7, "factors", "h", HarnessScore("piqa", (), 1.0)).to_dict()
    gone["harness"]["metrics"] = [
        {"task": "piqa", "metric": "acc", "filter": "none", "value": 0.5, "stderr": None, "examples": 2}
    ]
    with (path / FILE).open("a") as stream:
        stream.write(json.dumps({**gone, "allocation": None}) + "\n")

    for lost in (JOURNAL, "trials.parquet"):
        (path / lost).unlink()
    opened, cost = study.folder.open_study(), study.folder.cost
    opened.enqueue([(cost.uniform(1.0), "dense"), (cost.uniform(0.4), "uniform")])
    for _ in range(2):
        planned = opened.propose("random")
        opened.complete(planned, score_of(planned.allocation, 4.0))
    new = summarise(study.folder, opened)
    assert new.test_score(1) is None
    assert (new.evaluations, new.harness) == ((), ())
    assert new.facts["evaluations left out"].startswith("2, of trials that are not in this study or have")
    evaluated(study, 1)
    assert study.asked == [("test", "1")]
    assert "evaluations left out" in (path / "report.html").read_text()

    (path / JOURNAL).write_bytes(backup)
    again = evaluated(study, 1)
    assert study.asked == []
    assert [each.allocation for each in again.evaluations] == [again.rows[1].allocation.key]
