"""The mirror's storage, held against Optuna's in memory."""

from __future__ import annotations

import optuna
from optuna.distributions import IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from search.memory import Memory

DISTRIBUTIONS = {"a": IntDistribution(0, 9), "b": IntDistribution(0, 9)}


def used(storage: InMemoryStorage) -> optuna.Study:
    """A study after something of everything."""
    sampler = optuna.samplers.RandomSampler(seed=3)
    study = optuna.create_study(storage=storage, sampler=sampler, directions=["minimize", "maximize"])
    study.enqueue_trial({"a": 4})
    study.enqueue_trial({"a": 5})
    for number in range(4):
        trial = study.ask(DISTRIBUTIONS)
        trial.set_user_attr("number", number)
        if number != 2:
            study.tell(trial, [number, 1.0] if number else None, state=None if number else TrialState.FAIL)
    study.add_trial(study.trials[1])
    study.enqueue_trial({"b": 1})
    return study


def test_it_holds_what_optunas_holds_and_counts_it() -> None:
    memory = Memory()
    mine, theirs = used(memory).trials, used(InMemoryStorage()).trials
    for trial in (*mine, *theirs):
        trial.datetime_start = trial.datetime_complete = None
    assert mine == theirs
    assert {state: count for state, count in memory.counts.items() if count} == {
        TrialState.FAIL: 1,
        TrialState.COMPLETE: 3,
        TrialState.RUNNING: 1,
        TrialState.WAITING: 1,
    }
    assert memory.open == {2: TrialState.RUNNING, 5: TrialState.WAITING}


def test_a_trial_that_was_taken_over_is_changed_alone() -> None:
    source = used(InMemoryStorage())
    waiting = source.get_trials(deepcopy=False)[5]
    memory = Memory()
    mirror = optuna.create_study(storage=memory, directions=source.directions)
    memory.create_new_trial(mirror._study_id, waiting)
    trial = mirror.ask(DISTRIBUTIONS)
    trial.set_user_attr("mine", 1)
    assert set(memory.get_trial(0).params) == {"a", "b"}
    assert (waiting.params, waiting.user_attrs, waiting.state) == ({}, {}, TrialState.WAITING)
