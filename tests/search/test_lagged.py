"""Deterministic searches: the same trials, whatever the replicas, the order of results and the restarts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import optuna
import pytest
from fakes import (
    MadeUpPool,
    ShuffledPool,
    cost_model,
    open_study,
    propose_and_complete,
    score_of,
    stored,
)
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from actors.samples import pack_floats, unpack_floats
from actors.stages import Judge
from search.constraints import Constraint
from search.journal import open_journal
from search.lagged import Snapshot
from search.packing import RESULT
from search.parents import ATTRIBUTE as PARENTS
from search.pool import Job, Outcome
from search.runner import Runner, Stop
from search.sections import PlateauSection, StopSection
from search.study import SearchStudy

# Its fits take minutes together.
GP = pytest.param("gp", marks=pytest.mark.slow)
every_sampler = pytest.mark.parametrize("sampler", ["exchange", "tpe", "nsga2", "nsga3", "random", GP])
LAG = 9
COUNT = 45
BOUND = Constraint("budget.model", 0.95)
Seen = list[tuple[object, ...]]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of writes, and no machine loses its power here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def opened(folder: Path, sampler: str, lag: int = LAG) -> SearchStudy:
    """Dense, three uniform allocations, then the sampler; a space so small that proposals repeat."""
    folder.mkdir(exist_ok=True)
    levels = 8 if sampler == "exchange" else 4  # its proposals are fewer, and good
    study = open_study(folder, sampler, population=6, lag=lag, levels=levels, constraints=(BOUND,))
    study.enqueue([(study.dense, "dense")])
    study.enqueue((cost_model().uniform(share), "uniform") for share in (0.9, 0.7, 0.5))
    return study


def answer(job: Job) -> Outcome:
    """As a replica with stages: stopped by the first rival that is better on every window."""
    score = score_of(job.allocation)
    windows = pack_floats([score.text.nll + gap for gap in (-0.3, 0.1, 0.3, -0.1)])
    score = replace(score, text=replace(score.text, windows=windows))
    judge = Judge((64,), 32, job.rivals)
    if judge.stops({"nll": unpack_floats(windows)[:2]}):
        score = replace(score, stopped_by=judge.stopped_by, tasks={}, forward_tokens=25)
    return Outcome(job, score)


def run(
    study: SearchStudy,
    pool: MadeUpPool,
    count: int = COUNT,
    stop: Stop | None = None,
    rules: StopSection | None = None,
) -> None:
    rules = rules or StopSection(trials=count)
    Runner(study, pool, rules, "sampler", stop or Stop(), staged=True).run()  # type: ignore[arg-type]


def seen(folder: Path) -> Seen:
    """All that decides what a trial is, and how it ended."""

    def facts(trial: FrozenTrial) -> tuple[object, ...]:
        result = trial.user_attrs.get(RESULT, {})
        attributes = sorted(trial.system_attrs.items())
        return trial.number, trial.state, trial.params, trial.values, result.get("reason"), attributes

    return [facts(trial) for trial in stored(folder)]


@every_sampler
def test_the_same_trials_with_any_number_of_replicas_and_through_restarts(
    tmp_path: Path, sampler: str
) -> None:
    """One replica in order is the reference; shuffled results of 1, 2 and 5, and a driver killed twice."""
    run(opened(tmp_path / "one", sampler), MadeUpPool(answer, size=1))
    expected = seen(tmp_path / "one")
    states = [state for _, state, *_ in expected]
    assert set(states) == {TrialState.COMPLETE} | ({TrialState.PRUNED} if sampler != "exchange" else set())
    assert len({str(params) for _, _, params, *_ in expected}) < COUNT, "some were proposed twice"
    for size in (1, 2, 5):
        folder = tmp_path / f"shuffled-{size}"
        run(opened(folder, sampler), ShuffledPool(size, answer, size))
        assert seen(folder) == expected
    folder = tmp_path / "killed"
    for instant, size in ((14, 5), (29, 2)):
        stop, pool = Stop(), ShuffledPool(instant, size=size)

        def killed(job: Job, stop: Stop = stop, instant: int = instant) -> Outcome:
            if job.key >= instant:
                stop.reason = "SIGKILL"
            return answer(job)

        pool._answer = killed
        run(opened(folder, sampler), pool, stop=stop)
        assert stored(folder)[-1].number < COUNT - 5
        assert any(trial.state == TrialState.RUNNING for trial in stored(folder)), "some were in flight"
    run(opened(folder, sampler), ShuffledPool(3, answer, 5))
    assert seen(folder) == expected


@pytest.mark.parametrize(
    "rules",
    [StopSection(trials=COUNT, tokens=2_000), StopSection(plateau=PlateauSection(trials=8, tolerance=0.1))],
)
def test_rules_that_read_the_record_end_it_at_the_same_trial(tmp_path: Path, rules: StopSection) -> None:
    run(opened(tmp_path / "one", "tpe"), MadeUpPool(answer, size=1), rules=rules)
    expected = seen(tmp_path / "one")
    assert LAG < len(expected) < COUNT
    for size in (2, 5):
        folder = tmp_path / f"shuffled-{size}"
        run(opened(folder, "tpe"), ShuffledPool(size, answer, size), rules=rules)
        assert seen(folder) == expected
        run(opened(folder, "tpe"), ShuffledPool(size, answer, size), rules=rules)
        assert seen(folder) == expected, "resumed where it had ended"


WRITES = (
    "create_new_trial",
    "set_study_system_attr",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_system_attr",
    "set_trial_user_attr",
)


@every_sampler
def test_a_driver_cut_off_at_any_write_goes_on_with_the_same_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Cut off again and again: before its 10th write, before its 11th, ... until it gets to the end."""
    run(opened(tmp_path / "whole", sampler), MadeUpPool(answer, size=1))
    folder = tmp_path / "cut"
    folder.mkdir()
    left = [0]

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return write(*arguments, **named)

        return counting

    def cut_off(storage: BaseStorage) -> None:
        for name in WRITES:
            monkeypatch.setattr(storage, name, counted(getattr(storage, name)))

    plain = fakes.open_journal
    for cuts in range(100):
        left[0] = 9 + cuts

        def journal(path: Path, *patience: Any) -> BaseStorage:
            storage = plain(path, *patience)
            cut_off(storage)
            return storage

        monkeypatch.setattr(fakes, "open_journal", journal)
        try:
            run(opened(folder, sampler), ShuffledPool(cuts, answer, size=3))
        except KeyboardInterrupt:
            monkeypatch.setattr(fakes, "open_journal", plain)
            continue
        break
    monkeypatch.setattr(fakes, "open_journal", plain)
    assert cuts > 10
    assert seen(folder) == seen(tmp_path / "whole")


