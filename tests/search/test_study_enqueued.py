"""Trials that others enqueue, start or end in a study while it is driven."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
from fakes import (
    TARGETS,
    cost_model,
    loss,
    open_study,
    plain,
    propose_and_complete,
    score_of,
    space_of,
    stored,
)
from optuna.trial import FrozenTrial, TrialState

from actors.types import Allocation, RankfrontError
from search.packing import RESULT, UNSCORED
from search.runner import current_hypervolume, hypervolumes, minimised
from search.study import TakenError
from search.view import Planned


def some_allocation(rank: int) -> Allocation:
    return Allocation.of({"layers.1.up_proj": rank, "layers.2.q_proj": rank}, TARGETS)


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_what_was_enqueued_can_be_a_parent(tmp_path: Path, sampler: str) -> None:
    """Its parameters were given: a genetic sampler is not asked for them, and counts it all the same."""
    study = open_study(tmp_path, sampler, population=6)
    study.enqueue((some_allocation(rank), "seed") for rank in (3, 9, 5))
    propose_and_complete(study, 7)
    [name] = {key for trial in stored(tmp_path) for key in trial.system_attrs if key.endswith(":generation")}
    assert [trial.system_attrs[name] for trial in stored(tmp_path)] == [0] * 6 + [1]
    assert [trial.params for trial in stored(tmp_path)[:3]] == [
        space_of(cost_model()).params(some_allocation(rank)) for rank in (3, 9, 5)
    ]


def test_enqueued_trials_come_first_and_in_order(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    propose_and_complete(study, 2)
    wanted = [some_allocation(rank) for rank in (3, 9, 5)]
    assert study.enqueue((allocation, "enqueued") for allocation in wanted) == [2, 3, 4]
    assert study.waiting
    assert study.started == 2
    assert [trial.state.name for trial in stored(tmp_path)[2:]] == ["WAITING"] * 3
    assert [study.propose("random") for _ in wanted] == [Planned(2 + i, a) for i, a in enumerate(wanted)]
    assert not study.waiting
    assert [row.origin for row in study.rows()] == ["sampler", "sampler", *["enqueued"] * 3]
    assert study.propose("random").number == 5


def test_known_allocations_are_not_enqueued_again(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    pairs = [(some_allocation(rank), "uniform") for rank in (3, 9)]
    assert study.enqueue([*pairs, *pairs]) == [0, 1]
    propose_and_complete(study, 1)
    assert study.enqueue(pairs) == []
    assert open_study(tmp_path).enqueue([*pairs, (some_allocation(5), "uniform")]) == [2]


def test_numbers_of_enqueued_trials_hold_when_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running driver may add a trial at the very moment."""
    study, other = open_study(tmp_path), open_study(tmp_path, seed=1)
    create = study._storage.create_new_trial

    def after_another(*arguments: object) -> int:
        monkeypatch.setattr(study._storage, "create_new_trial", create)
        other.propose("random")
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(study._storage, "create_new_trial", after_another)
    numbers = study.enqueue([(some_allocation(3), "enqueued"), (some_allocation(9), "enqueued")])
    assert [trial.state.name for trial in stored(tmp_path)] == ["RUNNING", "WAITING", "WAITING"]
    assert numbers == [1, 2]


def test_a_trial_enqueued_by_another_program_is_taken_up(tmp_path: Path) -> None:
    """As optuna-dashboard does: levels without our attribute."""
    study = open_study(tmp_path)
    propose_and_complete(study, 1)
    params = {"q_proj": 1, "up_proj": 10, "down_proj": 4}
    plain(tmp_path).enqueue_trial(params)
    planned = study.propose("random")
    assert planned == Planned(1, space_of(cost_model()).allocation(params))
    trial = stored(tmp_path)[1]
    assert (trial.state, trial.params) == (TrialState.RUNNING, params)
    assert open_study(tmp_path).in_flight() == [planned]
    study.complete(planned, score_of(planned.allocation))
    assert study.rows()[1].origin == "enqueued"
    assert study.rows()[1].allocation == planned.allocation


