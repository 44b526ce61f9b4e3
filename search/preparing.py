"""Run a preparation on the cluster: one actor fixes text and targets, all of them build the factors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError

from actors.replica import Preparer
from actors.types import BuildPlan, PreparationSpec, Prepared, Progress, RankfrontError
from search.pool import Machine, cause_of, thread_environment

# Activations are megabytes each and of many sizes: kept in the C library's heap they leave holes that add
# up to hundreds of MB beyond the memory budget, mapped one by one they go back when they are freed.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def prepare(
    spec: PreparationSpec,
    machine: Machine,
    builders: int,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
    check: Callable[[Mapping[str, str]], None],
) -> Prepared:
    """Prepare in actors of their own, gone when it ends or when `check` refuses the fingerprints.

    A build whose processes die is begun again, from the targets it has, as long as it gets further.

    Raises:
        RankfrontError: what the preparation or `check` says is wrong, or that its processes died.
    """
    progressed = False

    def watch(progress: Progress) -> None:
        nonlocal progressed
        progressed = progressed or progress.step == "decomposing"
        show(progress)

    while True:
        try:
            return _prepare(spec, machine, builders, say, watch, check)
        except RayError as error:
            if not _died(error):
                raise cause_of(error) from error
            if not progressed:
                raise RankfrontError(f"the preparation's process died (out of memory?): {error}") from error
            progressed = False
            say("a process of the preparation died; beginning again with what it left")


def _died(error: RayError) -> bool:
    """Whether a process is gone: the one that was asked, or one whose moments another was waiting for."""
    causes = (error, getattr(error, "cause", None))
    return any(isinstance(cause, RayActorError | ObjectLostError) for cause in causes)


def _prepare(
    spec: PreparationSpec,
    machine: Machine,
    builders: int,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
    check: Callable[[Mapping[str, str]], None],
) -> Prepared:
    actors = [_start(spec, machine, builders)]
    try:
        for item in _stream(actors[0].inspect):
            if isinstance(item, Prepared):
                return item
            if isinstance(item, BuildPlan):
                plan = item
            elif isinstance(item, str):
                say(item)
            else:
                check(item)
        shards = max(1, min(builders, plan.windows))  # the text may be shorter than was asked for
        actors += [_start(spec, machine, builders) for _ in range(shards - 1)]
        total = sum(map(len, plan.groups))
        done = 0
        for number, group in enumerate(plan.groups):
            _collect(actors, plan, number, show)
            for _ in _build(actors, group):
                done += 1
                show(Progress("decomposing", done, total))
        prepared: Prepared = ray.get(actors[0].finish.remote())
        say(f"factor store: built, {prepared.factor_store}")
        return prepared
    finally:
        for actor in actors:
            ray.kill(actor)


def _start(spec: PreparationSpec, machine: Machine, builders: int) -> Any:
    threads = max(1, machine.cores // builders)
    environment = thread_environment(threads)
    environment["env_vars"].update(MEMORY_ENVIRONMENT)
    options = {"num_cpus": 1, "num_gpus": min(1, machine.gpus), "runtime_env": environment}
    return ray.remote(Preparer).options(**options).remote(spec, threads)


def _stream(method: Any, *arguments: Any) -> Iterator[Any]:
    for reference in method.options(num_returns="streaming").remote(*arguments):
        yield ray.get(reference)


def _collect(actors: list[Any], plan: BuildPlan, group: int, show: Callable[[Progress], None]) -> None:
    """One pass over the text, a share for each builder; the first one's progress stands for all."""
    streams = [
        actor.collect.options(num_returns="streaming").remote(plan, group, shard, len(actors))
        for shard, actor in enumerate(actors)
    ]
    for reference in streams[0]:
        show(ray.get(reference))
    for stream in streams[1:]:
        for reference in stream:
            ray.get(reference)


def _build(actors: list[Any], names: tuple[str, ...]) -> Iterator[str]:
    """Decompose the targets of a group, one at a time on each builder; yields those that are written.

    The moments of a target go straight from the other builders to the one that decomposes it.
    """
    waiting: deque[str] = deque(names)
    busy: dict[Any, tuple[Any, str]] = {}
    idle = deque(actors)
    while waiting or busy:
        while waiting and idle:
            name, owner = waiting.popleft(), idle.popleft()
            parts = [actor.part.remote(name) for actor in actors if actor is not owner]
            busy[owner.build.remote(name, *parts)] = (owner, name)
        ready, _ = ray.wait(list(busy), num_returns=1)
        for reference in ready:
            ray.get(reference)
            owner, name = busy.pop(reference)
            idle.append(owner)
            yield name
