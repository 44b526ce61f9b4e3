"""The replicas: keep each busy with one trial queued ahead, retry, replace; follow the nodes there are.

A Ray task retry would hide how often a trial was tried, so Ray retries nothing; the pool does.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.lease import RENEW_SECONDS, NotHolderError
from actors.replica import Replica
from actors.types import RankfrontError, ReplicaSpec
from search.cluster import OBJECT_STORE_BYTES as OBJECT_STORE_BYTES
from search.cluster import Machine as Machine
from search.cluster import Nodes
from search.cluster import connect as connect
from search.cluster import thread_environment as thread_environment
from search.elastic import FIXED, LOOK_SECONDS, Elastic
from search.events import Note, silent
from search.failures import cause_of
from search.health import ReplicaHealth
from search.jobs import Job as Job
from search.jobs import Outcome as Outcome
from search.restarts import Restarts
from search.slots import SEAT_SECONDS, Launch, Slot
from search.tenure import Tenure, end_all, take_over

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
        self._attempts, self._limit, self._elastic = attempts, trial_seconds, elastic
        self._note, self._say, self._clock, self._pause = note, say, clock, pause
        self._launch = Launch(Replica, gpus_each, tenure)
        self._restarts = Restarts(clock)
        self._queue: deque[Job] = deque()  # not yet with a replica
        self._nodes = elastic.nodes() if elastic.nodes else Nodes({})
        self._looked = self._renewed = self._enough = clock()
        self._short = False  # whether it was said that there are too few replicas
        self._slots: list[Slot] = []
        self._begin(specs)

    def _begin(self, specs: list[ReplicaSpec]) -> None:
        """Fill a slot for each spec: with what waits from an earlier driver, or anew."""
        now, tenure = self._clock(), self._launch.tenure
        taken = []
        if tenure is not None:
            taken = take_over(tenure, specs, self._launch.gpus, self._say, self._clock, self._pause)
        for each in taken:
            slot = Slot(replace(specs[0], name=each.name), node=each.node)
            self._launch.fill(slot, each.actor, now)
            self._note("replica taken over", replica=each.name)
            self._slots.append(slot)
        used = {each.name for each in taken}
        free = [spec for spec in specs if spec.name not in used]
        for spec in free[: len(specs) - len(taken)]:
            self._add(spec)

    def _add(self, spec: ReplicaSpec) -> None:
        self._slots.append(Slot(spec))
        self._start(self._slots[-1])

    def _start(self, slot: Slot) -> None:
        avoided = self._restarts.avoided(self._nodes.usable(self._elastic.need))
        self._launch.start(slot, self._clock(), avoided)

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
        tenure = self._launch.tenure
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
            if not open_ or len(loaded) < self._elastic.least:
                return
            slot, now = min(open_, key=lambda slot: len(slot.queue)), self._clock()
            if slot.queue and len(self._queue) <= sum(slot.loading(now) for slot in self._slots):
                return  # better run at once by a replica that is loading than second by a busy one
            job = self._queue.popleft()
            if not slot.queue:
                slot.since = now
            score = slot.actor.score.remote(self._launch.token, job.allocation, job.split, job.rivals)
            slot.queue.append((score, job))
            facts = {"trial": job.key, "split": job.split, "attempt": job.attempt}
            self._note("dispatched", replica=slot.spec.name, **facts)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        """Outcomes that are ready within `seconds`; jobs of dead replicas are tried elsewhere.

        Raises:
            RankfrontError: replicas cannot start, the first error in full; or another driver has them.
        """
        self._tend()
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
                self._note_seated(slot)
            elif reference is slot.starting:
                self._note_started(slot)
            elif slot.queue and reference is slot.queue[0][0]:
                outcome = self._collect(slot)
                if outcome is not None:
                    yield outcome
        self._stop_overdue()

    # -- replicas that come and go ----------------------------------------------------------------

    def _tend(self) -> None:
        """What is due by now: renewals, starts that were put off, a look at the nodes."""
        now = self._clock()
        if now - self._renewed >= RENEW_SECONDS:
            self._renewed = now
            self._launch.renew(self._slots)
        for slot in self._slots:
            if slot.actor is None and now >= slot.retry_at:
                self._start(slot)
        if self._elastic.nodes is not None and now - self._looked >= LOOK_SECONDS:
            self._looked, self._nodes = now, self._elastic.nodes()
            self._vacate()
            for _ in range(self._elastic.missing(self._nodes, len(self._slots))):
                self._add(replace(self._slots[0].spec, name=self._new_name()))
        self._say_if_short(now)

    def _new_name(self) -> str:
        used = {slot.spec.name for slot in self._slots}
        return next(name for index in range(len(used) + 1) if (name := f"replica-{index}") not in used)

    def _vacate(self) -> None:
        """Leave nodes that drain: what runs there ends there, what was queued behind it goes elsewhere.

        Nodes that are gone took their idle replicas along; of the others their trials tell.
        """
        for slot in self._slots:
            if slot.loaded and not slot.queue and slot.node not in self._nodes.rooms:
                self._replace(slot, "its node left")
            if slot.actor is None or slot.leaving or slot.node not in self._nodes.draining:
                continue
            slot.leaving = True
            behind = list(slot.queue)[1:]
            self._queue.extendleft(job for _, job in reversed(behind))
            slot.queue = deque(list(slot.queue)[:1])
            if not slot.queue:
                self._replace(slot, "its node is drained")

    def _say_if_short(self, now: float) -> None:
        """Say when too few replicas are there to go on, and when there are enough again."""
        loaded, least = sum(slot.loaded for slot in self._slots), self._elastic.least
        if loaded >= least:
            if self._short:
                self._say(f"replicas: {loaded} loaded, going on")
            self._enough, self._short = now, False
        elif any(slot.loading(now) for slot in self._slots):
            self._enough = now
        elif not self._short and now - self._enough >= SEAT_SECONDS:
            self._short = True
            error = self._restarts.first_error
            cause = f"; the first that could not start: {error}" if error else ""
            self._say(f"replicas: {loaded} loaded, {least} needed: waiting for nodes that have room{cause}")

    def _note_seated(self, slot: Slot) -> None:
        """A replica has a node, or died before it said so, which its start says too."""
        try:
            slot.node = ray.get(slot.seat)
        except RayError:
            slot.node = None
        slot.seat = None

    def _note_started(self, slot: Slot) -> None:
        """A replica has loaded, or died of it."""
        if slot.seat is not None and ray.wait([slot.seat], timeout=0)[0]:
            self._note_seated(slot)
        try:
            slot.place = ray.get(slot.starting)
        except RayError as error:
            self._check_holder(slot, error)
            if self._left(slot, error):
                self._replace(slot, "its node left as it loaded")
            else:
                self._put_off(slot, error)
        else:
            slot.starting = None
            self._restarts.succeeded(slot.spec.name, slot.node)
            facts = dataclasses.asdict(slot.place)
            self._note("replica started", replica=slot.spec.name, starts=slot.starts, **facts)

    def _put_off(self, slot: Slot, error: RayError) -> None:
        """Start a replica that cannot start again later, unless there is no hope.

        Raises:
            RankfrontError: nothing is loaded or loads, and there is no node left that might do.
        """
        if self._restarts.first_error is None:
            self._say(f"replicas: {slot.spec.name} could not start: {cause_of(error)}")
        slot.retry_at = self._restarts.failed(slot.spec.name, slot.node, str(cause_of(error)))
        slot.failure = f"it could not start: {_last_line(error)}"
        self._note("replica died", replica=slot.spec.name, reason=slot.failure)
        self._launch.stop(slot)
        others = any(each.open(self._clock()) for each in self._slots)
        if not others and self._restarts.hopeless(self._nodes.usable(self._elastic.need)):
            raise RankfrontError(f"replicas cannot start: {self._restarts.first_error}") from error

    def _replace(self, slot: Slot, reason: str) -> None:
        """Start a new replica in a place whose replica died or is to leave."""
        self._note("replica died", replica=slot.spec.name, reason=reason)
        self._launch.stop(slot)
        slot.failure = reason
        self._start(slot)

    def _left(self, slot: Slot, error: RayError) -> bool:
        """Whether a replica died because its node left.

        Of a process that died its node tells Ray at once. Where nobody tells, the node itself is gone, which
        Ray finds out only later.
        """
        if self._elastic.nodes is None or slot.node is None:
            return False
        self._nodes = self._elastic.nodes()
        stays = slot.node in self._nodes.rooms and slot.node not in self._nodes.draining
        return not stays or isinstance(error, ActorUnavailableError)

    def _check_holder(self, slot: Slot, error: RayError) -> None:
        if isinstance(cause := cause_of(error), NotHolderError):
            raise RankfrontError(f"{slot.spec.name}: {cause}; this driver ends") from error

    # -- jobs -------------------------------------------------------------------------------------

    def _collect(self, slot: Slot) -> Outcome | None:
        reference, job = slot.queue[0]
        try:
            score = ray.get(reference)
        except RayTaskError as error:
            self._check_holder(slot, error)
            cause = cause_of(error)
            text = str(cause) if isinstance(cause, RankfrontError) else _last_line(error)
            self._next(slot)
            return self._again_or_fail(job, text)
        except RayActorError as error:
            return self._lost(slot, error)
        self._next(slot)
        return Outcome(job, score)

    def _next(self, slot: Slot) -> None:
        """A replica goes on to the next job of its queue; with none, it leaves a node that drains."""
        slot.queue.popleft()
        slot.since = self._clock()
        if slot.leaving and not slot.queue:
            self._replace(slot, "its node is drained")

    def _lost(self, slot: Slot, error: RayActorError) -> Outcome | None:
        """A replica died with its jobs: those queued behind the one that ran were not begun."""
        (_, job), *behind = slot.queue
        self._queue.extendleft(queued for _, queued in reversed(behind))
        reason = f"replica {slot.spec.name} died: {_last_line(error)}"
        if slot.overdue:
            reason = f"no score within {self._limit} seconds, replica stopped"
        left = not slot.overdue and self._left(slot, error)
        slot.queue.clear()
        self._replace(slot, "its node left" if left else reason)
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
        now = self._clock()
        return tuple(slot.health(now, time.time() - now) for slot in self._slots)

    def close(self) -> None:
        """Let go of every replica at once; jobs under way are dropped."""
        there: list[Any] = [slot.actor for slot in self._slots if slot.actor is not None]
        self._slots = []
        if self._launch.tenure is not None:
            end_all(there, self._launch.token)
            return
        for actor in there:
            ray.kill(actor)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
