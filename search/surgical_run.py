"""`rankfront surgical`: the candidates of a walk scored on the replicas, what it accepts made trials."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from actors.types import Allocation, RankfrontError, Score
from search.alone import Cell, Log
from search.config import Config
from search.driving import logged
from search.events import Note
from search.finals import front_and_dense, score_finished
from search.folder import StudyFolder, report
from search.opening import Session, opened
from search.pool import Job, Pool
from search.records import StudySummary
from search.replicas import replicas
from search.runner import TICK_SECONDS, Runner, Stop, problem_of
from search.screen import Line, clock
from search.sections import StopSection
from search.signals import stop_on_signals
from search.study import SearchStudy
from search.surgical import Step, Walk, make_rule, order

FILE = "surgical.jsonl"
ORIGIN = "surgical"


def surgical(config: Config, console: Console) -> tuple[StudyFolder, StudySummary, str]:
    """Walk over the targets of a study, or go on doing so: its folder, what was found, why it stopped.

    Raises:
        RankfrontError: another driver holds the study, it is another study, it cannot start, the task has
            too few examples, or the dense model or a candidate has no score.
    """

    def check(session: Session) -> None:
        order(session.folder.cost.targets, config.surgical.skip_blocks)
        make_rule(config.surgical, session.folder.prepared.examples["search"])

    with opened(config, console, check=check) as session:
        folder, say = session.folder, session.say
        study = folder.open_study()
        log = Log(folder.path, folder.prepared.fingerprints, FILE)
        if log.repaired:
            say(f"surgical search: {log.repaired}")
        answers = Answers(study, log)
        rule = make_rule(config.surgical, folder.prepared.examples["search"])
        walk = Walk(folder.cost, config.surgical, rule, answers)
        study.enqueue([(walk.dense, "dense")])
        stop = Stop()
        with (
            logged(folder, say, "surgical", stop) as note,
            stop_on_signals(stop, console),
            replicas(session, note) as pool,
        ):
            score_open_trials(study, pool, stop, note)
            with _Screen(console, walk, folder) as screen:
                accept(walk, answers, pool, stop, screen.redraw)
            if not stop.reason:
                score_finished(folder, study, front_and_dense(study), pool, stop, say)
        return folder, report(folder, study), stop.reason or "every target is decided"


def score_open_trials(study: SearchStudy, pool: Pool, stop: Stop, note: Note) -> None:
    """The dense model, what was enqueued, and trials in flight when the last driver ended.

    Raises:
        RankfrontError: the dense model, which every step is measured from, has no score.
    """
    Runner(study, pool, StopSection(trials=1), ORIGIN, stop, note=note).run()
    if not stop.reason and study.dense_score is None:
        dense = (row for row in study.rows() if row.ranked and row.allocation.is_dense)
        reasons = [row.reason for row in dense if row.reason] or ["it has not ended"]
        raise RankfrontError(
            f"surgical search: the dense model has no score on the search split: {reasons[-1]}; "
            "the next run scores it anew"
        )


class Answers:
    """What is known of allocations: by the log of candidates, or as a trial of the study."""

    def __init__(self, study: SearchStudy, log: Log) -> None:
        self._study, self._log = study, log

    def __call__(self, allocation: Allocation) -> Score | None:
        """The score, None where there is none for a reason; KeyError where nobody knows."""
        record = self._log.get(allocation.key)
        if record is not None:
            return record.score
        return self._study.score(allocation)

    def add(self, cell: Cell, score: Score | None, reason: str | None) -> None:
        """Durable when it returns."""
        self._log.add(cell.allocation, cell, score, reason)

    def accept(self, step: Step) -> None:
        """Make what a step accepts trials of the study."""
        for allocation in step.accepted:
            score = self(allocation)
            if score is not None:
                self._study.add(allocation, ORIGIN, score)


def accept(
    walk: Walk, answers: Answers, pool: Pool, stop: Stop, redraw: Callable[[], None] = lambda: None
) -> None:
    """Score candidates, one on each replica, and take the steps they decide, until the walk ends or `stop`.

    No candidate waits behind another: the one that ends first may make the next one needless. At the end of
    the walk those that are under way are waited for: their outcomes are nobody else's.

    Raises:
        RankfrontError: the next step rests on a candidate that was lost with its replica, which says nothing
            of its rank.
    """
    flying: dict[int, Cell] = {}
    lost: dict[str, str] = {}
    submitted = 0
    while not stop.reason:
        for step in walk.advance():
            answers.accept(step)
        redraw()
        if walk.done and not flying:
            return
        for cell in walk.wanted[:1]:
            if cell.key in lost:
                raise RankfrontError(
                    f"surgical search: {cell.target.name} at rank {cell.rank} was not scored: "
                    f"{lost[cell.key]}; that decides nothing, and the next run asks again"
                )
        keys = {*lost, *(cell.key for cell in flying.values())}
        for cell in walk.wanted:
            if len(flying) < pool.size and cell.key not in keys:
                pool.submit(Job(submitted, cell.allocation))
                flying[submitted] = cell
                submitted += 1
        for outcome in pool.wait(TICK_SECONDS):
            cell = flying.pop(outcome.job.key)
            if outcome.lost:
                lost[cell.key] = outcome.reason or "its replica died"
                continue
            reason = outcome.reason or problem_of(outcome.score)
            answers.add(cell, None if reason else outcome.score, reason)


class _Screen(Line):
    """The line of progress: which target is next, and what the steps so far cost."""

    def __init__(self, console: Console, walk: Walk, folder: StudyFolder) -> None:
        super().__init__(console)
        self._walk, self._cost = walk, folder.cost
        self._started = time.monotonic()
        self._before: int | None = None

    def redraw(self) -> None:
        if self._before is None:  # steps that were known already took no time
            self._before = len(self._walk.steps)
        self.show(self._line)

    def _line(self, now: float) -> str:
        steps, total = self._walk.steps, len(self._walk.order)
        parts = [f"targets {len(steps)}/{total} decided"]
        if steps:
            kept = sum(step.rank is not None for step in steps)
            budget = self._cost.budgets(steps[-1].allocation)["budget.model"]
            parts += [f"{kept} compressed", f"{budget:.1%} of all parameters"]
        since = len(steps) - (self._before or 0)
        if since:
            parts.append(f"ETA {clock((now - self._started) / since * (total - len(steps)))}")
        return " | ".join(parts)
