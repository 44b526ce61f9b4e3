"""The replicas: start them, keep each busy with one trial queued ahead, retry, replace.

A Ray task retry would hide how often a trial was tried, so Ray retries nothing; the pool does.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.replica import Replica
from actors.types import Allocation, Place, RankfrontError, ReplicaSpec, Rival, Score
from search.events import Note, silent
from search.failures import cause_of
from search.health import ReplicaHealth

# One trial runs and one waits behind it: the driver's work between two trials costs a replica nothing.
DEPTH = 2
# Replicas that die before their first answer this many times in a row: the cause is not bad luck.
START_FAILURES = 3
# Ray's store only ever holds allocations and scores; its default is 30% of the machine's memory.
OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class Job:
    """One allocation to score on one split, under a key of the caller's; `rivals` may stop it early."""

    key: int
    allocation: Allocation
    split: str = "search"
    attempt: int = 1
    rivals: tuple[Rival, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The end of a job: a score, or the reason there is none."""

    job: Job
    score: Score | None
    reason: str | None = None


@dataclass
class _Slot:
    """A replica and its queue; `since` is when the first job of the queue began.

    `starts` counts it and those before it in its place, of which the last ended for `failure`.
    """

    spec: ReplicaSpec
    actor: Any
    starting: Any  # answers when the replica has loaded; None from then on
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)
    since: float = 0.0
    overdue: bool = False
    starts: int = 1
    failure: str | None = None
    place: Place | None = None


@dataclass(frozen=True)
class Machine:
    """What the cluster offers now: CPU cores, GPUs, bytes of free memory on this node.

    `grows` says that nodes may join it: of any cluster that this process did not start.
    """

    cores: int
    gpus: int
    memory: int
    grows: bool = False


def connect() -> Machine:
    """Join the cluster of RAY_ADDRESS, or start a local one that ends with this process."""
    # Ray would otherwise copy the driver's folder to every worker and re-install the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        common: dict[str, Any] = {"logging_level": "error", "log_to_driver": False, "namespace": "rankfront"}
        if address:
            try:
                ray.init(**common)
            except ConnectionError as error:
                raise RankfrontError(
                    f"RAY_ADDRESS={address}: no cluster answers there ({error}). Where it wants a token, set "
                    "RAY_AUTH_MODE=token and have the token in ~/.ray/auth_token"
                ) from error
        else:
            ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
    total = ray.cluster_resources()
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
    return Machine(cores, gpus, memory, grows=bool(address))


def thread_environment(threads: int) -> dict[str, Any]:
    """Ray's runtime environment of a worker that may use so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"env_vars": {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}}


class Pool:
    """Replicas of one preparation. Results come from `wait`, in the order they are ready."""

    def __init__(
        self,
        specs: list[ReplicaSpec],
        gpus_each: int,
        attempts: int,
        trial_seconds: float | None = None,
        note: Note = silent,
    ) -> None:
        self._gpus, self._attempts, self._limit = gpus_each, attempts, trial_seconds
        self._note = note
        self._queue: deque[Job] = deque()  # not yet with a replica
        self._failed_starts = 0
        self._slots = [self._start(spec) for spec in specs]

    def _start(self, spec: ReplicaSpec) -> _Slot:
        actor = (
            ray.remote(Replica)
            .options(
                num_cpus=spec.threads,
                num_gpus=self._gpus,
                max_restarts=0,
                max_task_retries=0,
                runtime_env=thread_environment(spec.threads),
            )
            .remote(spec)
        )
        return _Slot(spec, actor, actor.ready.remote())

    @property
    def size(self) -> int:
        return len(self._slots)

    @property
    def outstanding(self) -> int:
        return len(self._queue) + sum(len(slot.queue) for slot in self._slots)

    @property
    def free(self) -> int:
        """Jobs that can be submitted before every replica has one running and one queued."""
        return max(0, DEPTH * len(self._slots) - self.outstanding)

    def submit(self, job: Job) -> None:
        """Take a job; it goes to the replica with the shortest queue, once one is loaded."""
        self._queue.append(job)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._queue:
            loaded = [slot for slot in self._slots if slot.starting is None and len(slot.queue) < DEPTH]
            if not loaded:
                return
            slot = min(loaded, key=lambda slot: len(slot.queue))
            if slot.queue and len(self._queue) <= sum(slot.starting is not None for slot in self._slots):
                return  # better run at once by a replica that is loading than second by a busy one
            job = self._queue.popleft()
            if not slot.queue:
                slot.since = time.monotonic()
            slot.queue.append((slot.actor.score.remote(job.allocation, job.split, job.rivals), job))
            facts = {"trial": job.key, "split": job.split, "attempt": job.attempt}
            self._note("dispatched", replica=slot.spec.name, **facts)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        """Outcomes that are ready within `seconds`; jobs of dead replicas are tried elsewhere.

        Raises:
            RankfrontError: replicas cannot start; the first error in full.
        """
        self._hand_out()
        expected = {slot.queue[0][0]: slot for slot in self._slots if slot.queue}
        expected |= {slot.starting: slot for slot in self._slots if slot.starting is not None}
        if not expected or not self.outstanding:
            return
        ready, _ = ray.wait(list(expected), num_returns=len(expected), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(expected), num_returns=1, timeout=seconds)
        for reference in ready:
            slot = expected[reference]
            if reference is slot.starting:
                self._note_started(slot)
            else:
                outcome = self._collect(slot)
                if outcome is not None:
                    yield outcome
        self._stop_overdue()

    def _note_started(self, slot: _Slot) -> None:
        """A replica has loaded, or died of it."""
        try:
            slot.place = ray.get(slot.starting)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                raise RankfrontError(f"replicas cannot start: {cause_of(error)}") from error
            self._replace(slot, f"it could not start: {_last_line(error)}")
        else:
            slot.starting, self._failed_starts = None, 0
            facts = dataclasses.asdict(slot.place)
            self._note("replica started", replica=slot.spec.name, starts=slot.starts, **facts)

    def _collect(self, slot: _Slot) -> Outcome | None:
        reference, job = slot.queue[0]
        try:
            score = ray.get(reference)
        except RayTaskError as error:
            slot.queue.popleft()
            slot.since = time.monotonic()
            cause = cause_of(error)
            text = str(cause) if isinstance(cause, RankfrontError) else _last_line(error)
            return self._again_or_fail(job, text)
        except RayActorError as error:
            reason = f"replica {slot.spec.name} died: {_last_line(error)}"
            if slot.overdue:
                reason = f"no score within {self._limit} seconds, replica stopped"
            # Jobs queued behind the one that ran were not begun: they cost no attempt.
            self._queue.extendleft(queued for _, queued in reversed(list(slot.queue)[1:]))
            self._replace(slot, reason)
            return self._again_or_fail(job, reason)
        slot.queue.popleft()
        slot.since = time.monotonic()
        return Outcome(job, score)

    def _replace(self, slot: _Slot, reason: str) -> None:
        """Start a new replica in a dead one's place."""
        self._note("replica died", replica=slot.spec.name, reason=reason)
        new = self._start(slot.spec)
        new.starts, new.failure = slot.starts + 1, reason
        self._slots[self._slots.index(slot)] = new

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
            if slot.queue and not slot.overdue and time.monotonic() - slot.since > self._limit:
                slot.overdue = True
                ray.kill(slot.actor)  # its first job now ends in RayActorError, and is tried again

    @property
    def queued(self) -> int:
        """Jobs that no replica has yet."""
        return len(self._queue)

    def health(self) -> tuple[ReplicaHealth, ...]:
        """How every replica is."""
        ago = time.time() - time.monotonic()
        return tuple(
            ReplicaHealth(
                name=slot.spec.name,
                state="loading" if slot.starting is not None else "busy" if slot.queue else "idle",
                starts=slot.starts,
                trials=tuple(job.key for _, job in slot.queue),
                since=ago + slot.since if slot.queue else None,
                node=slot.place.node if slot.place else None,
                pid=slot.place.pid if slot.place else None,
                failure=slot.failure,
            )
            for slot in self._slots
        )

    def close(self) -> None:
        """Let go of every replica at once; jobs under way are dropped."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
