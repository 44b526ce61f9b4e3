"""The loop against a made-up pool: what it asks for, and what it records."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fakes import (
    TARGETS,
    MadeUpPool,
    dies_before_the_state,
    open_study,
    plain,
    runner,
    score_of,
    states,
)
from optuna.trial import TrialState

from actors.types import Allocation
from search.journal import open_journal
from search.pool import Job, Outcome
from search.runner import Stop
from search.study import SearchStudy


def enqueue(study: SearchStudy, *ranks: int) -> None:
    study.enqueue((Allocation.of({"layers.0.up_proj": rank}, TARGETS), "enqueued") for rank in ranks)


def test_the_recorded_score_is_the_replicas(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    runner(study, MadeUpPool(), trials=6).run()
    assert [row.score for row in study.rows()] == [score_of(row.allocation) for row in study.rows()]
    assert open_study(tmp_path).rows() == study.rows()


def test_every_replica_is_kept_busy_with_one_trial_ahead(tmp_path: Path) -> None:
    study, ahead = open_study(tmp_path, levels=40), []

    def answer(job: Job) -> Outcome:
        ahead.append(study.started - sum(row.finished for row in study.rows()))
        return Outcome(job, score_of(job.allocation))

    runner(study, MadeUpPool(answer, size=3), trials=20).run()
    assert set(ahead[:15]) == {6}
    assert ahead[-6:] == [6, 5, 4, 3, 2, 1], "the end is drained, not dropped"


def test_a_trial_is_dispatched_only_after_it_is_on_disk(tmp_path: Path) -> None:
    study, seen = open_study(tmp_path), []

    class Watching(MadeUpPool):
        def submit(self, job: Job) -> None:
            trials = open_journal(tmp_path).get_all_trials(0)
            seen.append((trials[job.key].state.name, trials[job.key].number))
            super().submit(job)

    runner(study, Watching(), trials=8).run()
    assert seen == [("RUNNING", number) for number in range(8)]


# -- failures ---------------------------------------------------------------------------------


def test_failures_are_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    def answer(job: Job) -> Outcome:
        bad = job.key % 3 == 1
        return Outcome(job, None, f"trial {job.key} broke") if bad else Outcome(job, score_of(job.allocation))

    study = open_study(tmp_path)
    runner(study, MadeUpPool(answer), trials=9).run()
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"] * 3
    assert [row.reason for row in study.rows() if row.state == "FAIL"] == [
        f"trial {number} broke" for number in (1, 4, 7)
    ]


@pytest.mark.parametrize("nll", [math.nan, math.inf, -math.inf, -0.5])
def test_a_score_that_is_none_fails_its_trial(tmp_path: Path, nll: float) -> None:
    def answer(job: Job) -> Outcome:
        return Outcome(job, score_of(job.allocation, nll=nll if job.key == 2 else None))

    study = open_study(tmp_path)
    runner(study, MadeUpPool(answer), trials=5).run()
    row = study.rows()[2]
    assert (row.state, row.values, row.score) == ("FAIL", None, None)
    assert row.reason is not None
    assert f"nll is {nll}" in row.reason
    assert states(study).count("COMPLETE") == 4


def test_a_foreign_trial_outside_the_space_does_not_end_the_search(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study._study.enqueue_trial({"q_proj": 1, "up_proj": 999, "down_proj": 1})
    runner(study, MadeUpPool(), trials=5).run()
    assert states(study)[0] == "FAIL"
    assert states(study).count("COMPLETE") == 4


# -- duplicates -------------------------------------------------------------------------------


def test_duplicates_in_flight_wait_for_their_twin(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path), MadeUpPool()
    for _ in range(3):
        study._study.enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    runner(study, pool, trials=3).run()
    assert [job.key for job in pool.submitted] == [0]
    assert [row.copied_from for row in study.rows()] == [None, 0, 0]
    assert len({row.values for row in study.rows()}) == 1
    assert states(study) == ["COMPLETE"] * 3


def test_twins_of_a_failed_trial_fail_with_it(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    pool = MadeUpPool(lambda job: Outcome(job, None, "broken"))
    for _ in range(2):
        study._study.enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    runner(study, pool, trials=2).run()
    assert [(row.state, row.reason) for row in study.rows()] == [("FAIL", "broken")] * 2
    assert len(pool.submitted) == 1


def test_known_allocations_are_not_scored_again(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path, levels=1), MadeUpPool(size=1)
    runner(study, pool, trials=40).run()
    keys = [job.allocation.key for job in pool.submitted]
    assert len(set(keys)) == len(keys) <= 8
    assert states(study) == ["COMPLETE"] * 40
    assert all(row.score == score_of(row.allocation) for row in study.rows())
    sources = {row.copied_from for row in study.rows()} - {None}
    assert sources <= {job.key for job in pool.submitted}


# -- resuming, stopping, enqueuing ------------------------------------------------------------


def test_trials_in_flight_of_the_last_driver_are_scored_first(tmp_path: Path) -> None:
    before = open_study(tmp_path)
    lost = [before.propose("random") for _ in range(5)]
    before.complete(lost[2], score_of(lost[2].allocation))
    study, pool = open_study(tmp_path), MadeUpPool(size=1)
    runner(study, pool, trials=8).run()
    flying = [planned for planned in lost if planned.number != 2]
    assert pool.submitted[:4] == [Job(planned.number, planned.allocation) for planned in flying]
    assert [job.key for job in pool.submitted] == [0, 1, 3, 4, 5, 6, 7]
    assert states(study) == ["COMPLETE"] * 8
    assert [row.allocation for row in study.rows()[:5]] == [planned.allocation for planned in lost]


def test_a_trial_in_flight_whose_score_is_known_is_answered_from_the_record(tmp_path: Path) -> None:
    """The driver died after it recorded a trial, before it answered that trial's twin."""
    before = open_study(tmp_path)
    for _ in range(2):
        before._study.enqueue_trial({"q_proj": 1, "up_proj": 2, "down_proj": 3})
    first, _ = before.propose("random"), before.propose("random")
    before.complete(first, score_of(first.allocation))
    study, pool = open_study(tmp_path), MadeUpPool(size=1)
    runner(study, pool, trials=2).run()
    assert pool.submitted == []
    assert [row.copied_from for row in study.rows()] == [None, 0]
    assert states(study) == ["COMPLETE"] * 2


