"""Trials that were stopped at a stage: what is kept of them, and what it answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakes import (
    TARGETS,
    dies_before_the_state,
    every_sampler,
    open_study,
    plain,
    propose_and_complete,
    score_of,
    stored,
)
from optuna.trial import TrialState

from actors.types import Allocation, Score
from search.packing import RESULT
from search.view import Planned


def some_allocation(rank: int) -> Allocation:
    return Allocation.of({"layers.1.up_proj": rank, "layers.2.q_proj": rank}, TARGETS)


def part_of(planned: Planned, rival: int = 0) -> Score:
    """The score of a trial that was stopped at the first stage."""
    return replace(score_of(planned.allocation, tokens=25), stopped_by=rival, tasks={})


def test_a_stopped_trial_is_pruned_with_its_part_and_no_values(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    propose_and_complete(study, 1)
    planned = study.propose("random")
    study.prune(planned, part_of(planned))
    trial = stored(tmp_path)[1]
    assert (trial.state, trial.values) == (TrialState.PRUNED, None)
    score = Score.from_dict(trial.user_attrs[RESULT]["score"])
    assert (score, score.stopped_by, score.forward_tokens) == (part_of(planned), 0, 25)
    for driver in (study, open_study(tmp_path)):
        row = driver.rows()[1]
        assert (row.state, row.values, row.score, row.stopped_by) == ("PRUNED", None, score, 0)
        assert row.reason == "dominated by trial 0 after 25 tokens"
        assert driver.scored_as(planned.allocation) is None, "a part is no answer"
        assert driver.stopped_as(planned.allocation) == 1
        assert driver.in_flight() == []


def test_a_part_is_written_before_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    with dies_before_the_state(study, monkeypatch):
        study.prune(planned, part_of(planned))
    again = open_study(tmp_path)
    assert again.replay() == [planned.number], "what was written is enough to end it, in part"
    assert again.in_flight() == []
    assert again.stopped_as(planned.allocation) == planned.number
    assert [(row.state, row.values) for row in again.rows()] == [("PRUNED", None)]
    assert again.rows()[0].score == part_of(planned)


@every_sampler
def test_samplers_go_on_among_stopped_trials(sampler: str, tmp_path: Path) -> None:
    """Before, between and after whole ones, over a restart; numbers stay those of the storage."""
    study = open_study(tmp_path, sampler)
    for number in range(24):
        planned = study.propose(sampler)
        assert planned.number == number
        if number < 3 or number % 3 == 1:
            study.prune(planned, part_of(planned))
        else:
            study.complete(planned, score_of(planned.allocation))
        if number == 14:
            study = open_study(tmp_path, sampler)
    assert study.count(TrialState.PRUNED) == 10
    assert [trial.state for trial in stored(tmp_path)] == [TrialState[row.state] for row in study.rows()]
    assert all(trial.number not in (0, 1, 2) for trial in plain(tmp_path).best_trials)


def test_what_was_scored_in_part_can_be_enqueued(tmp_path: Path) -> None:
    """Someone wants it whole; once."""
    study = open_study(tmp_path)
    study.enqueue([(some_allocation(3), "random")])
    planned = study.propose("random")
    study.prune(planned, part_of(planned))
    assert study.enqueue([(some_allocation(3), "enqueued")]) == [1]
    assert study.enqueue([(some_allocation(3), "enqueued")]) == []
    assert study.origin(0) == "random"
    assert study.origin(1) == "enqueued"


def test_a_part_answers_for_an_equal_allocation(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    first = study.propose("random")
    study.prune(first, part_of(first, rival=8))
    second = study.propose("random")
    assert study.copy_score(second, 0) is None
    rows = open_study(tmp_path).rows()
    assert [(row.state, row.stopped_by, row.copied_from) for row in rows] == [
        ("PRUNED", 8, None),
        ("PRUNED", 8, 0),
    ]
    assert study.origin(0) == "enqueued", "another program's"
