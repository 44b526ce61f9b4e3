"""A study that another Optuna program works on too, through restarts of its driver, on every storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import (
    CHOOSING,
    OBJECTIVES,
    TARGETS,
    MadeUpPool,
    cost_model,
    propose_and_complete,
    runner,
    score_of,
    space_of,
    states,
)
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from actors.types import Allocation
from search.database import open_database
from search.journal import open_journal
from search.packing import PLAN
from search.samplers import make_sampler
from search.sections import SamplerSection
from search.space import Space
from search.study import SearchStudy, TakenError, open_storage_study
from search.view import Planned

LEVELS = {"q_proj": 1, "up_proj": 10, "down_proj": 4}
SPACE = space_of(cost_model())
WRITES = ("set_trial_system_attr", "set_trial_param", "set_trial_user_attr", "set_trial_state_values")
KINDS = {
    "a level as a choice": ({}, "q_proj", CategoricalDistribution((0, 1, 2)), 1),
    "a level on a log scale": ({}, "q_proj", IntDistribution(1, 10, log=True), 1),
    "methods in another order": (
        {"factors": CHOOSING},
        "method/q_proj",
        CategoricalDistribution(CHOOSING.choices[::-1]),
        "weight",
    ),
}


class Programs:
    """Programs on one study, each with a storage of its own."""

    def __init__(self, reopen: Callable[[], BaseStorage]) -> None:
        self.storage = reopen

    def driver(self, lag: int | None = None, space: Space = SPACE) -> SearchStudy:
        study = open_storage_study(self.storage(), "made-up", OBJECTIVES)
        sampler = make_sampler(SamplerSection(name="nsga2", population=6))
        return SearchStudy(study, sampler, 0, space, cost_model(), OBJECTIVES, lag=lag)

    def other(self) -> optuna.Study:
        return optuna.load_study(study_name="made-up", storage=self.storage())


@pytest.fixture(params=["journal", "database"])
def programs(request: pytest.FixtureRequest, tmp_path: Path) -> Programs:
    if request.param == "journal":
        return Programs(lambda: open_journal(tmp_path))
    return Programs(lambda: open_database(f"sqlite:///{tmp_path / 'studies.db'}"))


def waiting(**changes: Any) -> optuna.trial.FrozenTrial:
    """A trial as a program adds it that gives its levels with their distributions."""
    usual = {"state": TrialState.WAITING, "params": LEVELS, "distributions": SPACE.distributions}
    return create_trial(**{**usual, **changes})


def enqueue(study: optuna.Study) -> None:
    study.enqueue_trial(LEVELS)


def add(study: optuna.Study) -> None:
    study.add_trial(waiting())


ways = pytest.mark.parametrize("wait", [enqueue, add])


@pytest.mark.parametrize("lag", [None, 2])
def test_what_another_program_runs_is_left_to_it_by_the_next_driver(
    programs: Programs, lag: int | None
) -> None:
    """It has all of its levels, as a trial of ours has: the other program tells it when it likes."""
    propose_and_complete(programs.driver(lag), 1)
    other = programs.other()
    theirs = other.ask(SPACE.distributions)
    again = programs.driver(lag)
    assert again.in_flight() == []
    runner(again, MadeUpPool(), trials=4).run()
    assert states(again) == ["COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    other.tell(theirs, [0.5, 3.0])
    assert other.trials[1].values == [0.5, 3.0]


@ways
@pytest.mark.parametrize("lag", [None, 2])
def test_what_another_program_left_waiting_is_the_drivers_once_it_runs(
    programs: Programs, wait: Callable[[optuna.Study], None], lag: int | None
) -> None:
    study = programs.driver(lag)
    wait(programs.other())
    planned = study.propose("random")
    assert planned == Planned(0, SPACE.allocation(LEVELS))
    [trial] = programs.other().trials
    assert trial.user_attrs[PLAN] == {"origin": "enqueued", "ranks": [rank for _, rank in planned.allocation]}
    again = programs.driver(lag)
    assert again.in_flight() == [planned]
    assert [t.user_attrs for t in again.frozen()] == [t.user_attrs for t in study.frozen()], "as in memory"
    again.complete(planned, score_of(planned.allocation))
    assert programs.driver(lag).rows() == again.rows()
    assert again.enqueue([(planned.allocation, "enqueued")]) == [], "it is known"


@ways
def test_a_driver_killed_at_any_write_of_a_start_leaves_a_trial_for_the_next(
    programs: Programs, wait: Callable[[optuna.Study], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it waits or runs, it has one number, and the next driver scores it there, once."""
    seen = []
    for number in range(20):
        study = programs.driver()
        wait(programs.other())
        with monkeypatch.context() as patch:
            _die_after(number, study._storage, patch)
            try:
                study.propose("random")
                break
            except KeyboardInterrupt:
                pass
        trial = programs.other().trials[number]
        seen.append((trial.state.name, PLAN in trial.user_attrs))
        again = programs.driver()
        [planned] = again.in_flight() or [again.propose("random")]
        assert planned == Planned(number, SPACE.allocation(LEVELS))
        again.complete(planned, score_of(planned.allocation))
        assert states(programs.driver()) == ["COMPLETE"] * (number + 1)
    assert set(seen) == {("WAITING", False), ("WAITING", True), ("RUNNING", True)}


