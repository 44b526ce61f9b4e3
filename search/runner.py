"""The loop: propose, dispatch, record; stop when the config or the user says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from optuna.trial import TrialState

from actors.types import RankfrontError, Rival, Score
from search.events import Note, silent
from search.pareto import front, hypervolume, hypervolume_history, plateaued
from search.pool import Job, Outcome, Pool
from search.records import Objective, TrialRow
from search.rivals import ASKED_FOR, rivals_of
from search.sections import PlateauSection, StopSection
from search.study import ForeignError, SearchStudy, TakenError
from search.view import Planned

# How long one look for results may take: the screen is redrawn and Ctrl-C is seen this often.
TICK_SECONDS = 0.25

# Proposals that need no replica (scored before, or in flight) between two looks at the pool.
KNOWN_PER_LOOK = 16
# That many of a sampler's in a row without a new allocation: it has run out of them.
EXHAUSTED = 500
# So many failures in a study without a single score: more than one round on many GPUs, and it is not one
# allocation that is wrong, but what all have in common.
HOPELESS = 16

# Room the hypervolume leaves beyond the dense model, by metric: a front point outside adds nothing.
# Ten times the dense perplexity is a broken model; so is accuracy at zero. A divergence as large is as bad.
NLL_ROOM = math.log(10)
KL_ROOM = NLL_ROOM
MARGIN_ROOM = 10.0


@dataclass
class Stop:
    """Asked for from outside (a signal); the loop ends at its next look."""

    reason: str | None = None


@dataclass
class Progress:
    """What the screen shows; the loop keeps it up to date."""

    started: float = field(default_factory=time.monotonic)


def room_of(objective: Objective) -> float:
    """How far beyond the dense model a point still adds to the hypervolume; inf where no fixed amount."""
    if objective.name.partition(".")[0] == "nll":
        return NLL_ROOM
    if objective.name == "kl":
        return KL_ROOM
    return MARGIN_ROOM if objective.name.endswith(".margin") else math.inf


def reference_point(study: SearchStudy) -> tuple[float, ...] | None:
    """Where the hypervolume is measured from, in the objectives' own units: budget 1, ten times the
    dense perplexity, log 10 nats of divergence, accuracy 0, the dense margin less 10 nats. None until dense
    is scored."""
    dense = study.dense_score
    if dense is None:
        return None
    point = []
    for objective in study.objectives:
        if objective.name.startswith("budget."):
            point.append(1.0)
        elif objective.name.partition(".")[0] == "nll":
            point.append(dense.metrics[objective.name] + NLL_ROOM)
        elif objective.name == "kl":
            point.append(KL_ROOM)  # the dense model's own is 0
        elif objective.name.endswith(".margin"):
            point.append(dense.metrics[objective.name] - MARGIN_ROOM)
        else:
            point.append(0.0)
    return tuple(point)


def minimised(study: SearchStudy, below: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(values (n, d) with every objective minimised, trial numbers (n,)) of the finished, feasible trials;
    only of those `below` a number where it is given."""
    rows = [(row.number, row.values) for row in study.rows()[:below] if row.finished and row.feasible]
    values = np.array([values for _, values in rows], dtype=float).reshape(len(rows), len(study.signs))
    return values * study.signs, np.array([number for number, _ in rows], dtype=int)


def hypervolumes(study: SearchStudy) -> np.ndarray:
    """Hypervolume after each finished trial, (n,); empty until there is a reference point.

    A trial that violates a constraint adds nothing, and counts.
    """
    reference = reference_point(study)
    if reference is None:
        return np.empty(0)
    points = [row.point(study.objectives) for row in study.rows() if row.finished]
    return hypervolume_history(points, study.signs * reference)


def current_hypervolume(study: SearchStudy) -> float | None:
    """Hypervolume of the front, the last of `hypervolumes`; None until there is a reference point."""
    reference = reference_point(study)
    return None if reference is None else hypervolume(study.front_values, study.signs * reference)


