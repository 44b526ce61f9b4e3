"""Surgical walks on made-up replicas, and the paper's loops written straight, to hold them against."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

from fakes import DENSE_NLL, MODEL_PARAMETERS, TARGETS, MadeUpPool, loss, open_study, score_of

from actors.samples import pack_bits
from actors.types import Allocation, Score, TaskScore
from search.alone import Log
from search.cost import CostModel
from search.pool import Job, Outcome
from search.runner import Stop
from search.sections import SurgicalSection
from search.surgical import Walk, make_rule
from search.surgical_run import FILE, Answers, accept

PRINTS = {"search": "s" * 64, "factors": "f" * 64}
COST = CostModel(TARGETS, MODEL_PARAMETERS, "factored", "none")
EXAMPLES = 36

Answer = Callable[[Allocation], Score | None]


def by_text(allocation: Allocation) -> Score:
    return score_of(allocation)


def with_hits(allocation: Allocation, hits: list[bool]) -> Score:
    task = TaskScore(len(hits), sum(hits) / len(hits), None, 0.0, hits=pack_bits(hits))
    return dataclasses.replace(score_of(allocation), tasks={"arc": task})


def by_task(allocation: Allocation) -> Score:
    """Example n is lost once the loss has grown by what it bears."""
    grown = loss(allocation) - DENSE_NLL
    return with_hits(allocation, [grown <= 0.05 * (1 + (7 * n) % EXAMPLES) for n in range(EXAMPLES)])


def by_chance(allocation: Allocation) -> Score:
    """Ranks in no order: what passes in each part may fail over the whole split."""
    chance = random.Random(allocation.key)
    return with_hits(allocation, [allocation.is_dense or chance.random() < 0.6 for n in range(EXAMPLES)])


class Run:
    """A walk on a made-up pool, in a folder: what it accepted, and what it had scored."""

    def __init__(
        self,
        folder: Path,
        section: SurgicalSection,
        score: Answer,
        size: int = 1,
        stop_after: int = 10**6,
        dies_at: int = 10**6,
        losing: Callable[[Job], bool] = lambda job: False,
    ) -> None:
        self.study = open_study(folder)
        self.study.enqueue([(Allocation.dense(TARGETS), "dense")])
        if self.study.waiting:
            dense = score(Allocation.dense(TARGETS))
            assert dense is not None
            self.study.complete(self.study.propose("dense"), dense)
        answers = Answers(self.study, Log(folder, PRINTS, FILE))
        self.walk = Walk(COST, section, make_rule(section, {"arc": EXAMPLES}), answers)
        stop = Stop()

        def answer(job: Job) -> Outcome:
            if len(self.pool.submitted) >= stop_after:
                stop.reason = "SIGINT"
            if len(self.pool.submitted) >= dies_at or losing(job):
                return Outcome(job, None, "replica-0 died", lost=True)
            found = score(job.allocation)
            return Outcome(job, found, None if found else "nll is nan")

        self.pool = MadeUpPool(answer, size)
        accept(self.walk, answers, self.pool, stop)  # type: ignore[arg-type]

    @property
    def ranks(self) -> dict[str, int | None]:
        return {step.target.name: step.rank for step in self.walk.steps}

    @property
    def scored(self) -> list[str]:
        return [job.allocation.key for job in self.pool.submitted]


def paper(
    score: Answer, task: bool = False, growth: float = 0.005, delta: float = 0.1, skip: int = 1
) -> dict[str, int | None]:
    """The paper's procedure, straight: one target after another, ranks in order, every score made anew."""
    dense = score(Allocation.dense(TARGETS))
    assert dense is not None
    third = EXAMPLES // 3
    kept: dict[str, int | None] = {}
    limit = dense.text.perplexity
    for target in reversed(TARGETS):
        if target.block < skip:
            continue
        limit *= 1 + growth
        most = int(target.rows * target.cols / (target.rows + target.cols))
        ranks = sorted({r for r in [1, *(int(most * k / 10) for k in range(1, 10))] if r})
        chosen: list[int | None] = []
        for chunk in range(3 if task else 1):
            found = None
            for rank in ranks:
                trial = score(Allocation.of({**kept, target.name: rank}, TARGETS))
                if trial is None:
                    continue
                if task:
                    part = slice(chunk * third, (chunk + 1) * third)
                    mine, theirs = (sum(s.tasks["arc"].samples("acc")[part]) / third for s in (trial, dense))
                    good = mine >= theirs - delta - 1e-9
                else:
                    good = trial.text.perplexity <= limit * (1 + 1e-12)
                if good:
                    found = rank
                    break
            chosen.append(found)
        final = None if None in chosen else max(r for r in chosen if r is not None)
        if task and final is not None:
            whole = score(Allocation.of({**kept, target.name: final}, TARGETS))
            assert whole is not None
            if whole.tasks["arc"].acc < dense.tasks["arc"].acc - delta - 1e-9:
                final = None
        kept[target.name] = final
    return kept


TEXT_MODE = SurgicalSection(skip_blocks=1, growth=0.02)
TASK_MODE = SurgicalSection(skip_blocks=1, mode="task", task="arc", delta=0.2)
