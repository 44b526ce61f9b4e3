"""The worker beside a search: it refines a trial, and measures what a replica does not.

A replica answers for allocations; this one answers for the factors of a file too (`actors.refiner`). Others
may help it refine (`actors.team`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from actors.harness_results import HarnessScore, HarnessSpec
from actors.helper import ActorHelper
from actors.refinement import FOLDER, REFIT, RefinementSpec, RefinementStep, windows_of
from actors.replica import Refiner
from actors.types import Allocation, RankfrontError, ReplicaSpec, Score, ScoringError, ShortOfMemoryError
from search.cluster import Machine, actor_options, cluster_nodes, threads_each
from search.config import Config
from search.failures import cause_of, process_died
from search.folder import StudyFolder
from search.gpus import gpus_awaited, places_by_gpu, worker_gpus
from search.preparing import places


class Worker(Protocol):
    """Refines, scores and asks the harness: `actors.refiner.Refiner`, or one in another process.

    A `file` names refined factors; None are the study's.
    """

    def refine(
        self, allocation: Allocation, spec: RefinementSpec, facts: Mapping[str, Any]
    ) -> Iterator[RefinementStep]: ...

    def find(self, file: str) -> None:
        """Raises RankfrontError where it does not see a file of the driver's in its folder."""
        ...

    def score(self, allocation: Allocation, split: str, file: str | None) -> Score: ...

    def ask(self, allocation: Allocation, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore: ...

    def close(self) -> None:
        """End its processes; what it is asked next starts new ones."""
        ...


# Seconds that helpers have to answer before a refinement: of a dead one Ray tells at once, one that is still
# loading its model is not waited for.
PING = 1.0


class _Remote:
    """One in an actor, and those that help it: they start with the first refinement by steps.

    Where the one dies, all are started anew for what is asked next. Helpers that died, or that it ended, are
    started anew at the next refinement.
    """

    def __init__(self, start: Callable[[int], Any], workers: int) -> None:
        """`start` starts an actor by its place among the `workers`."""
        self._start, self._workers = start, workers
        self._actors = [start(0)]

    @contextlib.contextmanager
    def _asked(self) -> Iterator[Any]:
        """The actor, for one request."""
        if not self._actors:
            self._actors.append(self._start(0))
        try:
            yield self._actors[0]
        except RayError as error:
            if process_died(error):
                self.close()
            raise

    def refine(
        self, allocation: Allocation, spec: RefinementSpec, facts: Mapping[str, Any]
    ) -> Iterator[RefinementStep]:
        with self._asked() as actor:
            if spec.method != REFIT:
                self._replace_dead_helpers()
                self._actors += [self._start(place) for place in range(len(self._actors), self._workers)]
            method = actor.refine.options(num_returns="streaming")
            helpers = [ActorHelper(each) for each in self._actors[1:]]
            for reference in method.remote(allocation, spec, facts, helpers):
                yield ray.get(reference)

    def find(self, file: str) -> None:
        with self._asked() as actor:
            ray.get(actor.find.remote(file))

    def _replace_dead_helpers(self) -> None:
        places = {actor.__ray_ready__.remote(): place for place, actor in enumerate(self._actors) if place}
        if not places:
            return
        answers, _ = ray.wait(list(places), num_returns=len(places), timeout=PING)
        for answer in answers:
            try:
                ray.get(answer)
            except RayError:
                self._actors[places[answer]] = self._start(places[answer])

    def score(self, allocation: Allocation, split: str, file: str | None) -> Score:
        with self._asked() as actor:
            return ray.get(actor.score.remote(allocation, split, file))  # type: ignore[no-any-return]

    def ask(self, allocation: Allocation, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore:
        """Raises ScoringError or ShortOfMemoryError where there is no valid answer, as the worker does."""
        try:
            with self._asked() as actor:
                return ray.get(actor.ask.remote(allocation, file, spec, task))  # type: ignore[no-any-return]
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, ScoringError | ShortOfMemoryError):
                raise cause from error
            raise

    def close(self) -> None:
        """End the processes there are."""
        while self._actors:
            ray.kill(self._actors.pop())


def worker_count(config: Config, machine: Machine) -> int:
    """How many workers `refine.workers` asks for: no more than a step has windows. `auto` is one for each GPU
    or, where they are yet to come, for each that the replicas wait for.

    Raises:
        RankfrontError: so many never run at once, on a machine that stays as it is.
    """
    section, room = config.refine, places(machine)
    windows = windows_of(section.tokens, config.calibration.window)
    if section.method == REFIT:
        return 1
    if section.workers == "auto":
        gpus = room if machine.gpus else gpus_awaited(config.replicas, machine)
        return max(1, min(gpus, windows))
    if section.workers > room and not machine.grows:
        each = "a CPU and a GPU" if machine.gpus else "a CPU"
        raise RankfrontError(
            f"refine.workers: {section.workers} never run at once: each needs {each}; {room} at most, or auto"
        )
    return section.workers


@contextlib.contextmanager
def refiner(
    folder: StudyFolder, machine: Machine, workers: int = 1, say: Callable[[str], None] = lambda line: None
) -> Iterator[Worker]:
    """A worker with the cores of one node or a GPU, its files in the study's folder; gone at the end.

    Where `workers` are to share a refinement, those on one node share its cores. That a node with a GPU is
    waited for is told to `say`.
    """
    if machine.grows:  # nodes may have come since it was joined
        machine = replace(machine, rooms=tuple(cluster_nodes().rooms.values()))
    section = folder.config.replicas
    gpus = worker_gpus(section, machine)
    if gpus and not places_by_gpu(machine, gpus):
        say("the worker takes a GPU, and no node has one: waiting for a node that has")
    count = threads_each(machine, workers, gpus) if section.threads == "auto" else section.threads
    files = str((folder.path / FOLDER).resolve())
    options = actor_options(machine, count, gpus)

    def start(place: int) -> Any:
        name = f"refiner-{place}" if place else "refiner"
        replica = ReplicaSpec(name, folder.config.preparation(), folder.prepared, count)
        return ray.remote(Refiner).options(**options).remote(replica, files)

    remote = _Remote(start, workers)
    try:
        yield remote
    finally:
        remote.close()


@contextlib.contextmanager
def mistakes_named() -> Iterator[None]:
    """Ray's errors as the user's mistakes they are, or as a process that died."""
    try:
        yield
    except RayError as error:
        if process_died(error):
            raise RankfrontError(
                f"the worker's process died (out of memory?); the same command goes on where it was: {error}"
            ) from error
        raise cause_of(error) from error
