"""Scoring in stages, seen by the driver: who is sent along, what a stopped trial is, what it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes import TARGETS, MadeUpPool, loss, open_study, score_of

from actors.samples import pack_floats, unpack_floats
from actors.stages import Judge
from actors.types import Allocation, KlScore, Rival, Score
from search.pareto import front
from search.pool import Job, Outcome
from search.records import Objective
from search.rivals import MOST_RIVALS, rivals_of
from search.runner import Runner, Stop, minimised
from search.sections import StopSection
from search.study import SearchStudy


def with_windows(job: Job, nll: float | None = None) -> Score:
    """A score whose four windows lie around its mean."""
    score = score_of(job.allocation, nll)
    windows = pack_floats([score.text.nll + gap for gap in (-0.3, 0.1, 0.3, -0.1)])
    return replace(score, text=replace(score.text, windows=windows))


def staged_answer(job: Job) -> Outcome:
    """As a replica: stopped by the first rival that is better on every window."""
    score, judge = with_windows(job), Judge((64,), 32, job.rivals)
    if judge.stops({"nll": unpack_floats(score.text.windows)[:2]}):
        score = replace(score, stopped_by=judge.stopped_by, tasks={}, forward_tokens=25)
    return Outcome(job, score)


def run(study: SearchStudy, pool: MadeUpPool, staged: bool = True, **rules: Any) -> str:
    section = StopSection(**{"trials": None, **rules})
    return Runner(study, pool, section, "sampler", Stop(), staged=staged).run()  # type: ignore[arg-type]


def states(study: SearchStudy) -> list[str]:
    return [row.state for row in study.rows()]


def test_trials_go_out_with_the_front_that_is_no_larger(tmp_path: Path) -> None:
    """As it is known at dispatch: nearest in size first, never the trial itself, never a larger one."""
    study = open_study(tmp_path, levels=40)
    known: dict[int, dict[int, tuple[float, ...]]] = {}

    class Watching(MadeUpPool):
        def submit(self, job: Job) -> None:
            rows = [row for row in study.rows() if row.values is not None]
            known[job.key] = {row.number: row.values for row in rows if row.values is not None}
            super().submit(job)

    pool = Watching(lambda job: Outcome(job, with_windows(job)))
    run(study, pool, trials=40)
    for job in pool.submitted:
        size = study.budgets(job.allocation)["budget.model"]
        smaller = {number: values for number, values in known[job.key].items() if values[0] <= size}
        undominated = [
            number
            for number, (budget, nll) in smaller.items()
            if not any(b <= budget and n <= nll and (b, n) != (budget, nll) for b, n in smaller.values())
        ]
        expected = sorted(undominated, key=lambda number: -smaller[number][0])[:MOST_RIVALS]
        assert [rival.trial for rival in job.rivals] == expected
    assert max(len(job.rivals) for job in pool.submitted) > 2
    assert sum(len(job.rivals) == 0 for job in pool.submitted) < 20


def test_dominated_trials_are_stopped_and_the_front_is_kept(tmp_path: Path) -> None:
    """The same proposals (random), without stages and with them."""
    folders = [tmp_path / name for name in ("whole", "part")]
    for folder in folders:
        folder.mkdir()
    whole, part = (open_study(folder, levels=40) for folder in folders)
    run(whole, MadeUpPool(lambda job: Outcome(job, with_windows(job))), trials=60, staged=False)
    assert run(part, MadeUpPool(staged_answer), trials=60) == "60 trials", "stopped ones count"
    assert states(part).count("PRUNED") > 10
    assert set(states(part)) == {"COMPLETE", "PRUNED"}

    def members(study: SearchStudy) -> list[int]:
        values, numbers = minimised(study)
        return numbers[front(values)].tolist()

    assert members(part) == members(whole)
    for row in part.rows():
        assert (row.stopped_by is None) == (row.state == "COMPLETE") == (row.values is not None)
        if row.stopped_by is not None:
            rival = part.rows()[row.stopped_by]
            assert rival.budget_model <= row.budget_model
            assert loss(rival.allocation) < loss(row.allocation)


def test_tokens_of_stopped_trials_count(tmp_path: Path) -> None:
    """A quarter each here; the rule is looked at when one ends, whole or not."""
    study = open_study(tmp_path)

    def answer(job: Job) -> Outcome:
        part = replace(with_windows(job), stopped_by=0, tasks={}, forward_tokens=25)
        return Outcome(job, with_windows(job) if job.key == 0 else part)

    assert run(study, MadeUpPool(answer, size=1), tokens=300) == "300 scored tokens"
    assert states(study) == ["COMPLETE"] + ["PRUNED"] * 9, "one was in flight"


def test_what_was_asked_for_is_scored_whole(tmp_path: Path) -> None:
    study, pool = open_study(tmp_path), MadeUpPool(staged_answer, size=1)
    run(study, pool, trials=6)
    for rank, origin in ((1, "enqueued"), (2, "uniform"), (3, "dense")):
        study.enqueue([(Allocation.of({"layers.0.q_proj": rank}, TARGETS), origin)])
    run(study, pool, trials=6)
    assert [job.rivals for job in pool.submitted[-3:]] == [()] * 3
    assert states(study)[-3:] == ["COMPLETE"] * 3


def test_a_stopped_allocation_is_not_scored_again_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Nor is its part an answer where there are no stages any more."""
    study = open_study(tmp_path, levels=1)
    pool = MadeUpPool(staged_answer, size=1)
    run(study, pool, trials=40)
    keys = [job.allocation.key for job in pool.submitted]
    assert len(set(keys)) == len(keys) <= 8
    stopped = [row for row in study.rows() if row.stopped_by is not None]
    assert any(row.copied_from is not None for row in stopped)
    assert {row.copied_from for row in stopped} - {None} <= {row.number for row in stopped}
    study.enqueue([(stopped[0].allocation, "enqueued")])
    run(study, pool, trials=40)
    assert (states(study)[40], pool.submitted[-1].key) == ("COMPLETE", 40)
    unstaged = MadeUpPool(size=1)
    run(study, unstaged, trials=80, staged=False)
    scored = {job.allocation.key for job in unstaged.submitted}
    assert scored == {row.allocation.key for row in stopped} - {stopped[0].allocation.key}