class Runner:
    """Runs one study on one pool until a stop rule or `stop` ends it.

    Where it is `staged`, what the sampler proposed is sent along with its rivals, and may be stopped by one.
    Invariant: a trial is dispatched only after it is RUNNING in the storage, and leaves `_planned`
    only after its end is in the storage.
    """

    def __init__(
        self,
        study: SearchStudy,
        pool: Pool,
        rules: StopSection,
        origin: str,
        stop: Stop,
        redraw: Callable[[Progress], None] = lambda progress: None,
        staged: bool = False,
        note: Note = silent,
        begun: float | None = None,
    ) -> None:
        """`begun` is when the run began that `stop.hours` is of, by the monotonic clock; None is now."""
        self._study, self._pool, self._rules, self._origin = study, pool, rules, origin
        self._stop, self._redraw, self._staged = stop, redraw, staged
        self._note = note
        self._begun = time.monotonic() if begun is None else begun
        self._planned: dict[int, Planned] = {}
        self._twins: dict[str, list[Planned]] = {}  # by allocation in flight: trials waiting for its score
        self._seen: set[str] = set()  # allocations that a trial has, unless it was lost
        self._known_in_a_row = 0
        self._failures: list[str] = []  # of this run, which tries again what an earlier one failed at
        self._judged: tuple[int, str | None] = (-1, None)
        self.progress = Progress()

    def run(self) -> str:
        """Returns why it stopped."""
        self._study.replay()
        self._count_known()
        for planned in self._study.in_flight():
            self._start(planned)
        while True:
            reason = self._stop.reason or self._rule_met()
            if reason is None:
                self._fill()
            elif self._stop.reason or not self._planned:
                return reason
            for outcome in self._pool.wait(TICK_SECONDS):
                self._record(outcome)
            self._redraw(self.progress)

    def _fill(self) -> None:
        """Keep every replica busy with one trial ahead, as far as that takes few proposals already known."""
        for _ in range(self._pool.free + KNOWN_PER_LOOK):
            if self._pool.free == 0 or self._rule_met() or self._held_back():
                return
            try:
                planned = self._study.propose(self._origin)
            except (ForeignError, TakenError):
                continue  # another program's trial: recorded as failed with its reason, or started by it
            origin = self._study.origin(planned.number)
            self._note("proposed", trial=planned.number, origin=origin)
            self._see(planned.allocation.key, origin)
            self._start(planned)

    def _see(self, key: str, origin: str) -> None:
        """Count a proposal of the sampler that brings nothing new; any other trial begins the count anew."""
        known = key in self._seen and origin == self._origin
        self._known_in_a_row = self._known_in_a_row + 1 if known else 0
        self._seen.add(key)

    def _count_known(self) -> None:
        """Count by the record: so a search ends at the same trial, however often it was stopped."""
        self._seen, self._known_in_a_row = set(), 0
        for row in self._study.rows():
            if row.ranked and row.state != "WAITING":
                self._see(row.allocation.key, row.origin)
                if row.lost:
                    self._seen.discard(row.allocation.key)

    def _held_back(self) -> bool:
        """Whether a trial is under way whose end the next proposal must know."""
        below = self._study.seen_below(self._study.next_number)
        twins = (twin.number for waiting in self._twins.values() for twin in waiting)
        return below is not None and any(number < below for number in (*self._planned, *twins))

    def _start(self, planned: Planned) -> None:
        """Answer a trial from the record of an equal allocation, or have it scored, if none is under way."""
        if planned.allocation.key in self._twins or not self._answered(planned):
            self._dispatch(planned)

    def _answered(self, planned: Planned) -> bool:
        """Whether the record could answer a trial, and did."""
        source = self._study.scored_as(planned.allocation)
        if source is None and self._may_stop(planned):
            source = self._study.stopped_as(planned.allocation)  # what dominated it still does
        if source is None:
            return False
        with suppress(TakenError):
            self._study.copy_score(planned, source)
            self._note("copied", trial=planned.number, source=source)
        return True

    def _may_stop(self, planned: Planned) -> bool:
        return self._staged and self._study.origin(planned.number) not in ASKED_FOR

    def _rivals(self, planned: Planned) -> tuple[Rival, ...]:
        if not self._may_stop(planned):
            return ()
        below = self._study.seen_below(planned.number)
        budgets = self._study.budgets(planned.allocation)
        return rivals_of(budgets, self._front(below), self._study.objectives)

    def _front(self, below: int | None) -> list[TrialRow]:
        """The front of all trials, or of those below a number."""
        if below is None:
            return self._study.front
        values, numbers = minimised(self._study, below)
        return [self._study.row(int(number)) for number in numbers[front(values)]]

    def _dispatch(self, planned: Planned) -> None:
        key = planned.allocation.key
        if key in self._twins:
            self._twins[key].append(planned)
            return
        self._twins[key] = []
        self._planned[planned.number] = planned
        self._pool.submit(Job(planned.number, planned.allocation, rivals=self._rivals(planned)))

    def _record(self, outcome: Outcome) -> None:
        planned = self._planned[outcome.job.key]
        twins = self._twins.pop(planned.allocation.key)
        reason = outcome.reason or problem_of(outcome.score)
        if outcome.score is None or reason:
            self._failures.append(f"trial {planned.number}: {reason or 'no score'}")
            for each in (planned, *twins):
                with suppress(TakenError):  # what the other program wrote stays
                    self._study.fail(each.number, reason or "no score", outcome.lost)
                    self._note("failed", trial=each.number, reason=reason or "no score")
            if outcome.lost:
                self._count_known()  # what came after it as known is new again
        else:
            source = self._study.scored_as(planned.allocation)
            with suppress(TakenError):
                values = self._study.record(planned, outcome.score, copied_from=source)
                self._note_end(planned, outcome.score, values)
            for twin in twins:
                if not self._answered(twin):  # one that was asked for is not content with a part
                    self._dispatch(twin)
        del self._planned[planned.number]

    def _note_end(self, planned: Planned, score: Score, values: tuple[float, ...] | None) -> None:
        facts = {"replica": score.replica, "seconds": score.seconds, "tokens": score.forward_tokens}
        if values is None:
            self._note("pruned", trial=planned.number, rival=score.stopped_by, **facts)
        else:
            named = {o.name: value for o, value in zip(self._study.objectives, values, strict=True)}
            self._note("finished", trial=planned.number, values=named, **facts)

    def _rule_met(self) -> str | None:
        """The first stop rule that holds. Enqueued trials are scored whatever the number of trials, and where
        the sampler has run out of new ones."""
        rules = self._rules
        if rules.trials is not None and self._study.started >= rules.trials and not self._study.waiting:
            return f"{rules.trials} trials"
        if len(self._failures) >= HOPELESS and not self._study.count(TrialState.COMPLETE):
            return f"no trial has a score, {len(self._failures)} failed; the last, {self._failures[-1]}"
        if self._known_in_a_row >= EXHAUSTED and not self._study.waiting:
            return f"nothing new in the last {EXHAUSTED} proposals"
        if rules.hours is not None and time.monotonic() - self._begun > rules.hours * 3600:
            return f"{rules.hours} hours"
        if rules.tokens is None and rules.plateau is None:
            return None
        if self._held_back():
            return None  # trials that decide whether there is a next one have not ended
        below = self._study.seen_below(self._study.next_number)
        ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        known = self._study.count(*ended) if below is None else below
        if known != self._judged[0]:
            self._judged = (known, self._record_rule_met(below))
        return self._judged[1]

    def _record_rule_met(self, below: int | None) -> str | None:
        """The rules that read every trial that ended, or those `below` a number; looked at only when there is
        a new one."""
        rules = self._rules
        if rules.tokens is not None:
            rows = self._study.rows()[:below]
            scored = sum(r.score.forward_tokens for r in rows if r.score and r.copied_from is None)
            if scored >= rules.tokens:
                return f"{rules.tokens:,} scored tokens"
        if rules.plateau is not None:
            if self._flat(rules.plateau, below):
                return f"hypervolume flat over {rules.plateau.trials} trials"
            if (rules.trials, rules.tokens, rules.hours) == (None, None, None):
                return self._dense_lost(below)
        return None

    def _flat(self, plateau: PlateauSection, below: int | None) -> bool:
        """Whether the last finished trials, or the last of those below a number, added next to nothing."""
        study, reference = self._study, reference_point(self._study)
        if reference is None:
            return False
        points = [row.point(study.objectives) for row in study.rows()[:below] if row.finished]
        return plateaued(points, study.signs * reference, plateau.trials, plateau.tolerance)

    def _dense_lost(self, below: int | None) -> str | None:
        """That the dense model failed: without its score there is no hypervolume, and so never a plateau."""
        dense = [row for row in self._study.rows()[:below] if row.ranked and row.allocation.is_dense]
        if not dense or any(row.state != "FAIL" for row in dense):
            return None
        return f"no plateau without a score of the dense model, trial {dense[-1].number}: {dense[-1].reason}"


def problem_of(score: Score | None) -> str | None:
    """Why a score is none, None where it is one; replicas check theirs too."""
    if score is None:
        return None
    try:
        score.check()
    except RankfrontError as error:
        return str(error)
    return None
