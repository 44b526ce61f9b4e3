"""The replicas at work: keep each busy with one trial queued ahead, and try again what one did not end.

A Ray task retry would hide how often a trial was tried, so Ray retries nothing; the pool does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.replica import Replica
from actors.types import RankfrontError, ReplicaSpec
from search.cluster import OBJECT_STORE_BYTES as OBJECT_STORE_BYTES
from search.cluster import Machine as Machine
from search.cluster import connect as connect
from search.cluster import thread_environment as thread_environment
from search.crew import Crew, last_line
from search.elastic import FIXED, Elastic
from search.events import Note, silent
from search.failures import cause_of
from search.health import ReplicaHealth
from search.jobs import Job as Job
from search.jobs import Outcome as Outcome
from search.slots import Launch, Slot
from search.tenure import Tenure

# One trial runs and one waits behind it: the driver's work between two trials costs a replica nothing.
DEPTH = 2
# A trial that was on so many nodes as they left may be what ends them: from then on it is charged.
MOVES = 3


def _unheard(line: str) -> None:
    """Nobody listens."""


class Pool:
    """Replicas of one preparation. Results come from `wait`, in the order they are ready.

    A node that leaves costs its replicas, which start again where there is room, and no trial an attempt.
    With a `tenure` replicas outlive a driver that dies, and those of an earlier one are taken over. `clock`
    (seconds) and `pause` are time itself.
    """

    def __init__(
        self,
        specs: list[ReplicaSpec],
        gpus_each: float,
        attempts: int,
        trial_seconds: float | None = None,
        note: Note = silent,
        elastic: Elastic = FIXED,
        tenure: Tenure | None = None,
        say: Callable[[str], None] = _unheard,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._attempts, self._limit, self._least = attempts, trial_seconds, elastic.least
        self._note, self._clock, self._pause = note, clock, pause
        launch = Launch(Replica, gpus_each, tenure)
        self._crew = Crew(specs, launch, elastic, note, say, clock, pause)
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
            text = str(cause) if isinstance(cause, RankfrontError) else last_line(error)
            self._next(slot)
            return self._again_or_fail(job, text)
        except RayActorError as error:
            return self._lost(slot, error)
        slot.add_work(score.busy)
        self._next(slot)
        return Outcome(job, score)

    def _next(self, slot: Slot) -> None:
        """A replica goes on to the next job of its queue; with none, it leaves a node that drains."""
        slot.queue.popleft()
        slot.since = self._clock()
        if slot.leaving and not slot.queue:
            self._crew.restart(slot, "its node is drained")

    def _lost(self, slot: Slot, error: RayActorError) -> Outcome | None:
        """A replica died with its jobs: those queued behind the one that ran were not begun."""
        (_, job), *behind = slot.queue
        self._queue.extendleft(queued for _, queued in reversed(behind))
        reason = f"replica {slot.spec.name} died: {last_line(error)}"
        if slot.overdue:
            reason = f"no score within {self._limit} seconds, replica stopped"
        left = not slot.overdue and self._crew.left(slot, error)
        slot.queue.clear()
        self._crew.restart(slot, "its node left" if left else reason)
        if left and job.moves < MOVES:
            self._note("retried", trial=job.key, attempt=job.attempt, reason="its node left")
            self._queue.appendleft(replace(job, moves=job.moves + 1))
            return None
        return self._again_or_fail(job, reason)

    def _again_or_fail(self, job: Job, reason: str) -> Outcome | None:
        if job.attempt < self._attempts:
            self._note("retried", trial=job.key, attempt=job.attempt, reason=reason)
            self._queue.append(replace(job, attempt=job.attempt + 1))
            return None
        return Outcome(job, None, f"{reason} (attempt {job.attempt} of {self._attempts})")

    def _stop_overdue(self) -> None:
        if self._limit is None:
            return
        for slot in self._slots:
            if slot.queue and not slot.overdue and self._clock() - slot.since > self._limit:
                slot.overdue = True
                ray.kill(slot.actor)  # its first job now ends in RayActorError, and is tried again

    def health(self) -> tuple[ReplicaHealth, ...]:
        """How every replica is."""
        return self._crew.health()

    def close(self) -> None:
        """Let go of every replica at once; jobs under way are dropped."""
        self._crew.close()
