"""`rankfront sensitivity`: every target scored alone, at several ranks, side by side on the replicas."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from actors.types import Allocation, RankfrontError
from search.alone import Cell, Log, cells
from search.config import Config
from search.cost import CostModel
from search.driving import logged
from search.folder import short_name
from search.opening import opened
from search.pool import Job, Pool
from search.replicas import replicas
from search.runner import TICK_SECONDS, Stop, problem_of
from search.screen import Line, clock
from search.sensitivity_page import write_sensitivity
from search.sensitivity_table import Sensitivity, rows
from search.signals import stop_on_signals
from search.spectra import energies, losses


class Questions:
    """The allocations of a table by their keys, the dense model first, and what is left to ask.

    Two shares that allow a target the same rank are one question.
    """

    def __init__(self, cost: CostModel, shares: tuple[float, ...], log: Log) -> None:
        self.cells = tuple(cells(cost, shares))
        dense = Allocation.dense(cost.targets)
        self.dense = dense.key
        self._log = log
        self._asked: dict[str, tuple[Allocation, Cell | None]] = {self.dense: (dense, None)}
        for cell in self.cells:
            self._asked.setdefault(cell.key, (cell.allocation, cell))

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def open(self) -> list[tuple[Allocation, Cell | None]]:
        """Those without a score: a failed one is asked again by every run."""
        return [asked for key, asked in self._asked.items() if self._log.score(key) is None]

    @property
    def failed(self) -> int:
        records = map(self._log.get, self._asked)
        return sum(record is not None and record.score is None for record in records)


def ask(
    questions: Questions, log: Log, pool: Pool, stop: Stop, redraw: Callable[[int], None] = lambda done: None
) -> None:
    """Score what is open until it is done or `stop` says so; `redraw` is told how many ended.

    Raises:
        RankfrontError: the dense model, which every loss increase is measured from, has no score.
    """
    queue = list(enumerate(questions.open))
    asked = dict(queue)
    done = 0
    while (queue or pool.outstanding) and not stop.reason:
        while queue and pool.free:
            number, (allocation, _) = queue.pop(0)
            pool.submit(Job(number, allocation))
        for outcome in pool.wait(TICK_SECONDS):
            allocation, cell = asked[outcome.job.key]
            reason = outcome.reason or problem_of(outcome.score)
            log.add(allocation, cell, None if reason else outcome.score, reason, outcome.lost)
            if reason and cell is None:
                raise RankfrontError(f"the dense model has no score on the search split: {reason}")
            done += 1
        redraw(done)


def sensitivity(config: Config, console: Console) -> tuple[Path, Sensitivity | None, str]:
    """Score and write what is missing: the study's folder, the table (None: not even dense is scored yet)
    and why it ended.

    Raises:
        RankfrontError: another driver holds the study, it is another study, it cannot start, or the dense
            model has no score.
    """
    with opened(config, console) as session:
        folder, say = session.folder, session.say
        log = Log(folder.path, folder.prepared.fingerprints)
        if log.repaired:
            say(f"sensitivity: {log.repaired}")
        store = folder.factor_store
        spectra = energies(store), losses(store)  # before the long work: they may not be readable
        questions = Questions(folder.cost, config.sensitivity.shares, log)
        stop = Stop()
        missing = len(questions.open)
        known = len(questions) - missing
        say(
            f"sensitivity: {missing} of {len(questions)} scores to do" + (f", {known} known" if known else "")
        )
        if missing:
            with (
                logged(folder, say, "sensitivity", stop) as note,
                stop_on_signals(stop, console),
                replicas(session, note) as pool,
                _Screen(console, questions) as screen,
            ):
                ask(questions, log, pool, stop, screen.redraw)
        table, dense = None, log.score(questions.dense)
        if dense is not None:
            method_of = config.factor_spec.method_of
            table = Sensitivity(
                study=config.study,
                model=short_name(config.model.source),
                shares=config.sensitivity.shares,
                dense=dense,
                rows=tuple(rows(questions.cells, dense, log, folder.cost, method_of, *spectra)),
                facts=folder.facts,
            )
            write_sensitivity(table, folder.path)
        return folder.path, table, stop.reason or "nothing is left to score"


class _Screen(Line):
    """The line of progress: how many are done of all, how many failed, how long the rest will take."""

    def __init__(self, console: Console, questions: Questions) -> None:
        super().__init__(console)
        self._questions, self._open = questions, len(questions.open)
        self._started = time.monotonic()

    def redraw(self, done: int) -> None:
        self.show(lambda now: self._line(done, now))

    def _line(self, done: int, now: float) -> str:
        total = len(self._questions)
        parts = [f"targets alone {total - self._open + done}/{total} done"]
        if failed := self._questions.failed:
            parts.append(f"{failed} failed")
        minutes = (now - self._started) / 60
        if done and minutes > 0:
            rate = done / minutes
            parts += [f"{rate:.1f}/min", f"ETA {clock((self._open - done) / rate * 60)}"]
        return " | ".join(parts)
