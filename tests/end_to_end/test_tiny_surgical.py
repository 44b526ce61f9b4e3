"""`rankfront surgical` on a tiny model and a real Ray: stopped by Ctrl-C, gone on with, run again when done.

One study is walked by the accuracy of a task, in three runs; another one by perplexity, in one. Each run is a
fixture; the tests look at what it left. The commands run in this process, their replicas do not.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial
from studies import Ended, Study, complete

from actors.types import Allocation, Score
from search.alone import Cell, Record
from search.folder import StudyFolder
from search.records import TrialRow
from search.surgical import STEPS, ladder
from search.surgical_run import FILE, Answers

# With so little leave some of the targets are not accepted at rank 1, by either rule.
TASK, DELTA, GROWTH = "arc_easy", 0.25, 0.003
PARTS = (slice(0, 2), slice(2, 4), slice(4, 6))
MODULES = ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")
# The first block is skipped.
WALKED = [f"model.layers.{block}.{module}" for block in (2, 1) for module in MODULES]
HALTED_AFTER = 5
FILES = ("front.json", "front.png", "report.html", "trials.parquet", "evaluations.parquet")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("surgical")


def study_of(root: Path, name: str, **surgical: object) -> Study:
    section = {"skip_blocks": 1, **surgical}
    include = [f"*{module}" for module in MODULES]
    return Study(root, name, None, targets={"include": include}, surgical=section)


@dataclass(frozen=True)
class Run:
    """How a command ended, the answers that were on disk then, and what was asked in it."""

    ended: Ended
    answers: list[Record]
    added: int


def run(study: Study, halted_after: int | None = None) -> Run:
    """The command; a SIGINT arrives once so many answers of it are kept."""
    added = 0

    def counted(answers: Answers, cell: Cell, score: Score | None, reason: str | None) -> None:
        nonlocal added
        add(answers, cell, score, reason)
        added += 1
        assert added <= STEPS * len(WALKED), "it asks the same again"
        if added == halted_after:
            signal.raise_signal(signal.SIGINT)

    add = Answers.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answers, "add", counted)
        ended = study.here("surgical", study.config)
    lines = (study.folder / FILE).read_text().splitlines()
    return Run(ended, [Record.from_dict(json.loads(line)) for line in lines], added)


@pytest.fixture(scope="module")
def study(root: Path, cluster: str) -> Study:
    return study_of(root, "by-task", mode="task", task=TASK, delta=DELTA)


@pytest.fixture(scope="module")
def halted(study: Study) -> Run:
    return run(study, HALTED_AFTER)


@pytest.fixture(scope="module")
def resumed(study: Study, halted: Run) -> Run:
    return run(study)


@pytest.fixture(scope="module")
def files(study: Study, resumed: Run) -> dict[str, bytes]:
    return study.content()


def rows(study: Study) -> tuple[TrialRow, ...]:
    return StudyFolder.open(study.folder).read_study().rows()


def by_task(scores: Sequence[Score], dense: Score, visited: int) -> int | None:
    """Which of the scores of a ladder is taken: the largest of those that are each part's first to pass."""

    def lost(score: Score, part: slice) -> float:
        hits, theirs = score.tasks[TASK].samples("acc")[part], dense.tasks[TASK].samples("acc")[part]
        return (sum(theirs) - sum(hits)) / len(hits)

    passed = [[lost(score, part) <= DELTA for score in scores] for part in PARTS]
    if not all(map(any, passed)):
        return None
    chosen = max(each.index(True) for each in passed)
    return chosen if lost(scores[chosen], slice(0, 6)) <= DELTA else None


def by_perplexity(scores: Sequence[Score], dense: Score, visited: int) -> int | None:
    """Which of the scores of a ladder is taken: the first whose perplexity grew by little enough."""
    most = dense.text.perplexity * (1 + GROWTH) ** visited
    return next((index for index, score in enumerate(scores) if score.text.perplexity <= most), None)


