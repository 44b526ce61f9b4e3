"""The study on a real journal: what is on disk at every step."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
from fakes import (
    TARGETS,
    cost_model,
    dies_before_the_state,
    open_study,
    plain,
    propose_and_complete,
    score_of,
    space_of,
    stored,
)
from optuna.trial import TrialState

from actors.types import Allocation
from search.packing import PLAN, RESULT
from search.records import Objective


def some_allocation(rank: int) -> Allocation:
    return Allocation.of({"layers.1.up_proj": rank, "layers.2.q_proj": rank}, TARGETS)


def test_a_proposal_is_running_on_disk_when_it_is_known(tmp_path: Path) -> None:
    planned = open_study(tmp_path).propose("random")
    [trial] = stored(tmp_path)
    assert (trial.number, trial.state) == (planned.number, TrialState.RUNNING) == (0, TrialState.RUNNING)
    assert space_of(cost_model()).allocation(trial.params) == planned.allocation
    assert trial.user_attrs[PLAN] == {"origin": "random", "ranks": [rank for _, rank in planned.allocation]}


def test_a_result_is_on_disk_when_complete_returns(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    score = score_of(planned.allocation)
    values = study.complete(planned, score)
    budget = cost_model().budgets(planned.allocation)["budget.model"]
    assert values == (budget, score.text.nll)
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [budget, score.text.nll]
    assert trial.user_attrs[RESULT] == {"score": json.loads(json.dumps(score.to_dict()))}


def test_the_result_is_written_before_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished trial without its score could not be mended: finished trials are immutable."""
    study = open_study(tmp_path)
    planned = study.propose("random")
    with dies_before_the_state(study, monkeypatch):
        study.complete(planned, score_of(planned.allocation))
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.RUNNING
    assert RESULT in trial.user_attrs


@pytest.mark.parametrize("end", ["complete", "copy", "fail", "add"])
def test_a_result_without_its_state_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The driver died between the two writes: the trial ends as it would have, and is not scored again."""

    def driver(folder: Path, crash: bool) -> None:
        folder.mkdir()
        study = open_study(folder)
        propose_and_complete(study, 1)
        if crash:
            monkeypatch.setattr(study._storage, "set_trial_state_values", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            if end == "add":
                study.add(some_allocation(7), "surgical", score_of(some_allocation(7)))
                return
            planned = study.propose("random")
            if end == "complete":
                study.complete(planned, score_of(planned.allocation))
            elif end == "copy":
                study.copy_score(planned, 0)
            else:
                study.fail(planned.number, "broken")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    driver(tmp_path / "whole", crash=False)
    driver(tmp_path / "crashed", crash=True)
    assert stored(tmp_path / "crashed")[1].state == TrialState.RUNNING
    again = open_study(tmp_path / "crashed")
    assert again.in_flight() == []
    assert again.replay() == [1]
    assert again.replay() == []
    whole = open_study(tmp_path / "whole")
    assert again.rows() == whole.rows() == open_study(tmp_path / "crashed").rows()
    ends = [stored(tmp_path / name)[1] for name in ("whole", "crashed")]
    assert ends[0].values == ends[1].values
    assert ends[0].user_attrs == ends[1].user_attrs
    assert again.propose("random") == whole.propose("random")


def test_a_failure_has_a_reason_and_no_values(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    study.fail(planned.number, "nll is nan on the search split")
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.FAIL
    assert trial.values is None
    [row] = study.rows()
    assert (row.state, row.values, row.score) == ("FAIL", None, None)
    assert row.reason == "nll is nan on the search split"
    assert study.propose("random").number == 1, "the search goes on"


@pytest.mark.parametrize("name", ["budget.model", "budget.linear", "budget.bytes"])
def test_objectives_are_told_in_their_order_and_direction(name: str, tmp_path: Path) -> None:
    objectives = (Objective("reasoning.acc", False), Objective("nll", True), Objective(name, True))
    study = open_study(tmp_path, objectives=objectives)
    planned = study.propose("random")
    score = score_of(planned.allocation)
    budgets = cost_model().budgets(planned.allocation)
    assert len({*budgets.values()}) == 3
    assert study.complete(planned, score) == (0.6, score.text.nll, budgets[name])
    [row] = study.rows()
    recorded = (row.budget_model, row.budget_linear, row.budget_bytes)
    assert recorded == (budgets["budget.model"], budgets["budget.linear"], budgets["budget.bytes"])
    assert [direction.name for direction in plain(tmp_path).directions] == [
        "MAXIMIZE",
        "MINIMIZE",
        "MINIMIZE",
    ]


def test_optuna_alone_reads_the_study(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    done = propose_and_complete(study, 4)
    study.fail(study.propose("random").number, "broken")
    seen = plain(tmp_path)
    assert seen.metric_names == ["budget.model", "nll"]
    assert [trial.state.name for trial in seen.trials] == ["COMPLETE"] * 4 + ["FAIL"]
    assert [trial.values[1] for trial in seen.trials[:4]] == [score_of(p.allocation).text.nll for p in done]
    assert all(set(trial.params) == set(space_of(cost_model()).distributions) for trial in seen.trials)
    assert {trial.number for trial in seen.best_trials} <= {0, 1, 2, 3}


def test_a_known_allocation_is_answered_from_the_record(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for _ in range(2):
        plain(tmp_path).enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    first = study.propose("random")
    assert study.scored_as(first.allocation) is None
    values = study.complete(first, score_of(first.allocation))
    again = open_study(tmp_path)
    second = again.propose("random")
    assert again.scored_as(second.allocation) == 0
    assert again.copy_score(second, 0) == values
    rows = open_study(tmp_path).rows()
    assert [row.copied_from for row in rows] == [None, 0]
    assert rows[1].score == rows[0].score == score_of(first.allocation)


def test_a_failed_allocation_is_no_answer(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    planned = study.propose("random")
    study.fail(planned.number, "broken")
    assert study.scored_as(planned.allocation) is None
    assert open_study(tmp_path).scored_as(planned.allocation) is None


def test_numbers_have_no_gaps_whatever_ends_a_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path, "tpe")
    for number in range(12):
        if number % 5 == 1:
            study.enqueue([(some_allocation(number + 1), "enqueued")])
        planned = study.propose("tpe")
        if number % 3 == 0:
            study.fail(planned.number, "broken")
        elif number % 3 == 1:
            study.complete(planned, score_of(planned.allocation))
        if number % 4 == 3:
            study = open_study(tmp_path, "tpe")
    numbers = [trial.number for trial in stored(tmp_path)]
    assert numbers[0] == 0
    assert all(after == before + 1 for before, after in pairwise(numbers))
