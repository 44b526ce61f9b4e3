"""The replicas: start them, keep each busy with one trial queued ahead, retry, replace.

A Ray task retry would hide how often a trial was tried, so Ray retries nothing; the pool does.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.replica import Preparer, Replica
from actors.types import Allocation, PreparationSpec, Prepared, RankfrontError, ReplicaSpec, Score

# One trial runs and one waits behind it: the driver's work between two trials costs a replica nothing.
DEPTH = 2
# Replicas that die before their first answer this many times in a row: the cause is not bad luck.
START_FAILURES = 3
# Ray's store only ever holds allocations and scores; its default is 30% of the machine's memory.
OBJECT_STORE_BYTES = 80 * 2**20


@dataclass(frozen=True)
class Job:
    """One allocation to score on one split, under a key of the caller's."""

    key: int
    allocation: Allocation
    split: str = "search"
    attempt: int = 1


@dataclass(frozen=True)
class Outcome:
    """The end of a job: a score, or the reason there is none."""

    job: Job
    score: Score | None
    reason: str | None = None


@dataclass
class _Slot:
    spec: ReplicaSpec
    actor: Any
    proven: bool = False
    queue: deque[tuple[Any, Job]] = field(default_factory=deque)
    since: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What the cluster offers: CPU cores, GPUs, bytes of free memory on this node."""

    cores: int
    gpus: int
    memory: int


def connect() -> Machine:
    """Join the cluster of RAY_ADDRESS, or start a local one that ends with this process."""
    # Ray would otherwise copy the driver's folder to every worker and re-install the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not ray.is_initialized():
        common: dict[str, Any] = {"logging_level": "error", "log_to_driver": False, "namespace": "rankfront"}
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**common)
        else:
            ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common)
    total = ray.cluster_resources()
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(cores=int(total.get("CPU", 1)), gpus=int(total.get("GPU", 0)), memory=memory)


def prepare(spec: PreparationSpec, machine: Machine, say: Callable[[str], None]) -> Prepared:
    """Run a preparation in an actor of its own, gone when it ends.

    Raises:
        RankfrontError: what the preparation says is wrong, or that its process died.
    """
    options = {"num_cpus": 1, "num_gpus": min(1, machine.gpus), "runtime_env": _environment(machine.cores)}
    actor = ray.remote(Preparer).options(**options).remote()
    try:
        for reference in actor.prepare.options(num_returns="streaming").remote(spec, machine.cores):
            item = ray.get(reference)
            if isinstance(item, Prepared):
                return item
            say(item)
    except RayTaskError as error:
        raise _cause(error) from error
    except RayActorError as error:
        raise RankfrontError(f"the preparation's process died (out of memory?): {error}") from error
    finally:
        ray.kill(actor)
    raise RankfrontError("the preparation ended without a result")


def _environment(threads: int) -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {"env_vars": {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}}


def _cause(error: RayTaskError) -> BaseException:
    """The user's mistake itself where it is one; otherwise Ray's error with the worker's traceback."""
    return error.cause if isinstance(error.cause, RankfrontError) else error


class Pool:
    """Replicas of one preparation. Results come from `wait`, in the order they are ready."""

    def __init__(
        self,
        specs: list[ReplicaSpec],
        gpus_each: int,
        attempts: int,
        trial_seconds: float | None = None,
    ) -> None:
        self._gpus, self._attempts, self._limit = gpus_each, attempts, trial_seconds
        self._retries: deque[Job] = deque()
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
                runtime_env=_environment(spec.threads),
            )
            .remote(spec)
        )
        return _Slot(spec, actor)

    @property
    def size(self) -> int:
        return len(self._slots)

    @property
    def outstanding(self) -> int:
        return len(self._retries) + sum(len(slot.queue) for slot in self._slots)

    @property
    def free(self) -> int:
        """Jobs that can be submitted before every replica has one running and one queued."""
        return max(0, DEPTH * len(self._slots) - self.outstanding)

    def submit(self, job: Job) -> None:
        """Hand a job to the replica with the shortest queue."""
        slot = min(self._slots, key=lambda slot: len(slot.queue))
        if not slot.queue:
            slot.since = time.monotonic()
        reference = slot.actor.score.remote(job.allocation, job.split)
        slot.queue.append((reference, job))

    def wait(self, seconds: float) -> Iterator[Outcome]:
        """Outcomes that are ready within `seconds`; jobs of dead replicas are tried elsewhere.

        Raises:
            RankfrontError: replicas cannot start; the first error in full.
        """
        while self._retries:
            self.submit(self._retries.popleft())
        heads = {slot.queue[0][0]: slot for slot in self._slots if slot.queue}
        if not heads:
            return
        ready, _ = ray.wait(list(heads), num_returns=len(heads), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(heads), num_returns=1, timeout=seconds)
        for reference in ready:
            slot = heads[reference]
            outcome = self._collect(slot)
            if outcome is not None:
                yield outcome
        self._stop_overdue()

    def _collect(self, slot: _Slot) -> Outcome | None:
        reference, job = slot.queue[0]
        try:
            score = ray.get(reference)
        except RayTaskError as error:
            slot.queue.popleft()
            slot.since = time.monotonic()
            cause = _cause(error)
            text = str(cause) if isinstance(cause, RankfrontError) else _last_line(error)
            return self._again_or_fail(job, text)
        except RayActorError as error:
            return self._replace(slot, f"replica {slot.spec.name} died: {_last_line(error)}", error)
        slot.queue.popleft()
        slot.since, slot.proven, self._failed_starts = time.monotonic(), True, 0
        return Outcome(job, score)

    def _again_or_fail(self, job: Job, reason: str) -> Outcome | None:
        if job.attempt < self._attempts:
            self._retries.append(replace(job, attempt=job.attempt + 1))
            return None
        return Outcome(job, None, f"{reason} (attempt {job.attempt} of {self._attempts})")

    def _replace(self, slot: _Slot, reason: str, error: RayError | None = None) -> Outcome | None:
        """Start a new replica in a dead one's place; its running job is tried again, the others requeued."""
        (_, first), *rest = slot.queue
        if not slot.proven:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                raise RankfrontError(f"replicas cannot start: {error}")
        self._slots[self._slots.index(slot)] = self._start(slot.spec)
        self._retries.extend(job for _, job in rest)
        return self._again_or_fail(first, reason)

    def _stop_overdue(self) -> None:
        if self._limit is None:
            return
        for slot in self._slots:
            if slot.proven and slot.queue and time.monotonic() - slot.since > self._limit:
                ray.kill(slot.actor)  # its head now ends in RayActorError, and is tried again

    def close(self) -> None:
        """Let go of every replica at once; jobs under way are dropped."""
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
