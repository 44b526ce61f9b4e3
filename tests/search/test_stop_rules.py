"""When a search stops: after so many trials, tokens, hours, on a plateau, or out of proposals."""

from __future__ import annotations

import re
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import (
    TARGETS,
    MadeUpPool,
    open_study,
    runner,
    score_of,
    states,
)

from actors.types import Allocation
from search.pool import Job, Outcome
from search.runner import HOPELESS, Runner, Stop, hypervolumes
from search.sections import PlateauSection, StopSection
from search.study import SearchStudy


def test_stops_at_the_number_of_trials(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path), MadeUpPool()
    assert runner(study, pool, trials=9).run() == "9 trials"
    assert states(study) == ["COMPLETE"] * 9
    assert [job.key for job in pool.submitted] == list(range(9))
    assert runner(study, pool, trials=12).run() == "12 trials"
    assert states(study) == ["COMPLETE"] * 12
    assert [job.key for job in pool.submitted] == list(range(12)), "no trial is scored twice"


def test_stops_at_scored_tokens(tmp_path: Path) -> None:
    """100 tokens a trial; what is in flight when the rule is met is still recorded."""
    study, pool = open_study(tmp_path), MadeUpPool(size=1)
    assert runner(study, pool, tokens=1_000).run() == "1,000 scored tokens"
    assert len(pool.submitted) == len(study.rows()) == 11
    assert states(study) == ["COMPLETE"] * 11


def test_copied_scores_cost_no_tokens(tmp_path: Path) -> None:
    """A space of 27 allocations: most proposals are known soon."""
    study, pool = open_study(tmp_path, levels=2), MadeUpPool(size=1)
    runner(study, pool, tokens=2_000).run()
    assert 20 <= len(pool.submitted) <= 21
    assert len(study.rows()) > len(pool.submitted)