def test_levels_that_another_program_left_open_are_the_samplers(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    plain(tmp_path).enqueue_trial({"up_proj": 3})
    planned = study.propose("random")
    [trial] = stored(tmp_path)
    assert trial.params["up_proj"] == 3
    assert space_of(cost_model()).allocation(trial.params) == planned.allocation


@pytest.mark.parametrize("level", [999, -1, "many"])
def test_a_level_outside_the_space_fails_its_trial_only(tmp_path: Path, level: object) -> None:
    study = open_study(tmp_path)
    propose_and_complete(study, 1)
    plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": level, "down_proj": 4})
    with contextlib.suppress(RankfrontError):  # the driver is told, or goes on to the next trial
        propose_and_complete(study, 1)
    trial = stored(tmp_path)[1]
    assert trial.state == TrialState.FAIL
    assert "up_proj" in trial.user_attrs[RESULT]["reason"]
    for driver in (study, open_study(tmp_path)):
        [planned] = propose_and_complete(driver, 1)
        assert planned.number == len(stored(tmp_path)) - 1
        states = [row.state for row in driver.rows()]
        assert states == ["COMPLETE", "FAIL", *["COMPLETE"] * (len(states) - 2)]
        assert driver.enqueue([(some_allocation(planned.number), "uniform")]) == [planned.number + 1]
        propose_and_complete(driver, 1)


def test_a_trial_that_slips_in_before_the_write_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone enqueues between our look at the storage and our write."""
    study = open_study(tmp_path)
    propose_and_complete(study, 2)
    create = study._storage.create_new_trial
    params = {"q_proj": 1, "up_proj": 2, "down_proj": 3}

    def after_another(*arguments: object) -> int:
        monkeypatch.setattr(study._storage, "create_new_trial", create)
        plain(tmp_path).enqueue_trial(params)
        return create(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(study._storage, "create_new_trial", after_another)
    planned = study.propose("random")
    assert planned.number == 3
    waiting, ours = stored(tmp_path)[2:]
    assert (waiting.state, ours.state) == (TrialState.WAITING, TrialState.RUNNING)
    study.complete(planned, score_of(planned.allocation))
    assert study.propose("random") == Planned(2, space_of(cost_model()).allocation(params))
    assert study.propose("random").number == 4
    after = stored(tmp_path)
    assert [trial.number for trial in after] == [0, 1, 2, 3, 4]
    assert after[3].values[1] == loss(planned.allocation)
    assert study.rows() == open_study(tmp_path).rows()


def test_a_trial_that_another_program_ended_keeps_what_it_wrote(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    plain(tmp_path).tell(0, [0.5, 3.0])
    with pytest.raises(TakenError, match="trial 0 was ended"):
        study.complete(planned, score_of(planned.allocation))
    assert stored(tmp_path)[0].values == [0.5, 3.0]
    assert study.rows()[0].values == (0.5, 3.0)
    assert study.scored_as(planned.allocation) is None, "no score of ours to copy"
    assert study.propose("random").number == 1


def test_a_trial_that_another_program_started_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look at the storage and our write; and before our look."""
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    start = study._start_stored

    def after_another(trial: FrozenTrial) -> bool:
        plain(tmp_path).ask()
        return start(trial)

    monkeypatch.setattr(study, "_start_stored", after_another)
    with pytest.raises(TakenError, match="trial 0 was started"):
        study.propose("random")
    monkeypatch.undo()
    plain(tmp_path).ask()
    assert study.propose("random").number == 2


def test_a_running_trial_without_levels_is_another_programs(tmp_path: Path) -> None:
    plain_study = open_study(tmp_path) and plain(tmp_path)
    plain_study.ask()
    plain_study.tell(plain_study.ask(), [0.5, 3.0])
    study = open_study(tmp_path)
    assert study.in_flight() == []
    assert [row.state for row in study.rows()] == ["RUNNING", "COMPLETE"]
    assert study.propose("random").number == 2


@pytest.mark.parametrize("nll", [1.0, -math.inf])
def test_values_that_another_program_told_are_no_score(tmp_path: Path, nll: float) -> None:
    """Better than all of ours, or infinitely better: on no front, in no volume, and not the dense model."""
    study = open_study(tmp_path)
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    propose_and_complete(study, 3)
    before = study.front, hypervolumes(study).tolist(), current_hypervolume(study)
    other = plain(tmp_path)
    other.tell(other.ask(), [0.5, nll])
    other.enqueue_trial({"q_proj": 1, "up_proj": 10, "down_proj": 4})
    planned = study.propose("random")
    other.tell(planned.number, [0.5, nll])
    with pytest.raises(TakenError):
        study.complete(planned, score_of(planned.allocation))
    for driver in (study, open_study(tmp_path)):
        assert driver.sync() == 0
        assert (driver.front, hypervolumes(driver).tolist(), current_hypervolume(driver)) == before
        assert minimised(driver)[1].tolist() == [0, 1, 2]
        rows = driver.rows()
        assert [row.finished for row in rows] == [True, True, True, False, False]
        assert [row.ranked for row in rows] == [True, True, True, False, True]
        assert {(row.values, row.score, row.reason) for row in rows[3:]} == {((0.5, nll), None, UNSCORED)}
    propose_and_complete(driver, 1)


def test_a_dense_model_that_another_program_ended_is_scored_anew(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    dense = (Allocation.dense(TARGETS), "dense")
    study.enqueue([dense])
    planned = study.propose("random")
    plain(tmp_path).tell(planned.number, [1.0, 2.0])
    with pytest.raises(TakenError):
        study.complete(planned, score_of(planned.allocation))
    assert study.dense_score is None
    assert study.enqueue([dense]) == [1]
    propose_and_complete(study, 1)
    assert study.scored_as(study.dense) == 1