def test_a_finished_result_is_replayed_before_anything_is_dispatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_study(tmp_path)
    planned = before.propose("random")
    with dies_before_the_state(before, monkeypatch):
        before.complete(planned, score_of(planned.allocation))
    study, pool = open_study(tmp_path), MadeUpPool(size=1)
    runner(study, pool, trials=2).run()
    assert [job.key for job in pool.submitted] == [1]
    assert states(study) == ["COMPLETE"] * 2


def test_trials_that_another_program_ends_do_not_end_the_search(tmp_path: Path) -> None:
    study = open_study(tmp_path)

    def answer(job: Job) -> Outcome:
        if job.key in (1, 2):
            plain(tmp_path).tell(job.key, state=TrialState.FAIL)
        return Outcome(job, None, "broken") if job.key == 2 else Outcome(job, score_of(job.allocation))

    runner(study, MadeUpPool(answer), trials=5).run()
    assert states(study) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]


def test_stop_ends_the_loop_and_leaves_trials_to_the_next_run(tmp_path: Path) -> None:
    stop, study = Stop(), open_study(tmp_path)

    def answer(job: Job) -> Outcome:
        if job.key == 4:
            stop.reason = "SIGINT"
        return Outcome(job, score_of(job.allocation))

    pool = MadeUpPool(answer)
    assert runner(study, pool, stop, trials=50).run() == "SIGINT"
    assert states(study) == ["COMPLETE"] * 5 + ["RUNNING"] * 3
    pool.close()
    again, rest = open_study(tmp_path), MadeUpPool()
    assert runner(again, rest, trials=10).run() == "10 trials"
    assert [job.key for job in rest.submitted] == [5, 6, 7, 8, 9]
    assert [row.allocation for row in again.rows()[:8]] == [row.allocation for row in study.rows()]


def test_stop_before_the_first_trial_dispatches_none(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path), MadeUpPool()
    assert runner(study, pool, Stop("SIGTERM"), trials=50).run() == "SIGTERM"
    assert pool.submitted == []
    assert study.rows() == ()


def test_enqueued_trials_beyond_the_number_are_scored(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path), MadeUpPool()
    runner(study, pool, trials=4).run()
    enqueue(study, 3, 9, 17)
    runner(study, pool, trials=4).run()
    assert states(study) == ["COMPLETE"] * 7
    assert [row.origin for row in study.rows()] == ["sampler"] * 4 + ["enqueued"] * 3
    assert dict(pool.submitted[-1].allocation)["layers.0.up_proj"] == 17


def test_trials_enqueued_while_running_are_next(tmp_path: Path) -> None:
    study, other = open_study(tmp_path), open_study(tmp_path)

    def answer(job: Job) -> Outcome:
        if job.key == 3:
            enqueue(other, 11)
        return Outcome(job, score_of(job.allocation))

    runner(study, MadeUpPool(answer, size=1), trials=10).run()
    rows = study.rows()
    assert states(study) == ["COMPLETE"] * 10, "an enqueued trial counts as one of the study's trials"
    [place] = [row.number for row in rows if row.origin == "enqueued"]
    assert place == 5, "trials 0 to 4 were proposed when trial 3 ended"
    assert rows[place].score == score_of(Allocation.of({"layers.0.up_proj": 11}, TARGETS))
