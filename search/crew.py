"""The replicas of a pool as they come and go: started, taken over, put off, vacated, let go."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from actors.lease import RENEW_SECONDS, NotHolderError
from actors.types import RankfrontError, ReplicaSpec
from search.cluster import Nodes
from search.elastic import LOOK_SECONDS, Elastic
from search.events import Note
from search.failures import cause_of, last_line
from search.hangs import Bound
from search.health import ReplicaHealth
from search.jobs import Job
from search.restarts import Restarts
from search.slots import SEAT_SECONDS, Launch, Slot, answered
from search.tenure import end_all, take_over


class Crew:
    """The slots of a pool. Jobs are the pool's own, which asks and says what became of a replica."""

    def __init__(
        self,
        specs: list[ReplicaSpec],
        launch: Launch,
        elastic: Elastic,
        load: Bound,
        note: Note,
        say: Callable[[str], None],
        clock: Callable[[], float],
        pause: Callable[[float], None],
    ) -> None:
        self.launch, self._elastic, self._load = launch, elastic, load
        self._note, self._say, self._clock, self._pause = note, say, clock, pause
        self._restarts = Restarts(clock)
        self._nodes = elastic.nodes() if elastic.nodes else Nodes({})
        self._looked = self._renewed = self._enough = clock()
        self._short = False  # whether it was said that there are too few replicas
        self.slots: list[Slot] = []
        self._begin(specs)

    def _begin(self, specs: list[ReplicaSpec]) -> None:
        """Fill a slot for each spec: with what waits from an earlier driver, or anew."""
        now, tenure = self._clock(), self.launch.tenure
        taken = []
        if tenure is not None:
            taken = take_over(tenure, specs, self.launch.gpus, self._say, self._clock, self._pause)
        for each in taken:
            slot = Slot(replace(specs[0], name=each.name), node=each.node, taken_over=True)
            self.launch.fill(slot, each.actor, now)
            self._note("replica taken over", replica=each.name)
            self.slots.append(slot)
        used = {each.name for each in taken}
        free = [spec for spec in specs if spec.name not in used]
        for spec in free[: len(specs) - len(taken)]:
            self._add(spec)

    def _add(self, spec: ReplicaSpec) -> None:
        self.slots.append(Slot(spec))
        self._start(self.slots[-1])

    def _start(self, slot: Slot) -> None:
        avoided = self._restarts.avoided(self._nodes.usable(self._elastic.need))
        self.launch.start(slot, self._clock(), avoided)

    def tend(self) -> list[Job]:
        """What is due by now: renewals, starts that were put off, a look at the nodes.

        Returns jobs that were taken from the queues of replicas that are to leave.
        """
        now = self._clock()
        back: list[Job] = []
        if now - self._renewed >= RENEW_SECONDS:
            self._renewed = now
            self.launch.renew(self.slots)
        for slot in self.slots:
            if slot.actor is None and now >= slot.retry_at:
                self._start(slot)
        if self._elastic.nodes is not None and now - self._looked >= LOOK_SECONDS:
            self._looked, self._nodes = now, self._elastic.nodes()
            back = self._vacate()
            for _ in range(self._elastic.missing(self._nodes, len(self.slots))):
                self._add(replace(self.slots[0].spec, name=self._new_name()))
        self._say_if_short(now)
        return back

    def _new_name(self) -> str:
        used = {slot.spec.name for slot in self.slots}
        return next(name for index in range(len(used) + 1) if (name := f"replica-{index}") not in used)

    def _vacate(self) -> list[Job]:
        """Leave nodes that drain: what runs there ends there, what was queued behind it goes elsewhere.

        Nodes that are gone took their idle replicas along; of the others their trials tell.
        """
        back: list[Job] = []
        for slot in self.slots:
            if slot.loaded and not slot.queue and slot.node not in self._nodes.rooms:
                self.restart(slot, "its node left")
            if slot.actor is None or slot.leaving or slot.node not in self._nodes.draining:
                continue
            slot.leaving = True
            back += slot.give_back()
            if not slot.queue:
                self.restart(slot, "its node is drained")
        return back

    def _say_if_short(self, now: float) -> None:
        """Say when too few replicas are there to go on, and when there are enough again."""
        loaded, least = sum(slot.loaded for slot in self.slots), self._elastic.least
        if loaded >= least:
            if self._short:
                self._say(f"replicas: {loaded} loaded, going on")
            self._enough, self._short = now, False
        elif any(slot.loading(now) for slot in self.slots):
            self._enough = now
        elif not self._short and now - self._enough >= SEAT_SECONDS:
            self._short = True
            error = self._restarts.first_error
            cause = f"; the first that could not start: {error}" if error else ""
            self._say(f"replicas: {loaded} loaded, {least} needed: waiting for nodes that have room{cause}")

    def note_seated(self, slot: Slot) -> None:
        """A replica has a node, or died before it said so, which its start says too."""
        try:
            slot.node = ray.get(slot.seat)
        except RayError:
            slot.node = None
        slot.seat, slot.seated_at = None, self._clock()

    def note_started(self, slot: Slot) -> None:
        """A replica has loaded, or died of it."""
        if slot.seat is not None and answered(slot.seat):
            self.note_seated(slot)
        try:
            slot.place = ray.get(slot.starting)
        except RayError as error:
            self.check_holder(slot, error)
            if self.left(slot, error):
                self.restart(slot, "its node left as it loaded")
            else:
                self._put_off(slot, str(cause_of(error)), last_line(error))
        else:
            slot.starting, slot.loaded_at = None, self._clock()
            if not slot.taken_over:
                self._load.ended(slot.loaded_at - slot.seated_at)
            self._restarts.succeeded(slot.spec.name, slot.node)
            facts = dataclasses.asdict(slot.place)
            self._note("replica started", replica=slot.spec.name, starts=slot.starts, **facts)

    def stop_overdue(self) -> None:
        """Stop what takes too long to load, unless it is through: the driver may be what was late."""
        seconds, now = self._load.seconds, self._clock()
        for slot in self.slots:
            if slot.taken_over or slot.starting is None or slot.node is None:
                continue
            if now - slot.seated_at > seconds and not answered(slot.starting):
                ray.kill(slot.actor)
                reason = f"not loaded {seconds:g} seconds after it was on node {slot.node}, stopped"
                self._put_off(slot, reason, reason)

    def _put_off(self, slot: Slot, error: str, line: str) -> None:
        """Start a replica that cannot start again later, unless there is no hope; `line` is its error in one.

        Raises:
            RankfrontError: nothing is loaded or loads, and there is no node left that might do.
        """
        if self._restarts.first_error is None:
            self._say(f"replicas: {slot.spec.name} could not start: {error}")
        slot.retry_at = self._restarts.failed(slot.spec.name, slot.node, error)
        slot.failure = f"it could not start: {line}"
        self._note("replica died", replica=slot.spec.name, reason=slot.failure)
        self.launch.stop(slot)
        others = any(each.open(self._clock()) for each in self.slots)
        if not others and self._restarts.hopeless(self._nodes.usable(self._elastic.need)):
            raise RankfrontError(f"replicas cannot start: {self._restarts.first_error}")

    def restart(self, slot: Slot, reason: str) -> None:
        """Start a new replica in a place whose replica died or is to leave."""
        self._note("replica died", replica=slot.spec.name, reason=reason)
        self.launch.stop(slot)
        slot.failure = reason
        self._start(slot)

    def left(self, slot: Slot, error: RayError) -> bool:
        """Whether a replica died because its node left.

        Of a process that died its node tells Ray at once. Where nobody tells, the node itself is gone, which
        Ray finds out only later.
        """
        if self._elastic.nodes is None or slot.node is None:
            return False
        self._nodes = self._elastic.nodes()
        stays = slot.node in self._nodes.rooms and slot.node not in self._nodes.draining
        return not stays or isinstance(error, ActorUnavailableError)

    def check_holder(self, slot: Slot, error: RayError) -> None:
        """Raises RankfrontError where a replica says that it serves another driver."""
        if isinstance(cause := cause_of(error), NotHolderError):
            raise RankfrontError(f"{slot.spec.name}: {cause}; this driver ends") from error

    def health(self) -> tuple[ReplicaHealth, ...]:
        """How every replica is."""
        now = self._clock()
        return tuple(slot.health(now, time.time() - now) for slot in self.slots)

    def close(self) -> None:
        """Let go of every replica at once.

        Those without a node yet are killed before any is asked to end: they do not answer and, where this
        process is killed as it waits for answers, an autoscaler would go on to start nodes for them.
        """
        held: list[Any] = []
        for slot in self.slots:
            if slot.actor is None:
                continue
            if slot.node is None or self.launch.tenure is None:
                ray.kill(slot.actor)
            else:
                held.append(slot.actor)
        self.slots.clear()
        end_all(held, self.launch.token)
