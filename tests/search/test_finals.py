"""The test split: finished trials are scored on it once, into the evaluations table and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fakes import MadeUpPool, open_study, propose_and_complete, score_of, stored

from search.evaluations import Evaluations
from search.finals import score_finished, split_cells
from search.pool import Job, Outcome
from search.records import StudySummary
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


def test_trials_are_scored_once_and_left_as_they_are(folder: Any) -> None:
    study = open_study(folder.path, "random")
    propose_and_complete(study, 4)
    before = [(t.state, t.values, t.user_attrs) for t in stored(folder.path)]
    pool, said = MadeUpPool(answer), []
    score_finished(folder, study, [0, 1, 3], pool, Stop(), said.append)
    assert {job.key for job in pool.submitted} == {0, 1, 3}
    assert {job.split for job in pool.submitted} == {"test"}
    assert [row.key for row in Evaluations(folder.path).rows] == [
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
    summary = StudySummary(
        "s", "m", study.objectives, study.rows(), (), 0.0, (), Evaluations(folder.path).rows, {}
    )
    (row,) = split_cells(summary, [2, 1]).rows
    assert row[0] == "2"
    assert row[2:] == ("4.000±0.010", "54.6", "60.0±16.3", "")
    kept = [float(cells[1].rstrip("%")) for cells in split_cells(summary, []).rows]
    assert len(kept) == 2
    assert kept == sorted(kept, reverse=True)
