"""What comes back from a study on a journal, and that samplers go on as if it had never been closed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import (
    TARGETS,
    cost_model,
    every_sampler,
    loss,
    open_study,
    propose_and_complete,
    score_of,
    space_of,
    stored,
)

from actors.types import Allocation
from search.records import Objective
from search.view import Planned


def some_allocation(rank: int) -> Allocation:
    return Allocation.of({"layers.1.up_proj": rank, "layers.2.q_proj": rank}, TARGETS)


@every_sampler
def test_a_reopened_study_is_the_study(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, sampler)
    propose_and_complete(study, 9)
    study.fail(study.propose(sampler).number, "broken")
    flying = [study.propose(sampler), study.propose(sampler)]
    before = stored(tmp_path)
    again = open_study(tmp_path, sampler)
    assert again.rows() == study.rows()
    assert again.in_flight() == flying
    assert stored(tmp_path) == before, "opening writes nothing"
    for planned in flying:
        again.complete(planned, score_of(planned.allocation))
    after = stored(tmp_path)
    assert after[:10] == before[:10]
    assert [trial.number for trial in after] == list(range(12))
    assert [trial.params for trial in after] == [trial.params for trial in before]
    assert {trial.state.name for trial in after[10:]} == {"COMPLETE"}
    assert again.propose(sampler).number == 12


def test_an_enqueued_trial_in_flight_comes_back_with_its_true_ranks(tmp_path: Path) -> None:
    """Its ranks are not of the space: the levels that the sampler sees are only the nearest."""
    allocation = some_allocation(7)
    study = open_study(tmp_path)
    study.enqueue([(allocation, "enqueued")])
    planned = study.propose("random")
    assert planned == Planned(0, allocation)
    assert space_of(cost_model()).allocation(stored(tmp_path)[0].params) != allocation
    assert open_study(tmp_path).in_flight() == [Planned(0, allocation)]


def run(folder: Path, sampler: str, restarts: tuple[int, ...], count: int = 40) -> list[Allocation]:
    """`count` scored proposals, the driver started anew before the given ones."""
    folder.mkdir()
    study = open_study(folder, sampler, levels=40)
    proposed = []
    for number in range(count):
        if number in restarts:
            study = open_study(folder, sampler, levels=40)
        [planned] = propose_and_complete(study, 1)
        assert planned.number == number
        proposed.append(planned.allocation)
    return proposed


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_restart_changes_no_proposal(tmp_path: Path, sampler: str) -> None:
    whole = run(tmp_path / "whole", sampler, restarts=())
    assert run(tmp_path / "restarted", sampler, restarts=(1, 20, 33)) == whole


@every_sampler
def test_a_restart_does_not_repeat_the_first_proposals(tmp_path: Path, sampler: str) -> None:
    proposed = run(tmp_path / "study", sampler, restarts=(20,))
    assert proposed[20:30] != proposed[:10]
    assert len(set(proposed[:10]) & set(proposed[20:30])) <= 2
    assert len(set(proposed)) > 20


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3"])
def test_samplers_learn_from_the_mirror(tmp_path: Path, sampler: str) -> None:
    """The objectives agree here (fewer missing ranks, lower loss is all that counts): dense is best."""
    objectives = (Objective("nll", True), Objective("reasoning.acc", False))
    study = open_study(tmp_path, sampler, objectives=objectives, levels=40)
    losses = [loss(planned.allocation) for planned in propose_and_complete(study, 80)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize(("sampler", "name"), [("nsga2", "NSGAIISampler"), ("nsga3", "NSGAIIISampler")])
def test_generations_survive_a_restart(tmp_path: Path, sampler: str, name: str) -> None:
    """Kept in each trial's attributes on disk: a restart goes on in the generation it left."""
    propose_and_complete(open_study(tmp_path, sampler, population=6), 14)
    propose_and_complete(open_study(tmp_path, sampler, population=6), 8)
    generations = [trial.system_attrs[f"{name}:generation"] for trial in stored(tmp_path)]
    assert generations == [number // 6 for number in range(22)]
