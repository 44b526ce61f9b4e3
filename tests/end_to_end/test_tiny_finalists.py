"""A search whose config names finalists, and lm-evaluation-harness on what it leaves: real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from studies import Study

from search.evaluations import Evaluations
from search.folder import StudyFolder
from search.records import TrialRow


def rows(folder: Path) -> tuple[TrialRow, ...]:
    return StudyFolder.open(folder).read_study().rows()


@pytest.mark.slow  # three commands that start Ray
def test_a_search_ends_with_its_finalists_and_they_are_asked_tasks(tmp_path: Path) -> None:
    settings = {"steps": 2, "tokens": 64, "warmup": 1, "held_out": 64, "evaluate_every": 1}
    more = {"stop": {"trials": 4}, "refine": settings, "finalists": {"count": 1}}
    study = Study(tmp_path, "followed", None, **more)
    ended = study.run("search", study.config)
    assert ended.code == 0, ended.err
    assert "finalist 1 of 1: refining trial" in ended.out
    evaluations = Evaluations(study.folder, rows(study.folder))
    [(trial, variant)] = {(e.trial, e.variant) for e in evaluations.rows if e.variant != "factors"}

    again = study.run("search", study.config)
    assert again.code == 0, again.err
    assert "refining" not in again.out

    (tmp_path / "own").mkdir()
    tasks = tiny.tiny_harness_task(tmp_path / "own", 6)
    asked = ("--tasks", "tiny_piqa", "--include-path", tasks, "--trial", trial)
    ended = study.run("evaluate", study.folder, *asked)
    assert ended.code == 0, ended.err
    evaluations = Evaluations(study.folder, rows(study.folder))
    found = {(e.trial, e.variant): e.score.metrics for e in evaluations.harness}
    assert found.keys() == {(trial, "factors"), (trial, variant)}
    assert all(metric.examples == 6 for metrics in found.values() for metric in metrics)