def test_a_twin_that_was_asked_for_is_scored_whole(tmp_path: Path) -> None:
    """It waited for an equal proposal of the sampler's, which was stopped."""
    study = open_study(tmp_path)
    small, victim = ({"q_proj": level, "up_proj": level, "down_proj": level} for level in (0, 5))
    study._study.enqueue_trial(small)

    def answer(job: Job) -> Outcome:
        return Outcome(job, with_windows(job, nll=1.0)) if job.key == 0 else staged_answer(job)

    run(study, MadeUpPool(answer), trials=1)
    study.enqueue([(study._space.allocation(victim), "sampler")])
    study._study.enqueue_trial(victim)
    pool = MadeUpPool(answer)
    run(study, pool, trials=1)
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert [(job.key, [rival.trial for rival in job.rivals]) for job in pool.submitted] == [(1, [0]), (2, [])]


def test_a_rival_is_no_larger_in_every_cost_and_has_its_windows(tmp_path: Path) -> None:
    names = ("budget.model", "budget.bytes", "nll", "kl")
    objectives = tuple(Objective(name, True) for name in names)
    study = open_study(tmp_path)
    run(study, MadeUpPool(lambda job: Outcome(job, with_windows(job))), trials=1)
    [row] = study.rows()
    assert row.score is not None
    kl = KlScore(8, nats=0.1, tokens=100, stderr=0.0, windows=pack_floats([0.1] * 4))
    full = replace(row, values=(0.5, 0.6, 2.0, 0.1), score=replace(row.score, kl=kl))
    members = [
        full,
        replace(full, number=1, values=(0.6, 0.5, 2.0, 0.1)),
        replace(full, number=2, score=row.score),  # no divergence was asked for
        replace(full, number=3, score=replace(full.score, text=replace(row.score.text, windows=""))),
        replace(full, number=4, values=(0.4, 0.6, 2.0, 0.1)),
    ]
    windows = {"nll": row.score.text.windows, "kl": kl.windows}
    budgets = {"budget.model": 0.55, "budget.linear": 0.1, "budget.bytes": 0.6}
    assert rivals_of(budgets, members, objectives) == (Rival(0, windows), Rival(4, windows))
    assert rivals_of({**budgets, "budget.bytes": 0.55}, members, objectives) == ()