def check_walk(
    study: Study, answers: list[Record], taken: Callable[[Sequence[Score], Score, int], int | None]
) -> None:
    """The answers are those of the paper's loops, in their order and no more, and so are the trials.

    Of each target the ladder upwards, on top of what the targets before it keep, and not beyond the rank that
    decides; each step that was accepted is a trial, with the score of its answer.
    """
    folder = StudyFolder.open(study.folder)
    cost, targets = folder.cost, {target.name: target for target in folder.cost.targets}
    dense, *steps = rows(study)
    assert (dense.origin, dense.state) == ("dense", "COMPLETE")
    assert dense.allocation == Allocation.dense(cost.targets)
    assert dense.score is not None
    walk = [(name, [*of]) for name, of in groupby(answers, lambda answer: answer.target)]
    assert [name for name, _ in walk] == WALKED
    kept: dict[str, int | None] = {}
    expected: list[tuple[Allocation, Score]] = []
    for visited, (name, asked) in enumerate(walk, 1):
        assert name is not None
        scores = [answer.score for answer in asked if answer.score is not None]
        ranks = ladder("paper", cost, targets[name])[: len(asked)]
        tried = [Allocation.of({**kept, name: rank}, cost.targets) for rank in ranks]
        assert [(answer.rank, answer.allocation) for answer in asked] == [
            (rank, allocation.key) for rank, allocation in zip(ranks, tried, strict=True)
        ]
        chosen = taken(scores, dense.score, visited)
        assert all(taken(scores[:end], dense.score, visited) is None for end in range(len(scores)))
        kept[name] = None if chosen is None else ranks[chosen]
        if chosen is None:
            assert len(asked) == len(ladder("paper", cost, targets[name]))
        else:
            expected.append((tried[chosen], scores[chosen]))
    assert 0 < len(expected) < len(answers)
    assert [(row.allocation, row.score) for row in steps] == expected
    assert {(row.origin, row.state) for row in steps} == {("surgical", "COMPLETE")}
    for row, (_, score) in zip(steps, expected, strict=True):
        assert row.values is not None
        assert row.values[1] == pytest.approx(score.text.nll, abs=1e-12)


def test_an_interrupt_keeps_the_answers_and_says_how_to_go_on(study: Study, halted: Run) -> None:
    assert halted.ended.code == 130, halted.ended.err
    assert len(halted.answers) == HALTED_AFTER
    assert "SIGINT: stopping" in halted.ended.out
    assert "Stopped: SIGINT" in halted.ended.out
    assert f"surgical {study.config}   # goes on where it stopped" in halted.ended.out


def test_a_stopped_walk_goes_on_and_asks_nothing_again(halted: Run, resumed: Run) -> None:
    assert resumed.ended.code == 0, resumed.ended.err
    assert resumed.answers[:HALTED_AFTER] == halted.answers
    assert len({answer.allocation for answer in resumed.answers}) == len(resumed.answers)
    assert resumed.added == len(resumed.answers) - HALTED_AFTER > 0
    assert "Stopped: every target is decided" in resumed.ended.out


def test_a_walk_by_a_task_is_the_papers(study: Study, resumed: Run) -> None:
    check_walk(study, resumed.answers, by_task)


def test_accepted_steps_of_the_stopped_run_stay_as_they_were(halted: Run, resumed: Run) -> None:
    def told(trials: list[FrozenTrial]) -> list[tuple[object, ...]]:
        return [(trial.number, trial.params, trial.values, trial.user_attrs) for trial in trials]

    assert len(complete(halted.ended.trials)) == len(halted.ended.trials) >= 2
    assert told(resumed.ended.trials)[: len(halted.ended.trials)] == told(halted.ended.trials)


def test_the_report_is_of_the_walk(study: Study, resumed: Run, files: dict[str, bytes]) -> None:
    """With scores of the test split, of the dense model and the front."""
    assert set(FILES) <= set(files)
    front = json.loads(files["front.json"])["front"]
    ours = {row.number: row for row in rows(study)}
    assert {member["trial"] for member in front} <= set(ours)
    for member in front:
        assert [*member["values"].values()] == [*(ours[member["trial"]].values or ())]
        assert member["test"]["nll"] > 0
    events = [json.loads(line) for line in files["log.jsonl"].decode().splitlines()]
    stopped = [event["reason"] for event in events if event["event"] == "stopped"]
    assert stopped == ["SIGINT", "done"]


def test_a_walk_that_is_done_has_nothing_to_do(study: Study, resumed: Run, files: dict[str, bytes]) -> None:
    again = run(study)
    assert again.ended.code == 0, again.ended.err
    assert again.added == 0
    assert "Stopped: every target is decided" in again.ended.out
    after = study.content()
    same = (FILE, "study.journal", "evaluations.jsonl", "front.json")
    assert {name: after[name] == files[name] for name in same} == dict.fromkeys(same, True)


def test_a_walk_by_perplexity_is_the_papers(root: Path, cluster: str) -> None:
    """The factors are those of the other study's walk."""
    other = study_of(root, "by-perplexity", growth=GROWTH)
    walked = run(other)
    assert walked.ended.code == 0, walked.ended.err
    assert "Stopped: every target is decided" in walked.ended.out
    check_walk(other, walked.answers, by_perplexity)
