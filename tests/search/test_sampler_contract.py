"""What every sampler that a config offers keeps to, whichever it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import optuna
import pytest
from fakes import (
    CHOOSING,
    OBJECTIVES,
    cost_model,
    landscape,
    open_study,
    propose_and_complete,
    score_of,
    space_of,
)
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial

from actors.types import Allocation
from search.records import Objective
from search.samplers import make_sampler, reseed
from search.sections import SamplerSection
from search.space import Space

NAMES = get_args(SamplerSection.model_fields["name"].annotation)
COST = cost_model()
LOSSES = (Objective("nll", True), Objective("reasoning.acc", False))
every_sampler = pytest.mark.parametrize("name", NAMES)


def make(name: str, space: Space, objectives: tuple[Objective, ...]) -> BaseSampler:
    section = SamplerSection(name=name, population=6)
    return make_sampler(section, lambda: landscape(space, COST, objectives))


def study_of(sampler: BaseSampler, objectives: tuple[Objective, ...]) -> optuna.Study:
    directions = ["minimize" if objective.minimize else "maximize" for objective in objectives]
    return optuna.create_study(directions=directions, sampler=sampler)


def fill(study: optuna.Study, space: Space, objectives: tuple[Objective, ...], count: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(count):
        params = {
            name: int(rng.integers(distribution.high + 1))
            if hasattr(distribution, "high")
            else distribution.choices[rng.integers(len(distribution.choices))]  # type: ignore[attr-defined]
            for name, distribution in space.distributions.items()
        }
        allocation = space.allocation(params)
        known = {**COST.budgets(allocation), "nll": score_of(allocation).text.nll}
        known["reasoning.acc"] = 1 / known["nll"]
        study.add_trial(
            create_trial(
                params=params,
                distributions=space.distributions,
                values=[known[objective.name] for objective in objectives],
            )
        )


@every_sampler
@pytest.mark.parametrize("objectives", [LOSSES[:1], OBJECTIVES, (*OBJECTIVES, LOSSES[1])], ids=len)
def test_it_proposes_inside_the_space(name: str, objectives: tuple[Objective, ...]) -> None:
    """Whatever the number of objectives and their directions, with methods to choose, before and after it
    has learned anything."""
    space = space_of(COST, factors=CHOOSING)
    sampler = make(name, space, objectives)
    study = study_of(sampler, objectives)
    for count in (0, 11):
        fill(study, space, objectives, count)
        for _ in range(2):
            reseed(sampler, 0, len(study.get_trials(deepcopy=False)))
            trial = study.ask(space.distributions)
            space.check(trial.params)
            assert set(trial.params) == set(space.distributions)
            study.tell(trial, state=TrialState.FAIL)


@every_sampler
def test_a_proposal_follows_from_study_seed_and_number(name: str) -> None:
    """Not from what this process proposed before, nor from what failed trials had proposed."""
    space = space_of(COST)
    proposals = []
    for fails in (("q_proj", 3), ("up_proj", 5)):
        sampler = make(name, space, OBJECTIVES)
        study = study_of(sampler, OBJECTIVES)
        fill(study, space, OBJECTIVES, 12)
        params = {**dict.fromkeys(space.distributions, 2), fails[0]: fails[1]}
        study.add_trial(create_trial(state=TrialState.FAIL, params=params, distributions=space.distributions))
        if fails[0] == "up_proj":
            sampler._rng.rng.random_sample(7)
        reseed(sampler, 3, 13)
        proposals.append(study.ask(space.distributions).params)
    assert proposals[0] == proposals[1]


@every_sampler
def test_a_restart_proposes_the_same_next_trial(tmp_path: Path, name: str) -> None:
    (tmp_path / "first").mkdir()
    study = open_study(tmp_path / "first", name)
    propose_and_complete(study, 12)
    study.fail(study.propose(name).number, "broken")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    again = open_study(tmp_path / "second", name)
    assert study.propose(name) == again.propose(name)


@every_sampler
def test_a_study_of_dense_alone_is_enough_to_begin(tmp_path: Path, name: str) -> None:
    study = open_study(tmp_path, name)
    dense = Allocation.dense(COST.targets)
    study.enqueue([(dense, "dense")])
    study.complete(study.propose(name), score_of(dense))
    proposed = [planned.allocation for planned in propose_and_complete(study, 4)]
    assert len({allocation.key for allocation in proposed}) > 1


@every_sampler
def test_trials_of_another_space_are_passed_over(name: str) -> None:
    space = space_of(COST)
    sampler = make(name, space, OBJECTIVES)
    study = study_of(sampler, OBJECTIVES)
    fill(study, space, OBJECTIVES, 6)
    other = optuna.distributions.IntDistribution(0, 99)
    study.add_trial(create_trial(params={"z": 50}, distributions={"z": other}, values=[0.1, 0.1]))
    study.add_trial(
        create_trial(params={"q_proj": 50}, distributions={"q_proj": other}, state=TrialState.PRUNED)
    )
    reseed(sampler, 0, 8)
    space.check(study.ask(space.distributions).params)
