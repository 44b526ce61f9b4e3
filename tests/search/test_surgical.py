"""The surgical search against a plain re-implementation of the paper's loops, and what survives a stop."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from fakes import (
    DENSE_NLL,
    LINEAR_PARAMETERS,
    TARGETS,
    MadeUpPool,
    dies_before_the_state,
    loss,
    open_study,
    score_of,
)
from optuna.trial import TrialState
from walks import (
    COST,
    EXAMPLES,
    PRINTS,
    TASK_MODE,
    TEXT_MODE,
    Answer,
    Run,
    by_chance,
    by_task,
    by_text,
    paper,
    with_hits,
)

from actors.types import Allocation, RankfrontError, Score, TargetSpec
from search.alone import Log
from search.config import ConfigError, parse_config
from search.cost import CostModel
from search.events import silent
from search.pool import Outcome
from search.runner import Stop
from search.sections import SurgicalSection
from search.surgical import TaskRule, Walk, ladder, make_rule, order
from search.surgical_run import FILE, score_open_trials


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("growth", [0.0, 0.005, 0.02, 0.1])
def test_perplexity_mode_is_the_papers(tmp_path: Path, growth: float, size: int) -> None:
    section = TEXT_MODE.model_copy(update={"growth": growth})
    assert Run(tmp_path, section, by_text, size).ranks == paper(by_text, growth=growth)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("delta", [0.0, 0.2, 0.35])
@pytest.mark.parametrize("score", [by_task, by_chance])
def test_task_mode_is_the_papers(tmp_path: Path, score: Answer, delta: float, size: int) -> None:
    section = TASK_MODE.model_copy(update={"delta": delta})
    expected = paper(score, task=True, delta=delta)
    assert Run(tmp_path, section, score, size).ranks == expected
    assert delta == 0.0 or any(rank is not None for rank in expected.values())


def test_a_rank_that_all_parts_agree_on_is_taken_back(tmp_path: Path) -> None:
    """The first part passes at rank 1 only, the others at the next rank only: there the whole has lost."""
    target, third = TARGETS[-1], EXAMPLES // 3
    first, second = ladder("paper", COST, target)[:2]

    def score(allocation: Allocation) -> Score:
        rank = allocation.to_dict()[target.name]
        parts = {first: [True, False, False], second: [False, True, True]}.get(rank or 0, [rank is None] * 3)
        return with_hits(allocation, [good for good in parts for _ in range(third)])

    run = Run(tmp_path, TASK_MODE, score)
    assert run.ranks[target.name] is None
    assert second in {job.allocation.to_dict()[target.name] for job in run.pool.submitted}
    assert run.ranks == paper(score, task=True, delta=0.2)


def test_a_candidate_without_a_score_is_not_accepted(tmp_path: Path) -> None:
    """Rank 1 of one target breaks the model, in a mode of one part and in one of three."""
    broken = TARGETS[-1].name

    def breaking(score: Answer) -> Answer:
        return lambda allocation: None if allocation.to_dict()[broken] == 1 else score(allocation)

    for name, section, score in (("text", TEXT_MODE, by_text), ("task", TASK_MODE, by_task)):
        (tmp_path / name).mkdir()
        found = Run(tmp_path / name, section, breaking(score)).ranks
        expected = paper(breaking(score), task=name == "task", growth=0.02, delta=0.2)
        assert found == expected
        assert found[broken] != 1


def test_a_candidate_that_died_with_its_replica_is_asked_again(tmp_path: Path) -> None:
    """Neither accepted nor refused: the next run decides as if nothing had happened."""
    folder = tmp_path / "died"
    folder.mkdir()
    with pytest.raises(
        RankfrontError, match=r"at rank \d+ was not scored: replica-0 died; .* the next run asks"
    ):
        Run(folder, TEXT_MODE, by_text, dies_at=5)
    assert len((folder / FILE).read_text().splitlines()) == 4
    assert Run(folder, TEXT_MODE, by_text).ranks == Run(tmp_path, TEXT_MODE, by_text).ranks


def test_what_was_lost_and_nobody_needs_ends_nothing(tmp_path: Path) -> None:
    """With three replicas, candidates above the one that is taken are scored for nothing, or lost."""
    section = SurgicalSection(skip_blocks=1, growth=0.5)
    alone = Run(tmp_path, section, by_text)
    needed, folder = {*alone.scored}, tmp_path / "three"
    folder.mkdir()
    found = Run(folder, section, by_text, size=3, losing=lambda job: job.allocation.key not in needed)
    assert {*found.scored} > needed
    assert found.ranks == alone.ranks


def test_one_replica_scores_nothing_beyond_the_accepted_rank(tmp_path: Path) -> None:
    """A scan ends at the first rank that passes; with more replicas, at most one more on each."""
    alone = Run(tmp_path, TEXT_MODE, by_text)
    expected = 0
    for step in alone.walk.steps:
        ranks = ladder("paper", COST, step.target)
        expected += len(ranks) if step.rank is None else ranks.index(step.rank) + 1
    assert len(alone.scored) == len(set(alone.scored)) == expected


@pytest.mark.parametrize("growth", [0.02, 0.5])
def test_no_candidate_is_left_on_the_replicas(tmp_path: Path, growth: float) -> None:
    """What scores next on the same pool would take its outcome for one of its own."""
    run = Run(tmp_path, SurgicalSection(skip_blocks=3, growth=growth), by_text, size=4)
    assert run.walk.done
    assert run.pool.outstanding == 0
    log = Log(tmp_path, PRINTS, FILE)
    assert all(log.score(key) is not None for key in run.scored)


def test_bisection_finds_the_same_ranks_with_fewer_scores(tmp_path: Path) -> None:
    for name in ("scan", "bisect"):
        (tmp_path / name).mkdir()
    section = SurgicalSection(skip_blocks=0, growth=0.02, ladder="shares")
    scan = Run(tmp_path / "scan", section, by_text)
    halves = Run(tmp_path / "bisect", section.model_copy(update={"ranks": "bisect"}), by_text)
    assert halves.ranks == scan.ranks
    assert len(halves.scored) <= len(TARGETS) * math.ceil(math.log2(10))
    assert len(halves.scored) < len(scan.scored)


@pytest.mark.parametrize("ranks", ["scan", "bisect"])
def test_a_walk_follows_from_its_answers_alone(tmp_path: Path, ranks: str) -> None:
    """Where acceptance is not monotone too: neither replicas nor a restart change what is decided."""

    def rough(allocation: Allocation) -> Score:
        noise = 0.02 * random.Random(allocation.key).random()
        return score_of(allocation, nll=loss(allocation) + (0.0 if allocation.is_dense else noise))

    section = SurgicalSection(skip_blocks=0, growth=0.005, ladder="shares", ranks=ranks)
    found = []
    for size in (1, 3, 6):
        (tmp_path / str(size)).mkdir()
        found.append(Run(tmp_path / str(size), section, rough, size).ranks)
        again = Run(tmp_path / str(size), section, rough, size)
        assert again.scored == [], "all of it is answered"
        assert again.ranks == found[-1]
    assert found == [found[0]] * 3


def test_an_accuracy_that_falls_by_delta_is_accepted() -> None:
    """Of 100 examples 33 and 30: 0.33 less 0.03 is more than 0.3 in floating point."""
    rule = TaskRule("arc", 0.03, parts=1)
    dense, *others = (
        with_hits(Allocation.dense(TARGETS), [n < hits for n in range(100)]) for hits in (33, 30, 29)
    )
    assert [(rule.passes(each, dense, 1), rule.holds(each, dense)) for each in others] == [
        ((True,), True),
        ((False,), False),
    ]


def test_every_accepted_step_is_a_trial(tmp_path: Path) -> None:
    run = Run(tmp_path, TEXT_MODE, by_text)
    rows = run.study.rows()
    accepted = [step.allocation for step in run.walk.steps if step.rank is not None]
    assert [row.allocation for row in rows] == [Allocation.dense(TARGETS), *accepted]
    assert {row.state for row in rows} == {"COMPLETE"}
    assert [row.origin for row in rows] == ["dense", *["surgical"] * len(accepted)]
    assert [row.values[1] for row in rows if row.values] == [loss(row.allocation) for row in rows]
    budgets = [row.budget_model for row in rows]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("size", [1, 3])
def test_halving_leaves_what_passes_on_its_way_too(tmp_path: Path, size: int) -> None:
    """Of one target the largest first; the same with more replicas, and what fails is no trial."""
    section = SurgicalSection(skip_blocks=1, growth=0.2, ranks="bisect")
    run = Run(tmp_path, section, by_text, size=size)
    accepted = [each for step in run.walk.steps for each in step.accepted]
    assert [row.allocation for row in run.study.rows()] == [Allocation.dense(TARGETS), *accepted]
    assert len(accepted) > sum(step.rank is not None for step in run.walk.steps)
    (tmp_path / "alone").mkdir()
    alone = Run(tmp_path / "alone", section, by_text)
    assert accepted == [each for step in alone.walk.steps for each in step.accepted]
    for visited, step in enumerate(run.walk.steps, start=1):
        ranks = [allocation.to_dict()[step.target.name] or 99 for allocation in step.accepted]
        assert ranks == sorted(ranks, reverse=True)
        for allocation in step.passed:
            assert loss(allocation) <= DENSE_NLL + visited * math.log1p(section.growth) + 1e-9


@pytest.mark.parametrize("stop_after", [1, 7, 20])
def test_a_stopped_walk_goes_on_where_it_was(tmp_path: Path, stop_after: int) -> None:
    for name in ("whole", "halted"):
        (tmp_path / name).mkdir()
    whole = Run(tmp_path / "whole", TEXT_MODE, by_text)
    halted = Run(tmp_path / "halted", TEXT_MODE, by_text, stop_after=stop_after)
    assert not halted.walk.done
    resumed = Run(tmp_path / "halted", TEXT_MODE, by_text)
    assert resumed.ranks == whole.ranks
    assert halted.scored + resumed.scored == whole.scored
    assert [row.allocation for row in resumed.study.rows()] == [row.allocation for row in whole.study.rows()]


def test_a_trial_that_was_cut_off_is_known_when_it_is_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded RUNNING, then killed: the next driver ends it, and does not add it a second time."""
    study, allocation = open_study(tmp_path), COST.uniform(0.8)
    with dies_before_the_state(study, monkeypatch):
        study.add(allocation, "surgical", score_of(allocation))
    monkeypatch.undo()
    study = open_study(tmp_path)
    assert [row.state for row in study.rows()] == [TrialState.RUNNING.name]
    study.replay()
    assert study.add(allocation, "surgical", score_of(allocation)) is None
    assert [row.state for row in open_study(tmp_path).rows()] == [TrialState.COMPLETE.name]


