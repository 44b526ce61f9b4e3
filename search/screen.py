"""What a person sees while a search runs: one live line on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from optuna.trial import TrialState
from rich.console import Console
from rich.live import Live
from rich.text import Text

from actors.types import Progress as Step
from search.runner import TICK_SECONDS, Progress, current_hypervolume
from search.study import SearchStudy

# A log file gets a line this often at most.
PLAIN_SECONDS = 15.0
LADDER = (0.95, 0.9, 0.8, 0.7)


class Line:
    """One line that is drawn over: at most four times a second, in a log once in PLAIN_SECONDS."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        )
        self._last = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, line: Callable[[float], str]) -> None:
        """Draw what `line` says at a time (time.monotonic); it is asked only where it is drawn."""
        now = time.monotonic()
        if self._live:
            self._live.update(Text(line(now), no_wrap=True, overflow="ellipsis"))
        elif now - self._last >= PLAIN_SECONDS:
            self._last = now
            self._console.print(Text(line(now)), soft_wrap=True)


class ProgressBar(Line):
    """The line of a preparation's long steps."""

    WIDTH = 40

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._step, self._since, self._from = "", 0.0, 0

    def progress(self, progress: Step) -> None:
        """Show how far a step is."""
        if progress.step != self._step or progress.done < self._from:
            self._step, self._since, self._from = progress.step, time.monotonic(), progress.done
        self.show(lambda now: self._bar(progress, now))

    def _bar(self, progress: Step, now: float) -> str:
        full = self.WIDTH * progress.done // max(1, progress.total)
        bar = "━" * full + "─" * (self.WIDTH - full)
        since = progress.done - self._from
        left = (now - self._since) * (progress.total - progress.done) / since if since else 0.0
        rest = f"  ETA {clock(left)}" if since else ""
        return f"{progress.step}  {bar}  {progress.done}/{progress.total}{rest}"


class Screen(Line):
    """The line of a search; costs nothing while no trial ends."""

    def __init__(self, console: Console, study: SearchStudy, goal: int | None, done_before: int) -> None:
        super().__init__(console)
        self._study, self._goal, self._before = study, goal, done_before
        self._shown = -1
        self._facts, self._drawn = "", 0.0

    def redraw(self, progress: Progress) -> None:
        """Show where the search stands."""
        now = time.monotonic()
        if now - self._drawn >= TICK_SECONDS:  # the loop comes by as often as that where nothing ends
            self._drawn = now
            self.show(lambda now: self._line(progress, now))

    def _line(self, progress: Progress, now: float) -> str:
        counts = {state: self._study.count(state) for state in TrialState}
        ended = counts[TrialState.COMPLETE] + counts[TrialState.FAIL] + counts[TrialState.PRUNED]
        if ended != self._shown:
            self._shown, self._facts = ended, self._findings()
        minutes = (now - progress.started) / 60
        rate = (ended - self._before) / minutes if minutes > 0 else 0.0
        goal = f"/{self._goal}" if self._goal else ""
        parts = [f"trials {ended}{goal} done, {counts[TrialState.RUNNING]} running"]
        if counts[TrialState.FAIL]:
            parts.append(f"{counts[TrialState.FAIL]} failed")
        if counts[TrialState.PRUNED]:
            parts.append(f"{counts[TrialState.PRUNED]} stopped early")
        parts.append(self._facts)
        if rate > 0:
            parts.append(f"{rate:.1f}/min")
            if self._goal:
                parts.append(f"ETA {clock(max(0, self._goal - ended) / rate * 60)}")
        return " | ".join(part for part in parts if part)

    def _findings(self) -> str:
        parts = []
        if self._study.constraints:
            infeasible = sum(row.finished and not row.feasible for row in self._study.rows())
            parts += [f"{infeasible} violate a constraint"] if infeasible else []
        members = self._study.front
        if not members:
            return " | ".join(parts)
        parts.append(f"front {len(members)}")
        volume = current_hypervolume(self._study)
        if volume is not None:
            parts.append(f"HV {volume:.4f}")
        scored = [(row.budget_model, row.score.text.nll) for row in members if row.score]
        rungs = []
        for rung in LADDER:
            under = [nll for budget, nll in scored if budget <= rung]
            if under:
                rungs.append(f"{rung:.0%} {min(under):.3f}")
        if rungs:
            parts.append("nats at " + ", ".join(rungs))
        return " | ".join(parts)


def clock(seconds: float) -> str:
    """Minutes and seconds, from an hour on hours too."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
