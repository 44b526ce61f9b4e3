"""A driver on a pool without models: it answers out of order, fails some trials, returns NaN for others."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from _queue_pool import QueuePool
from _reporting import DISPATCHED, NAME, REPORTED, Opener, Reporting, appended, write

from actors.types import Allocation, FactorSpec, Score, TargetSpec, TextScore
from search.cost import CostModel
from search.pool import Job, Outcome
from search.records import Objective
from search.runner import Runner, Stop
from search.samplers import make_sampler
from search.sections import SamplerSection, StopSection
from search.space import Space
from search.study import open_storage_study

TARGETS = tuple(TargetSpec(f"layers.{i}.proj", 48, 24, False, i, "proj") for i in range(12))
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
# A made-up score takes up to this: every trial is read again after every kill, so a life is to add few.
SCORE_SECONDS = 0.15


class FaultyPool(QueuePool):
    """Answers in random order, a tenth of the trials with a fault."""

    def __init__(self, dispatched: int) -> None:
        super().__init__(size=2)
        self._dispatched, self._random = dispatched, random.Random(os.getpid())

    def submit(self, job: Job) -> None:
        write(self._dispatched, job.key)
        super().submit(job)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        if self._queue:
            time.sleep(self._random.uniform(0, SCORE_SECONDS))
            job = self._queue.pop(self._random.randrange(len(self._queue)))
            yield _answer(job)


def _answer(job: Job) -> Outcome:
    """A function of the allocation alone."""
    chance = int(job.allocation.key[:8], 16) / 2**32
    if chance < 0.05:
        return Outcome(job, None, "replica died (injected)")
    loss = math.nan if chance < 0.1 else 2.0 + chance
    text = TextScore("made-up@32", nats=100 * loss, tokens=100, stderr=0.01)
    return Outcome(job, Score("search", text, {}, forward_tokens=100, seconds=0.0, replica="made-up"))


def drive_fake(open_it: Opener, folder: Path, trials: int) -> None:
    """What a driver does from its start to its end."""
    with open_it() as storage:
        cost = CostModel(TARGETS, 20_000, "pivoted", "none")
        space = Space(cost, FactorSpec(), group="target", segments=1, levels=20, floor=0.2)
        sampler = make_sampler(SamplerSection(name="random"))
        plain = open_storage_study(storage, NAME, OBJECTIVES)
        study = Reporting(plain, sampler, 0, space, cost, OBJECTIVES)
        study.reported = appended(folder / REPORTED)
        study.enqueue([(Allocation.dense(TARGETS), "dense")])
        pool = FaultyPool(appended(folder / DISPATCHED))
        Runner(study, pool, StopSection(trials=trials), "random", Stop()).run()  # type: ignore[arg-type]