def test_stops_after_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("search.runner.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def answer(job: Job) -> Outcome:
        clock[0] += 600
        return Outcome(job, score_of(job.allocation))

    study = open_study(tmp_path)
    loop = runner(study, MadeUpPool(answer, size=1), hours=1.5)
    assert loop.run() == "1.5 hours"
    assert states(study) == ["COMPLETE"] * 11, "more than 90 minutes after ten, and one more was in flight"


def test_hours_are_of_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what came before the first trial."""
    monkeypatch.setattr("search.runner.time", SimpleNamespace(monotonic=lambda: 7300.0))
    study, rules = open_study(tmp_path), StopSection(trials=5, hours=2)
    run = partial(Runner, study, MadeUpPool(), rules, "sampler", Stop())  # type: ignore[arg-type]
    assert run(begun=0.0).run() == "2.0 hours"
    assert states(study) == []
    assert run(begun=200.0).run() == "5 trials"


def test_stops_on_a_plateau(tmp_path: Path) -> None:
    """From the seventh trial on nothing is better than anything."""
    study = open_study(tmp_path)
    study.enqueue([(Allocation.dense(TARGETS), "dense")])

    def answer(job: Job) -> Outcome:
        return Outcome(job, score_of(job.allocation, nll=None if job.key < 7 else 50.0))

    plateau = PlateauSection(trials=5, tolerance=0.0)
    reason = runner(study, MadeUpPool(answer, size=1), plateau=plateau).run()
    assert reason == "hypervolume flat over 5 trials"
    history = hypervolumes(study)
    assert 12 <= len(history) <= 14
    assert history[11] == history[6] > 0
    assert runner(study, MadeUpPool(), plateau=plateau).run() == reason, "a resumed search has stopped too"
    assert len(study.rows()) == len(history)


def test_a_plateau_alone_does_not_wait_for_a_dense_model_that_failed(tmp_path: Path) -> None:
    """Another rule still ends the search; where the dense model is tried again, all goes on."""
    study, plateau = open_study(tmp_path), PlateauSection(trials=5, tolerance=0.0)
    dense = [(Allocation.dense(TARGETS), "dense")]
    study.enqueue(dense)

    def answer(job: Job) -> Outcome:
        dense = job.allocation.is_dense
        return Outcome(job, None, "out of memory") if dense else Outcome(job, score_of(job.allocation))

    reason = runner(study, MadeUpPool(answer, size=1), plateau=plateau).run()
    assert reason == "no plateau without a score of the dense model, trial 0: out of memory"
    assert runner(study, MadeUpPool(answer, size=1), plateau=plateau, trials=12).run() == "12 trials"
    study.enqueue(dense)
    assert runner(study, MadeUpPool(size=1), plateau=plateau).run() == "hypervolume flat over 5 trials"
    assert study.dense_score is not None


def test_the_first_rule_that_holds_stops(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert runner(study, MadeUpPool(), trials=7, tokens=10**9, hours=100).run() == "7 trials"
    assert runner(study, MadeUpPool(), trials=10**6, tokens=1_500).run() == "1,500 scored tokens"


def test_a_small_space_without_a_number_of_trials_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight allocations, all in flight or known: the loop must come back to its pool and its stop."""
    study, stop = open_study(tmp_path, levels=1, floor=0.5), Stop()
    propose, count = study.propose, []

    def counted(origin: str) -> Any:
        count.append(origin)
        if len(count) > 200:
            raise AssertionError("proposed 200 times without a look at the pool")
        return propose(origin)

    monkeypatch.setattr(study, "propose", counted)

    def answer(job: Job) -> Outcome:
        count.clear()
        stop.reason = "SIGINT" if sum(row.finished for row in study.rows()) > 5 else None
        return Outcome(job, score_of(job.allocation))

    assert runner(study, MadeUpPool(answer, size=8), stop, tokens=10**6).run() == "SIGINT"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> str:
    """Ten proposals in a row are enough; the reason that is then given."""
    monkeypatch.setattr("search.runner.EXHAUSTED", 10)
    return "nothing new in the last 10 proposals"


def small(folder: Path, lag: int | None = None) -> SearchStudy:
    """Of 27 allocations."""
    folder.mkdir(exist_ok=True)
    return open_study(folder, levels=2, lag=lag)


def test_a_search_of_a_small_space_ends_at_the_same_trial_however_often_it_is_stopped(
    tmp_path: Path, few: str
) -> None:
    """Among those that bring nothing new, too, and with trials in flight. Repeated, it adds none."""
    whole = small(tmp_path / "whole", lag=6)
    pool = MadeUpPool(size=4)
    assert runner(whole, pool).run() == few
    expected, scores = whole.rows(), len(pool.submitted)
    assert scores <= 27 < len(expected) - 10
    for between in (12, len(expected) - 5, len(expected) - 1):
        folder = tmp_path / f"between-{between}"
        runner(small(folder, lag=6), MadeUpPool(size=4), trials=between).run()
        assert len(small(folder).rows()) == between
        again = small(folder, lag=6)
        assert runner(again, MadeUpPool(size=4)).run() == few
        assert again.rows() == expected
    for flying in (0, 9, scores - 3, scores - 1):
        folder, stop, answered = tmp_path / f"flying-{flying}", Stop(), cycle(range(scores))

        def killed(job: Job, stop: Stop = stop, last: int = flying, answered: Any = answered) -> Outcome:
            stop.reason = "SIGKILL" if next(answered) >= last else None
            return Outcome(job, score_of(job.allocation))

        assert runner(small(folder, lag=6), MadeUpPool(killed, size=4), stop).run() == "SIGKILL"
        again = small(folder, lag=6)
        assert runner(again, MadeUpPool(size=4)).run() == few
        assert [row.allocation for row in again.rows()] == [row.allocation for row in expected]
    assert runner(small(folder, lag=6), MadeUpPool()).run() == few
    assert len(small(folder).rows()) == len(expected)


def test_a_search_that_ran_out_scores_what_is_enqueued_and_asks_another_sampler(
    tmp_path: Path, few: str
) -> None:
    study = small(tmp_path)
    runner(study, MadeUpPool()).run()
    count = study.started
    study.enqueue([(Allocation.of({"layers.0.up_proj": 7}, TARGETS), "enqueued")])
    assert runner(study, MadeUpPool()).run() == few
    assert states(study)[count] == "COMPLETE"
    assert study.started >= count + 1 + 10, "the sampler, which has learned of it, is asked again"
    count = study.started
    loop = Runner(study, MadeUpPool(), StopSection(trials=None), "another", Stop())  # type: ignore[arg-type]
    assert loop.run() == few
    assert study.started >= count + 10


def test_what_was_lost_is_new(tmp_path: Path, few: str) -> None:
    """A search whose replicas had no memory for any proposal ran out of nothing. What the model failed at is
    known."""
    for lost in (True, False):
        study = small(tmp_path / str(lost))
        study.enqueue([(study.dense, "dense")])

        def answer(job: Job, lost: bool = lost) -> Outcome:
            dense = job.allocation.is_dense
            return Outcome(job, score_of(job.allocation)) if dense else Outcome(job, None, "broken", lost)

        reason = runner(study, MadeUpPool(answer), trials=200).run()
        assert reason == ("200 trials" if lost else few)
        pool = MadeUpPool()
        assert runner(small(tmp_path / str(lost)), pool).run() == few
        assert (len({job.allocation.key for job in pool.submitted}) > 15) == lost


@pytest.mark.parametrize("rule", [{"trials": 200}, {"trials": None, "tokens": 1000}, {"hours": 9.0}])
def test_a_search_in_which_everything_fails_ends(tmp_path: Path, rule: dict[str, Any]) -> None:
    """It is tried again by the next run, and one score is enough to go on."""
    study = open_study(tmp_path)
    broken = MadeUpPool(lambda job: Outcome(job, None, "CUDA out of memory"))
    for _ in range(2):
        before = study.started
        reason = runner(study, broken, **rule).run()
        assert HOPELESS <= study.started - before <= HOPELESS + 4
        assert re.fullmatch(
            r"no trial has a score, \d+ failed; the last, trial \d+: CUDA out of memory", reason
        )
    answers = cycle([True] + [False] * 30)

    def rarely(job: Job) -> Outcome:
        good = next(answers)
        return Outcome(job, score_of(job.allocation) if good else None, None if good else "broken")

    assert runner(study, MadeUpPool(rarely), trials=study.started + 40).run().endswith(" trials")
