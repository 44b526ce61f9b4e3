"""One place for a replica: the actor that fills it now, and how it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.held import PROMPT, Held
from actors.types import Place, ReplicaSpec
from search.cluster import thread_environment
from search.health import ReplicaHealth
from search.jobs import Job
from search.tenure import Tenure, prompt

# Ray's default label of a node's id.
_NODE_LABEL = "ray.io/node-id"
# A process begins within seconds where a node has room: one that did not waits for a node.
SEAT_SECONDS = 15.0
# What a replica that nothing outlives is held by: its driver alone has its handle.
_NO_TENURE = "driver"


@dataclass
class Slot:
    """A replica and its queue; `since` is when the first job of the queue began.

    `starts` counts it and those before it in its place, of which the last ended for `failure`. Where `actor`
    is None, the next one starts at `retry_at`. `asked` is when the actor was asked for, `loaded_at` when it
    was loaded, `worked` the seconds that its GPUs worked since. `node` is the id of its node, None until it
    has one, which it has since `seated_at`. A slot that is `leaving` gets no more jobs: its node is to be
    vacated. One that was `taken_over` has a replica that an earlier driver started. `strikes` counts errors
    in a row that nobody foresaw.
    """

    spec: ReplicaSpec
    actor: Any = None
    asked: float = 0.0
    seated_at: float = 0.0
    seat: Any = None  # answers the node's id; None from then on
    starting: Any = None  # answers when the replica has loaded; None from then on
    renewal: Any = None
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)
    since: float = 0.0
    retry_at: float = 0.0
    node: str | None = None
    overdue: bool = False
    leaving: bool = False
    taken_over: bool = False
    strikes: int = 0
    starts: int = 0
    failure: str | None = None
    place: Place | None = None
    loaded_at: float = 0.0
    worked: tuple[float, ...] = ()

    @property
    def loaded(self) -> bool:
        """Whether it scores, or would if it were given a job."""
        return self.actor is not None and self.starting is None and not self.leaving

    def loading(self, now: float) -> bool:
        """Whether it is on a node and loads, or has only just been asked for."""
        if self.actor is None or self.starting is None:
            return False
        return self.node is not None or now - self.asked < SEAT_SECONDS

    def open(self, now: float) -> bool:
        """Whether it is there or will be without a node joining or a cause going away."""
        return self.loaded or self.loading(now)

    def state(self, now: float) -> str:
        if self.actor is None:
            return "failed"
        if self.starting is not None:
            return "loading" if self.loading(now) else "waiting"
        return "busy" if self.queue else "idle"

    def add_work(self, busy: tuple[float, ...]) -> None:
        """Count what a score says of each GPU (seconds)."""
        self.worked = tuple(sum(each) for each in zip(self.worked or (0.0,) * len(busy), busy, strict=True))

    def give_back(self) -> list[Job]:
        """Take back the jobs behind the one that runs; what the replica answers for them is not heard."""
        behind = [self.queue.pop()[1] for _ in range(len(self.queue) - 1)]
        return behind[::-1]

    def health(self, now: float, ago: float) -> ReplicaHealth:
        """How it is at `now` of the pool's clock, which is Unix time less `ago`."""
        return ReplicaHealth(
            name=self.spec.name,
            state=self.state(now),
            starts=self.starts,
            trials=tuple(job.key for _, job in self.queue),
            since=ago + self.since if self.queue else None,
            node=self.place.node if self.place else None,
            pid=self.place.pid if self.place else None,
            failure=self.failure,
            gpus=tuple(_share(worked, now - self.loaded_at) for worked in self.worked),
        )


def _share(worked: float, seconds: float) -> float:
    """Of so many seconds; clocks of two devices agree to a few millionths."""
    return min(1.0, worked / seconds) if seconds > 0 else 0.0


def answered(reference: Any) -> bool:
    """Whether what an actor was asked is done, or ended in an error."""
    return bool(ray.wait([reference], timeout=0)[0])


@dataclass(frozen=True)
class Launch:
    """How the actors of a pool start, and what they are asked by."""

    kind: Any
    gpus: float
    tenure: Tenure | None

    @property
    def token(self) -> str:
        return self.tenure.token if self.tenure else _NO_TENURE

    def start(self, slot: Slot, now: float, avoid: Iterable[str]) -> None:
        """Fill a slot with a new actor, on no node of `avoid`."""
        spec, tenure = slot.spec, self.tenure
        options: dict[str, Any] = {
            "num_cpus": spec.threads,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": thread_environment(spec.threads),
        }
        if tenure is not None:
            options |= {"lifetime": "detached", "name": tenure.name(spec, self.gpus)}
        if avoided := ",".join(avoid):
            options["label_selector"] = {_NODE_LABEL: f"!in({avoided})"}
        actor_class = ray.remote(concurrency_groups={PROMPT: 1})(Held).options(**options)
        waits = (tenure.alone_seconds, tenure.silent_seconds) if tenure else ()
        actor = actor_class.remote(self.kind, spec, self.token, *waits)
        slot.seat, slot.node, slot.place = prompt(actor.seat).remote(), None, None
        slot.taken_over = False
        self.fill(slot, actor, now)

    def fill(self, slot: Slot, actor: Any, now: float) -> None:
        """Put an actor into a slot and have it load, if it has not."""
        slot.actor, slot.asked, slot.starting = actor, now, actor.ready.remote(self.token)
        slot.queue, slot.overdue, slot.leaving, slot.renewal = deque(), False, False, None
        slot.worked, slot.strikes = (), 0
        slot.starts += 1

    def renew(self, slots: Iterable[Slot]) -> None:
        """Tell the replicas that their holder lives; one that has not answered the last time is not asked."""
        if self.tenure is None:
            return
        for slot in slots:
            if slot.actor is None or slot.node is None:
                continue
            if slot.renewal is None or answered(slot.renewal):
                slot.renewal = prompt(slot.actor.renew).remote(self.token)

    def stop(self, slot: Slot) -> None:
        """Let go of a slot's actor without waiting; of one that another driver took, nothing happens."""
        if slot.actor is None:
            return
        if self.tenure is None:
            ray.kill(slot.actor)
        else:
            prompt(slot.actor.end).remote(self.token)
        slot.actor = slot.seat = slot.starting = None
