"""The loop against a made-up pool: what it asks for, what it records, when it stops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import DENSE_NLL, TARGETS, MadeUpPool, dies_before_the_state, loss, open_study, plain, score_of
from optuna.trial import TrialState

from actors.types import Allocation, KlScore, TextScore
from search.journal import open_journal
from search.pool import Job, Outcome
from search.records import Objective
from search.runner import Runner, Stop, hypervolumes, minimised, reference_point
from search.sections import PlateauSection, StopSection
from search.study import SearchStudy


def runner(study: SearchStudy, pool: MadeUpPool, stop: Stop | None = None, **rules: Any) -> Runner:
    section = StopSection(**{"trials": None, **rules})
    return Runner(study, pool, section, "sampler", stop or Stop())  # type: ignore[arg-type]


def states(study: SearchStudy) -> list[str]:
    return [row.state for row in study.rows()]


def enqueue(study: SearchStudy, *ranks: int) -> None:
    study.enqueue((Allocation.of({"layers.0.up_proj": rank}, TARGETS), "enqueued") for rank in ranks)


# -- stop rules -------------------------------------------------------------------------------


def test_stops_at_the_number_of_trials(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path), MadeUpPool()
    assert runner(study, pool, trials=9).run() == "9 trials"
    assert states(study) == ["COMPLETE"] * 9
    assert [job.key for job in pool.submitted] == list(range(9))
    assert runner(study, pool, trials=12).run() == "12 trials"
    assert states(study) == ["COMPLETE"] * 12
    assert [job.key for job in pool.submitted] == list(range(12)), "no trial is scored twice"


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
    loop.progress.started = 0.0
    assert loop.run() == "1.5 hours"
    assert states(study) == ["COMPLETE"] * 11, "more than 90 minutes after ten, and one more was in flight"


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


# -- the hypervolume's reference --------------------------------------------------------------


def test_the_hypervolume_is_measured_from_ten_times_the_dense_perplexity(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    runner(study, MadeUpPool(), trials=3).run()
    assert reference_point(study) is None
    assert hypervolumes(study).tolist() == []
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    runner(study, MadeUpPool(), trials=4).run()
    budget, nll = reference_point(study) or (0, 0)
    assert budget == 1.0
    assert math.exp(nll) == pytest.approx(10 * math.exp(DENSE_NLL))


def test_the_hypervolume_is_measured_from_log_ten_nats_of_divergence(tmp_path: Path) -> None:
    """The dense model's own divergence is 0."""

    def diverging(job: Job) -> Outcome:
        score = score_of(job.allocation)
        return Outcome(job, replace(score, kl=KlScore(8, nats=0.0, tokens=score.text.tokens, stderr=0.0)))

    study = open_study(tmp_path, objectives=(Objective("budget.model", True), Objective("kl", True)))
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    runner(study, MadeUpPool(diverging), trials=1).run()
    assert [row.values for row in study.rows()] == [(1.0, 0.0)]
    assert reference_point(study) == (1.0, pytest.approx(math.log(10)))


def test_the_hypervolume_of_a_corpus_is_measured_from_its_own_dense_loss(tmp_path: Path) -> None:
    def scored(job: Job) -> Outcome:
        text = TextScore("c4@32", nats=500.0, tokens=100, stderr=0.0)
        return Outcome(job, replace(score_of(job.allocation), corpora={"c4": text}))

    study = open_study(tmp_path, objectives=(Objective("budget.model", True), Objective("nll.c4", True)))
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    runner(study, MadeUpPool(scored), trials=1).run()
    assert reference_point(study) == (1.0, pytest.approx(5 + math.log(10)))


def test_maximised_objectives_have_their_sign_turned(tmp_path: Path) -> None:
    objectives = (Objective("budget.model", True), Objective("reasoning.margin", False))
    study = open_study(tmp_path, objectives=objectives)
    runner(study, MadeUpPool(), trials=3).run()
    values, numbers = minimised(study)
    assert numbers.tolist() == [0, 1, 2]
    assert values[:, 1].tolist() == [-0.25] * 3
    assert values[:, 0].tolist() == [row.budget_model for row in study.rows()]
    assert all(loss(row.allocation) > 0 for row in study.rows())
