"""Run a preparation on the cluster: one actor fixes text and targets, all of them build the factors."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from actors.replica import Preparer
from actors.shared_folder import SHARE, Mark, sees
from actors.types import BuildPlan, Foreseen, PreparationSpec, Prepared, Progress, RankfrontError
from search.cluster import Machine, actor_options, threads_each
from search.failures import cause_of, process_died

# Activations are megabytes each and of many sizes: kept in the C library's heap they leave holes that add
# up to hundreds of MB beyond the memory budget, mapped one by one they go back when they are freed.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}

Step = str | Mapping[str, str] | Foreseen | Progress | Prepared


def _no_objection(prepared: Prepared) -> None:
    pass


def prepare(
    spec: PreparationSpec,
    machine: Machine,
    builders: int,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
    check: Callable[[Mapping[str, str]], None],
    foresee: Callable[[Prepared], Any] = _no_objection,
) -> Prepared:
    """Prepare in actors of their own, gone when it ends or is refused: the fingerprints by `check`, or, where
    factors are to be built, what will be prepared by `foresee`.

    A build whose processes die is begun again, from the targets it has, as long as it gets further.

    Raises:
        RankfrontError: what the preparation, `check` or `foresee` says is wrong, that its processes died,
            that so many builders never run at once, or that they or the driver do not see one folder.
    """
    while True:
        progressed = False
        try:
            with closing(_steps(spec, machine, builders)) as steps:
                for step in steps:
                    if isinstance(step, Prepared):
                        return step
                    if isinstance(step, Progress):
                        progressed = progressed or step.step == "decomposing"
                        show(step)
                    elif isinstance(step, str):
                        say(step)
                    elif isinstance(step, Foreseen):
                        foresee(step.prepared)
                    else:
                        check(step)
        except RayError as error:
            if not process_died(error):
                raise cause_of(error) from error
            if not progressed:
                raise RankfrontError(f"the preparation's process died (out of memory?): {error}") from error
            say("a process of the preparation died; beginning again with what it left")


def builder_count(builders: int | Literal["auto"], machine: Machine) -> int:
    """How many builders `calibration.builders` asks for."""
    if builders != "auto":
        return builders
    return max(1, places(machine)) if machine.gpus else 1


def places(machine: Machine) -> int:
    """How many builders run at once: each takes a CPU, and a GPU where there are any."""
    return min(machine.cores, machine.gpus) if machine.gpus else machine.cores


def _shortage(machine: Machine, builders: int) -> str | None:
    """Why so many builders do not run at once as things are; None where they do.

    Raises:
        RankfrontError: they never will, on a machine that stays as it is.
    """
    room = places(machine)
    if builders <= room:
        return None
    each, there = "a CPU", f"{machine.cores} CPUs"
    if machine.gpus:
        each, there = "a CPU and a GPU", f"{there} and {machine.gpus} GPUs"
    if not machine.grows:
        raise RankfrontError(
            f"calibration.builders: {builders} never run at once: each needs {each} and there are {there}; "
            f"{room} at most, or auto"
        )
    return (
        f"calibration.builders: {builders} need {each} each and there are {there}: waiting for the cluster "
        f"to grow ({room} would begin at once)"
    )


def _steps(spec: PreparationSpec, machine: Machine, builders: int) -> Generator[Step, None, None]:
    """One attempt: lines and progress, before the long work the fingerprints and what is foreseen, at last
    what was prepared."""
    actors = [_start(spec, machine, builders)]
    try:
        for item in _stream(actors[0].inspect):
            if isinstance(item, BuildPlan):
                plan = item
            else:
                yield item
            if isinstance(item, Prepared):
                return
        shards = max(1, min(builders, plan.windows))  # the text may be shorter than was asked for
        shortage = _shortage(machine, shards)
        if shortage is not None:
            yield shortage
        actors += [_start(spec, machine, builders) for _ in range(shards - 1)]
        _refuse_unshared(spec, actors)
        total = sum(map(len, plan.groups))
        done = 0
        for number, group in enumerate(plan.groups):
            yield from _collect(actors, plan, number)
            for _ in _build(actors, group):
                done += 1
                yield Progress("decomposing", done, total)
        prepared: Prepared = ray.get(actors[0].finish.remote())
        yield f"factor store: built, {prepared.factor_store}"
        yield prepared
    finally:
        for actor in actors:
            ray.kill(actor)


def _refuse_unshared(spec: PreparationSpec, actors: list[Any]) -> None:
    """See that all builders write into one folder, and that the driver will read there what they wrote.

    Raises:
        RankfrontError: a node does not see what the first builder's writes; says which, and what is right.
    """
    mark: Mark = ray.get(actors[0].mark.remote())
    answers = ray.get([actor.blind.remote(mark) for actor in actors[1:]])
    blind = sorted({f"node {node}" for node in answers if node is not None})
    # Factors at a URL are copied to the driver's machine, when they are wanted there.
    if spec.shared is None and not sees(mark.file):
        blind.append(f"the driver's machine {platform.node()}")
    if not blind:
        return
    ray.get(actors[0].unmark.remote(mark))
    raise RankfrontError(
        f"factor store: what node {mark.node} writes in {mark.file.parent.parent} is not seen by "
        f"{', '.join(blind)} under that path; {SHARE}"
    )


def _start(spec: PreparationSpec, machine: Machine, builders: int) -> Any:
    gpus = min(1, machine.gpus)
    threads = threads_each(machine, builders, gpus)
    options = actor_options(machine, threads, gpus)
    options["runtime_env"]["env_vars"].update(MEMORY_ENVIRONMENT)
    return ray.remote(Preparer).options(**options).remote(spec, threads)


def _stream(method: Any, *arguments: Any) -> Iterator[Any]:
    for reference in method.options(num_returns="streaming").remote(*arguments):
        yield ray.get(reference)


def _collect(actors: list[Any], plan: BuildPlan, group: int) -> Iterator[Progress]:
    """One pass over the text, a share for each builder; the first one's progress stands for all."""
    streams = [
        actor.collect.options(num_returns="streaming").remote(plan, group, shard, len(actors))
        for shard, actor in enumerate(actors)
    ]
    for reference in streams[0]:
        yield ray.get(reference)
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
