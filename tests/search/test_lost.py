"""Failures that say nothing of the model, as of a replica that died: what failed so is open, not known."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import run, study_on_disk, trials, written
from fakes import (
    TARGETS,
    MadeUpPool,
    cost_model,
    dies_before_the_state,
    open_study,
    plain,
    runner,
    states,
    stored,
)

from actors.types import Allocation
from search.packing import RESULT
from search.pool import Job, Outcome
from search.runner import HOPELESS
from search.study import SearchStudy

OUT_OF_MEMORY = "CUDA out of memory (attempt 2 of 2)"
SEED = Allocation.of({"layers.1.up_proj": 3, "layers.2.q_proj": 3}, TARGETS)
ASKED = [
    (Allocation.dense(TARGETS), "dense"),
    *((cost_model().uniform(share), "uniform") for share in (0.9, 0.5)),
    (SEED, "seed"),
]


def lost(job: Job) -> Outcome:
    return Outcome(job, None, OUT_OF_MEMORY, lost=True)


def failing(folder: Path) -> SearchStudy:
    """The study after a run whose replicas had too little memory for any of what was asked for."""
    study = open_study(folder)
    assert study.enqueue(ASKED) == [0, 1, 2, 3]
    runner(study, MadeUpPool(lost), trials=4).run()
    assert states(study) == ["FAIL"] * 4
    return study


def test_the_next_run_scores_all_that_was_asked_for_and_asks_once(tmp_path: Path) -> None:
    """However often it starts, and at whatever state of the new trials."""
    failing(tmp_path)
    assert open_study(tmp_path).enqueue(ASKED) == [4, 5, 6, 7]
    assert open_study(tmp_path).enqueue(ASKED) == [], "they wait"
    open_study(tmp_path).propose("sampler")
    study = open_study(tmp_path)
    assert study.enqueue(ASKED) == [], "one runs"
    runner(study, MadeUpPool(), trials=8).run()
    assert states(study) == ["FAIL"] * 4 + ["COMPLETE"] * 4
    assert [(row.allocation, row.origin) for row in study.rows()[4:]] == ASKED
    assert open_study(tmp_path).enqueue(ASKED) == [], "they are scored"


def test_what_is_lost_again_is_asked_for_again(tmp_path: Path) -> None:
    study = failing(tmp_path)
    study.enqueue(ASKED)
    runner(study, MadeUpPool(lost), trials=8).run()
    assert study.enqueue(ASKED) == [8, 9, 10, 11]


@pytest.mark.parametrize("reason", ["nll is nan on the search split", OUT_OF_MEMORY])
def test_a_failure_that_is_not_said_to_be_lost_is_final(tmp_path: Path, reason: str) -> None:
    """One of the model, and one that an older version recorded. The dense model is always asked for."""
    study = open_study(tmp_path)
    study.enqueue(ASKED)
    runner(study, MadeUpPool(lambda job: Outcome(job, None, reason)), trials=4).run()
    assert [trial.user_attrs[RESULT] for trial in stored(tmp_path)] == [{"reason": reason}] * 4
    assert open_study(tmp_path).enqueue(ASKED) == [4]


def test_the_twins_of_a_lost_trial_are_lost(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    runner(study, MadeUpPool(lost), trials=2).run()
    assert [trial.user_attrs[RESULT] for trial in stored(tmp_path)] == [
        {"reason": OUT_OF_MEMORY, "lost": True}
    ] * 2


def test_a_driver_that_dies_as_it_records_a_loss_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is written, the state is not: the next driver enqueues before it ends that trial."""
    study = open_study(tmp_path)
    study.enqueue(ASKED[3:])
    planned = study.propose("sampler")
    with dies_before_the_state(study, monkeypatch):
        study.fail(planned.number, OUT_OF_MEMORY, lost=True)
    again = open_study(tmp_path)
    assert again.enqueue(ASKED[3:]) == [1]
    assert again.replay() == [0]
    assert stored(tmp_path)[0].user_attrs[RESULT] == {"reason": OUT_OF_MEMORY, "lost": True}
    assert again.enqueue(ASKED[3:]) == []


def test_losses_end_a_search_without_a_score_as_other_failures_do(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    reason = runner(study, MadeUpPool(lost), trials=200).run()
    assert reason.startswith("no trial has a score, ")
    assert reason.endswith(OUT_OF_MEMORY)
    assert HOPELESS <= study.started <= HOPELESS + 4
    assert {row.reason for row in study.rows()} == {OUT_OF_MEMORY}


def test_the_command_takes_lost_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study_on_disk(tmp_path)
    file = written(tmp_path / "mine.yaml", {"layers.0.q_proj": 3})
    assert run(monkeypatch, "enqueue", folder.path, file) == 0
    runner(folder.open_study(), MadeUpPool(lost), trials=3).run()
    capsys.readouterr()
    assert run(monkeypatch, "enqueue", folder.path, file) == 0
    assert "Enqueued as trials: 3" in capsys.readouterr().out
    assert [trial.state.name for trial in trials(folder)[2:]] == ["FAIL", "WAITING"]
