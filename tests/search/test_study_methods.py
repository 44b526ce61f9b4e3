"""A study whose search chooses methods: what its trials hold, and what samplers learn of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import (
    CHOOSING,
    TARGETS,
    cost_model,
    every_sampler,
    open_study,
    plain,
    propose_and_complete,
    score_of,
    space_of,
    stored,
)
from optuna.trial import TrialState

from actors.types import Allocation, RankfrontError
from search.packing import PLAN, RESULT
from search.records import Objective
from search.view import Planned

LEVELS = {"q_proj": 1, "up_proj": 2, "down_proj": 10}
METHODS = {"method/q_proj": "weight", "method/up_proj": "feature", "method/down_proj": "weight"}


def cut(rank: int, methods: dict[str, str]) -> Allocation:
    ranks = dict.fromkeys(["layers.1.up_proj", "layers.2.q_proj"], rank)
    return Allocation.of(ranks, TARGETS, methods=methods)


@every_sampler
def test_a_study_that_chooses_methods_comes_back(tmp_path: Path, sampler: str) -> None:
    """Past the start-up of every sampler, with its methods in the plans, the parameters and the rows."""
    study = open_study(tmp_path, sampler, factors=CHOOSING, levels=40)
    done = propose_and_complete(study, 24)
    flying = study.propose(sampler)
    again = open_study(tmp_path, sampler, factors=CHOOSING, levels=40)
    assert again.rows() == study.rows()
    assert [row.allocation for row in again.rows()] == [p.allocation for p in [*done, flying]]
    assert again.in_flight() == [flying]
    space = space_of(cost_model(), factors=CHOOSING, levels=40)
    for trial in stored(tmp_path):
        assert list(trial.distributions) == list(space.distributions)
        assert space.allocation(trial.params) == again.rows()[trial.number].allocation
    assert len({method for planned in done for _, method in planned.allocation.methods}) == 3
    assert again.propose(sampler).number == 25


def test_a_plan_holds_methods_only_where_there_are_any(tmp_path: Path) -> None:
    study = open_study(tmp_path, factors=CHOOSING)
    study.enqueue([(cut(3, {}), "uniform"), (cut(3, {"layers.2.q_proj": "curvature"}), "enqueued")])
    plain_plan, plan = (trial.user_attrs[PLAN] for trial in stored(tmp_path))
    assert set(plain_plan) == {"origin", "ranks"}
    named = dict(zip((target.name for target in TARGETS), plan["methods"], strict=True))
    assert named.pop("layers.2.q_proj") == "curvature"
    assert set(named.values()) == {None}
    assert plan["ranks"] == plain_plan["ranks"]


def test_methods_make_another_trial_of_equal_ranks(tmp_path: Path) -> None:
    study = open_study(tmp_path, factors=CHOOSING)
    allocations = [cut(3, {}), cut(3, {"layers.2.q_proj": "weight"})]
    assert study.enqueue((allocation, "enqueued") for allocation in allocations) == [0, 1]
    first = propose_and_complete(study, 1)[0]
    assert study.scored_as(allocations[0]) == first.number
    assert study.scored_as(allocations[1]) is None
    again = open_study(tmp_path, factors=CHOOSING)
    assert again.enqueue((allocation, "enqueued") for allocation in allocations) == []
    assert again.propose("random") == Planned(1, allocations[1])


def test_an_enqueued_trial_keeps_methods_that_are_not_of_the_space(tmp_path: Path) -> None:
    """One of three q_proj is cut by another method: the sampler is told the usual one."""
    ranks = {"layers.1.q_proj": 3, "layers.2.q_proj": 3, "layers.3.q_proj": 3}
    allocation = Allocation.of(ranks, TARGETS, methods={"layers.2.q_proj": "curvature"})
    study = open_study(tmp_path, factors=CHOOSING)
    study.enqueue([(allocation, "enqueued")])
    assert study.propose("random") == Planned(0, allocation)
    assert stored(tmp_path)[0].params["method/q_proj"] == "feature"
    assert open_study(tmp_path, factors=CHOOSING).in_flight() == [Planned(0, allocation)]


def test_methods_enqueued_by_another_program_are_taken_up(tmp_path: Path) -> None:
    study = open_study(tmp_path, factors=CHOOSING)
    plain(tmp_path).enqueue_trial({**LEVELS, **METHODS})
    planned = study.propose("random")
    expected = space_of(cost_model(), factors=CHOOSING).allocation({**LEVELS, **METHODS})
    assert planned == Planned(0, expected)
    assert dict(expected.methods)["layers.1.q_proj"] == "weight"
    assert stored(tmp_path)[0].params == {**LEVELS, **METHODS}
    assert open_study(tmp_path, factors=CHOOSING).in_flight() == [planned]


@pytest.mark.parametrize("method", ["svd", 1, None])
def test_a_method_outside_the_space_fails_its_trial_only(tmp_path: Path, method: object) -> None:
    study = open_study(tmp_path, factors=CHOOSING)
    plain(tmp_path).enqueue_trial({**LEVELS, **METHODS, "method/up_proj": method})
    with pytest.raises(RankfrontError, match="method/up_proj"):
        study.propose("random")
    [trial] = stored(tmp_path)
    assert trial.state == TrialState.FAIL
    assert "method/up_proj" in trial.user_attrs[RESULT]["reason"]
    for driver in (study, open_study(tmp_path, factors=CHOOSING)):
        propose_and_complete(driver, 1)
        assert driver.rows()[0].state == "FAIL"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3"])
def test_samplers_learn_which_method_is_best(tmp_path: Path, sampler: str) -> None:
    """The loss is the share of targets cut by weight, a third by chance.

    Dense ones count as such, so that ranks are no way out.
    """
    objectives = (Objective("nll", True), Objective("reasoning.acc", False))
    study = open_study(tmp_path, sampler, objectives=objectives, factors=CHOOSING, levels=40)
    shares = []
    for _ in range(80):
        planned = study.propose(sampler)
        used = {t.name: planned.allocation.method_of(t.name) or CHOOSING.method_of(t.name) for t in TARGETS}
        bad = [rank is None or used[name] == "weight" for name, rank in planned.allocation]
        shares.append(sum(bad) / len(bad))
        study.complete(planned, score_of(planned.allocation, shares[-1]))
    assert sum(shares[-20:]) / 20 < 0.5 / 3