def test_without_it_the_order_of_results_decides(tmp_path: Path) -> None:
    """So the test above can fail."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        study = open_study(tmp_path / name, "tpe", levels=40)
        run(study, ShuffledPool(seed, answer, 5))
    assert seen(tmp_path / "a") != seen(tmp_path / "b")


def test_a_trial_is_proposed_when_all_below_its_lag_have_ended(tmp_path: Path) -> None:
    """The pool has room for 20; with a lag of 3, four are under way at most."""
    study = open_study(tmp_path, "random", levels=40, lag=3)
    ahead = []

    def watched(job: Job) -> Outcome:
        unended = [row.number for row in study.rows() if not row.finished]
        ahead.append(study.started - 1 - unended[0])
        return Outcome(job, score_of(job.allocation))

    run(study, ShuffledPool(0, watched, size=10), 40)
    assert max(ahead) == 3
    assert [row.state for row in study.rows()] == ["COMPLETE"] * 40


@pytest.mark.parametrize("lag", [0, 4])
def test_a_snapshot_has_no_end_from_its_number_on(tmp_path: Path, lag: int) -> None:
    study = open_study(tmp_path, "nsga2", constraints=(BOUND,))
    propose_and_complete(study, 8)
    snapshot = Snapshot(study._mirror, 8 - lag)
    trials = snapshot.get_trials(deepcopy=False)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * (8 - lag) + ["RUNNING"] * lag
    for trial, whole in zip(trials, study._mirror.get_trials(deepcopy=False), strict=True):
        assert trial.params == whole.params
        if trial.state == TrialState.RUNNING:
            assert (trial.values, trial.user_attrs, trial.constraints) == (None, {}, {})
            assert "NSGAIISampler:generation" in trial.system_attrs
        else:
            assert trial is whole
    finished = snapshot.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    assert [trial.number for trial in finished] == list(range(8 - lag))
    assert len(study._mirror.get_trials(states=(TrialState.COMPLETE,))) == 8, "the study itself is untouched"


def test_values_are_rounded_before_they_are_told(tmp_path: Path) -> None:
    """Budgets are counted, and stay exact; so does the recorded score."""
    study = open_study(tmp_path, lag=2, constraints=(Constraint("nll", 2.0),))
    planned = study.propose("random")
    score = score_of(planned.allocation, nll=3.14159265358979)
    study.complete(planned, score)
    [trial] = stored(tmp_path)
    assert trial.values == [cost_model().budgets(planned.allocation)["budget.model"], 3.141593]
    assert trial.constraints == {"nll": pytest.approx(1.141593, abs=1e-12)}
    assert study.rows()[0].score == score


def test_parents_are_the_same_after_a_restart(tmp_path: Path) -> None:
    """Those chosen for the seventh trial, the first of a generation, are the first six, kept by number."""
    other = optuna.create_study(storage=open_journal(tmp_path), study_name="other")
    for _ in range(3):
        other.ask()  # so that ids are not numbers
    study = open_study(tmp_path, "nsga2", population=6)
    propose_and_complete(study, 14)
    key = "NSGAIISampler:parent:1"
    assert [trial.number for trial in stored(tmp_path) if PARENTS in trial.system_attrs] == [6, 12]
    assert sorted(stored(tmp_path)[6].system_attrs[PARENTS][key]) == list(range(6))
    again = open_study(tmp_path, "nsga2", population=6)
    again.propose("nsga2")
    chosen = [each._mirror._storage.get_study_system_attrs(each._mirror._study_id) for each in (study, again)]
    for generation in (1, 2):
        key = f"NSGAIISampler:parent:{generation}"
        assert len(chosen[0][key]) == 6
        assert chosen[0][key] == chosen[1][key], "ids of a mirror are numbers"