def _die_after(writes: int, storage: BaseStorage, patch: pytest.MonkeyPatch) -> None:
    """Let a driver die at the write after so many, or right after the one that starts the trial."""
    left = [writes]

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            done = write(*arguments)
            if TrialState.RUNNING in arguments and left[0] == 0:
                raise KeyboardInterrupt
            return done

        return one

    for name in WRITES:
        patch.setattr(storage, name, counted(getattr(storage, name)))


def test_of_two_that_start_a_trial_at_once_one_has_it(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other program is faster by the driver's last write: the plan is not of what it runs."""
    study, other = programs.driver(), programs.other()
    enqueue(other)
    start = study._storage.set_trial_state_values
    theirs = []

    def after_another(*arguments: Any) -> bool:
        theirs.append(other.ask(SPACE.distributions))
        return start(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(study._storage, "set_trial_state_values", after_another)
        with pytest.raises(TakenError, match="trial 0 was started"):
            study.propose("random")
    again = programs.driver()
    assert again.in_flight() == []
    assert again.propose("random").number == 1
    other.tell(theirs[0], [0.5, 3.0])
    assert [row.state for row in programs.driver().rows()] == ["COMPLETE", "RUNNING"]


def test_our_own_that_waits_keeps_its_plan(programs: Programs) -> None:
    """Its ranks are not of the space; its origin is not another program's."""
    allocation = Allocation.of({"layers.1.up_proj": 7}, TARGETS)
    study = programs.driver()
    study.enqueue([(allocation, "seed")])
    before = programs.other().trials[0].user_attrs
    assert study.propose("random") == Planned(0, allocation)
    assert programs.other().trials[0].user_attrs == before
    assert programs.driver().in_flight() == [Planned(0, allocation)]


@pytest.mark.parametrize(("changes", "name", "theirs", "value"), KINDS.values(), ids=KINDS)
def test_a_distribution_of_another_kind_fails_its_trial_only(
    programs: Programs, changes: dict[str, Any], name: str, theirs: BaseDistribution, value: object
) -> None:
    """Its value is of the space, and yet Optuna asks for no such trial."""
    space = space_of(cost_model(), **changes)
    given = {**space.params(SPACE.allocation(LEVELS)), name: value}
    study = programs.driver(space=space)
    distributions = {**space.distributions, name: theirs}
    programs.other().add_trial(waiting(params=given, distributions=distributions))
    runner(study, MadeUpPool(), trials=3).run()
    again = programs.driver(space=space)
    assert states(again) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert again.rows() == study.rows()
    reason = again.rows()[0].reason or ""
    assert reason.startswith(f"params.{name}: {theirs} is not {space.distributions[name]}")


def test_another_range_of_levels_is_of_the_same_kind(programs: Programs) -> None:
    """Optuna lets a range change; the level is of the space."""
    study = programs.driver()
    wider = {**SPACE.distributions, "q_proj": IntDistribution(0, 99)}
    programs.other().add_trial(waiting(distributions=wider))
    assert study.propose("random") == Planned(0, SPACE.allocation(LEVELS))


def test_what_cannot_be_started_beside_another_kind_fails_alone(programs: Programs) -> None:
    """Optuna writes no level to a trial where an earlier one has the parameter as of another kind."""
    study, other = programs.driver(), programs.other()
    choices = {**SPACE.distributions, "up_proj": CategoricalDistribution((10,))}
    other.add_trial(waiting(state=TrialState.RUNNING, distributions=choices))
    enqueue(other)
    add(other)
    runner(study, MadeUpPool(), trials=4).run()
    again = programs.driver()
    assert states(again) == ["RUNNING", "FAIL", "COMPLETE", "COMPLETE"]
    assert again.rows() == study.rows()
    assert (again.rows()[1].reason or "").startswith("params.up_proj: an earlier trial has it as no Int")