def test_the_papers_ladder_and_order() -> None:
    target = TargetSpec("x", 100, 60, False, 0, "x")  # mn/(m+n) = 37.5
    assert ladder("paper", COST, target) == [1, 3, 7, 11, 14, 18, 22, 25, 29, 33]
    found = order(TARGETS, 2)
    assert [t.name for t in found] == [t.name for t in TARGETS[:5:-1]]
    with pytest.raises(RankfrontError, match=r"surgical\.skip_blocks: 4 of 4 blocks leave no target"):
        order(TARGETS, 4)


def test_shares_are_of_stored_parameters() -> None:
    cost = CostModel(TARGETS, LINEAR_PARAMETERS, "pivoted", "none")
    for target in TARGETS[:3]:
        for share, rank in zip(range(1, 10), ladder("shares", cost, target), strict=True):
            assert cost.compressed(target, rank) <= share / 10 * target.parameters
            assert cost.compressed(target, rank + 1) > share / 10 * target.parameters


def test_the_dense_model_must_have_a_score(tmp_path: Path) -> None:
    """The run that finds none says why; the next one asks again."""
    study, dense = open_study(tmp_path), (Allocation.dense(TARGETS), "dense")
    study.enqueue([dense])
    broken = MadeUpPool(lambda job: Outcome(job, None, "nll is nan"))
    with pytest.raises(RankfrontError, match="the dense model has no score on the search split: nll is nan"):
        score_open_trials(study, broken, Stop(), silent)  # type: ignore[arg-type]
    study.enqueue([dense])
    score_open_trials(study, MadeUpPool(), Stop(), silent)  # type: ignore[arg-type]
    assert [row.state for row in study.rows()] == [TrialState.FAIL.name, TrialState.COMPLETE.name]
    study.enqueue([dense])
    assert not study.waiting


