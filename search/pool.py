"""The replicas at work: keep each busy with one trial queued ahead, and try again what one did not end.

A Ray task retry would hide how often a trial was tried, so Ray retries nothing; the pool does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import ray
from ray.exceptions import RayError, RayTaskError

from actors.replica import Replica
from actors.types import RankfrontError, ReplicaSpec, ScoringError
from search.cluster import OBJECT_STORE_BYTES as OBJECT_STORE_BYTES
from search.cluster import Machine as Machine
from search.cluster import connect as connect
from search.crew import Crew
from search.elastic import FIXED, Elastic
from search.events import Note, silent
from search.failures import GONE, cause_of, last_line
from search.hangs import Bounds
from search.health import ReplicaHealth
from search.jobs import Job as Job
from search.jobs import Outcome as Outcome
from search.slots import Launch, Slot, answered
from search.tenure import Tenure

# One trial runs and one waits behind it: the driver's work between two trials costs a replica nothing.
DEPTH = 2
# A trial that was on so many nodes as they left may be what ends them: from then on it is charged.
MOVES = 3


# Errors in a row that nobody foresaw, after which a replica is taken for broken.
STRIKES = 2
# Every split takes as long as the search split.
NO_LENGTHS: Mapping[str, float] = {}


def _unheard(line: str) -> None:
    """Nobody listens."""


class Pool:
    """Replicas of one preparation. Results come from `wait`, in the order they are ready.

    A node that leaves costs its replicas, which start again where there is room, and no trial an attempt.
    With a `tenure` replicas outlive a driver that dies, and those of an earlier one are taken over. What
    takes longer than its bound is stopped; a score has so many times its bound as `lengths` says of its
    split. `clock` (seconds) and `pause` are time itself.
    """

    def __init__(
        self,
        specs: list[ReplicaSpec],
        gpus_each: float,
        attempts: int,
        bounds: Bounds | None = None,
        note: Note = silent,
        elastic: Elastic = FIXED,
        tenure: Tenure | None = None,
        say: Callable[[str], None] = _unheard,
        lengths: Mapping[str, float] = NO_LENGTHS,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._attempts, self._least = attempts, elastic.least
        self._bounds, self._lengths = bounds or Bounds(), lengths
        self._note, self._clock, self._pause = note, clock, pause
        launch = Launch(Replica, gpus_each, tenure)
        self._crew = Crew(specs, launch, elastic, self._bounds.load, note, say, clock, pause)
        self._slots = self._crew.slots
        self._queue: deque[Job] = deque()  # not yet with a replica

    @property
    def size(self) -> int:
        """Replicas that are loaded or load; not those that wait for a node, or for a cause to go away."""
        now = self._clock()
        return sum(slot.open(now) for slot in self._slots)

    @property
    def outstanding(self) -> int:
        return len(self._queue) + sum(len(slot.queue) for slot in self._slots)

    @property
    def alone_seconds(self) -> float:
        """How long replicas wait for the next driver when this one dies; 0 where they end with it."""
        tenure = self._crew.launch.tenure
        return tenure.alone_seconds if tenure else 0.0

    @property
    def queued(self) -> int:
        """Jobs that no replica has yet."""
        return len(self._queue)

    @property
    def free(self) -> int:
        """Jobs that can be submitted before every replica has one running and one queued."""
        return max(0, DEPTH * self.size - self.outstanding)

    def submit(self, job: Job) -> None:
        """Take a job; it goes to the replica with the shortest queue, once one is loaded."""
        self._queue.append(job)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue:
            loaded = [slot for slot in self._slots if slot.loaded]
            open_ = [slot for slot in loaded if len(slot.queue) < DEPTH]
            if not open_ or len(loaded) < self._least:
                return
            slot, now = min(open_, key=lambda slot: len(slot.queue)), self._clock()
            if slot.queue and len(self._queue) <= sum(slot.loading(now) for slot in self._slots):
                return  # better run at once by a replica that is loading than second by a busy one
            job = self._queue.popleft()
            if not slot.queue:
                slot.since = now
            score = slot.actor.score.remote(self._crew.launch.token, job.allocation, job.split, job.rivals)
            slot.queue.append((score, job))
            facts = {"trial": job.key, "split": job.split, "attempt": job.attempt}
            self._note("dispatched", replica=slot.spec.name, **facts)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        """Outcomes that are ready within `seconds`; jobs of dead replicas are tried elsewhere.

        Raises:
            RankfrontError: replicas cannot start, the first error in full; or another driver has them.
        """
        self._queue.extendleft(reversed(self._crew.tend()))
        self._hand_out()
        if not self.outstanding and self.free:
            seconds = 0.0  # there is nothing to wait for but replicas that load
        expected = {slot.seat: slot for slot in self._slots if slot.seat is not None}
        expected |= {slot.queue[0][0]: slot for slot in self._slots if slot.queue}
        expected |= {slot.starting: slot for slot in self._slots if slot.starting is not None}
        if not expected:
            if self._slots and seconds:
                self._pause(seconds)
            return
        ready, _ = ray.wait(list(expected), num_returns=len(expected), timeout=0)
        if not ready and seconds:
            ready, _ = ray.wait(list(expected), num_returns=1, timeout=seconds)
        for reference in ready:
            slot = expected[reference]
            if reference is slot.seat:
                self._crew.note_seated(slot)
            elif reference is slot.starting:
                self._crew.note_started(slot)
            elif slot.queue and reference is slot.queue[0][0]:
                outcome = self._collect(slot)
                if outcome is not None:
                    yield outcome
        self._stop_overdue()

    def _collect(self, slot: Slot) -> Outcome | None:
        reference, job = slot.queue[0]
        try:
            score = ray.get(reference)
        except RayTaskError as error:
            self._crew.check_holder(slot, error)
            cause = cause_of(error)
            foreseen = isinstance(cause, RankfrontError)
            reason = str(cause) if foreseen else last_line(error)
            return self._failed(slot, reason, foreseen, lost=not isinstance(cause, ScoringError))
        except GONE as error:
            return self._lost(slot, error)
        slot.strikes = 0
        slot.add_work(score.busy)
        if score.stopped_by is None:  # a part of a score tells nothing of how long a whole one takes
            self._bounds.score.ended(score.seconds / self._lengths.get(job.split, 1.0))
        self._next(slot)
        return Outcome(job, score)

    def _next(self, slot: Slot) -> None:
        """A replica goes on to the next job of its queue; with none, it leaves a node that drains."""
        slot.queue.popleft()
        slot.since = self._clock()
        if slot.leaving and not slot.queue:
            self._crew.restart(slot, "its node is drained")

    def _given_up(self, slot: Slot) -> Job:
        """The job that a replica had begun; those queued behind it go elsewhere."""
        (_, job), *behind = slot.queue
        self._queue.extendleft(queued for _, queued in reversed(behind))
        slot.queue.clear()
        return job

    def _failed(self, slot: Slot, reason: str, foreseen: bool, lost: bool) -> Outcome | None:
        """A replica could not score its job, and is there. An error that nobody foresaw may be the trial's or
        the replica's, whose GPU then fails at all that comes, and sooner than others score: two of them in a
        row end it."""
        _, job = slot.queue[0]
        slot.strikes = 0 if foreseen else slot.strikes + 1
        if slot.strikes < STRIKES:
            self._next(slot)
        else:
            self._given_up(slot)
            self._crew.restart(slot, reason)
        return self._again_or_fail(job, reason, lost)

    def _lost(self, slot: Slot, error: RayError) -> Outcome | None:
        """A replica died with its jobs."""
        job = self._given_up(slot)
        reason = f"replica {slot.spec.name} died: {last_line(error)}"
        if slot.overdue:
            reason = f"no score within {self._seconds(job.split)} seconds, replica stopped"
        left = not slot.overdue and self._crew.left(slot, error)
        self._crew.restart(slot, "its node left" if left else reason)
        if left and job.moves < MOVES:
            self._note("retried", trial=job.key, attempt=job.attempt, reason="its node left")
            self._queue.appendleft(replace(job, moves=job.moves + 1))
            return None
        return self._again_or_fail(job, reason, lost=True)

    def _again_or_fail(self, job: Job, reason: str, lost: bool) -> Outcome | None:
        if job.attempt < self._attempts:
            self._note("retried", trial=job.key, attempt=job.attempt, reason=reason)
            self._queue.append(replace(job, attempt=job.attempt + 1))
            return None
        return Outcome(job, None, f"{reason} (attempt {job.attempt} of {self._attempts})", lost)

    def _seconds(self, split: str) -> float:
        """How long a score of a split may take."""
        return round(self._bounds.score.seconds * self._lengths.get(split, 1.0), 1)

    def _stop_overdue(self) -> None:
        """Stop what takes too long, unless its answer is there: the driver may be what was late."""
        self._crew.stop_overdue()
        longest, now = max(map(self._seconds, ("search", *self._lengths))), self._clock()
        for slot in self._slots:
            if slot.taken_over and slot.starting is not None:
                # It answers once it is through with what an earlier driver asked it.
                if now - slot.asked > longest and not answered(slot.starting):
                    ray.kill(slot.actor)
                    self._crew.restart(slot, f"no answer within {longest} seconds of being taken over")
            elif slot.queue and not slot.overdue:
                reference, job = slot.queue[0]
                if now - slot.since > self._seconds(job.split) and not answered(reference):
                    slot.overdue = True
                    ray.kill(slot.actor)  # its first job now ends in RayActorError, and is tried again

    def health(self) -> tuple[ReplicaHealth, ...]:
        """How every replica is."""
        return self._crew.health()

    def close(self) -> None:
        """Let go of every replica at once; jobs under way are dropped."""
        self._crew.close()