def test_a_task_of_fewer_examples_than_parts_is_refused() -> None:
    with pytest.raises(RankfrontError, match="arc has 2 examples on the search split, too few for 3 parts"):
        make_rule(TASK_MODE, {"arc": 2})


def test_a_walk_begins_at_the_dense_score() -> None:
    walk = Walk(COST, TEXT_MODE, make_rule(TEXT_MODE, {}), lambda allocation: None)
    with pytest.raises(RankfrontError, match="the dense model has no score on the search split"):
        next(walk.advance())


def test_a_config_that_cannot_be_walked_is_refused() -> None:
    raw = {
        "study": "made-up",
        "model": {"source": "org/model"},
        "text": {"source": "org/text"},
        "scoring": {"tasks": ["arc_easy", "piqa"], "examples": {"search": 2, "test": 2}},
        "surgical": {"mode": "task", "task": "boolq"},
    }
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert error.value.mistakes == [
        "surgical.task: 'boolq' is not scored; one of arc_easy, piqa",
        "scoring.examples.search: 2 are too few for the 3 parts of surgical.mode: task",
    ]
    with pytest.raises(ConfigError, match=r"surgical\.mode: 'task' needs scoring\.tasks, which is empty"):
        parse_config({**raw, "scoring": {}, "surgical": {"mode": "task"}})
