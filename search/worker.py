"""The one worker beside a search: it refines a trial, and measures what a replica does not.

A replica answers for allocations; this one answers for the factors of a file too (`actors.refiner`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from actors.harness_results import HarnessScore, HarnessSpec
from actors.refinement import FOLDER, RefinementSpec, RefinementStep
from actors.replica import Refiner
from actors.types import Allocation, RankfrontError, ReplicaSpec, Score, ScoringError
from search.failures import cause_of, process_died
from search.folder import StudyFolder
from search.pool import Machine, thread_environment


class Worker(Protocol):
    """Refines, scores and asks the harness: `actors.refiner.Refiner`, or one in another process.

    A `file` names refined factors; None are the study's.
    """

    def refine(
        self, allocation: Allocation, spec: RefinementSpec, facts: Mapping[str, Any]
    ) -> Iterator[RefinementStep]: ...

    def score(self, allocation: Allocation, split: str, file: str | None) -> Score: ...

    def ask(self, allocation: Allocation, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore: ...


class _Remote:
    """One in an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def refine(
        self, allocation: Allocation, spec: RefinementSpec, facts: Mapping[str, Any]
    ) -> Iterator[RefinementStep]:
        method = self._actor.refine.options(num_returns="streaming")
        for reference in method.remote(allocation, spec, facts):
            yield ray.get(reference)

    def score(self, allocation: Allocation, split: str, file: str | None) -> Score:
        return ray.get(self._actor.score.remote(allocation, split, file))  # type: ignore[no-any-return]

    def ask(self, allocation: Allocation, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore:
        """Raises ScoringError where the model has no valid answer, as the worker does."""
        try:
            return ray.get(self._actor.ask.remote(allocation, file, spec, task))  # type: ignore[no-any-return]
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, ScoringError):
                raise cause from error
            raise


@contextlib.contextmanager
def refiner(folder: StudyFolder, machine: Machine) -> Iterator[Worker]:
    """A worker with all of a node's cores or a GPU, its files in the study's folder; gone at the end."""
    threads = folder.config.replicas.threads
    count = machine.cores if threads == "auto" else threads
    replica = ReplicaSpec("refiner", folder.config.preparation(), folder.prepared, count)
    options = {
        "num_cpus": 1,
        "num_gpus": min(1, machine.gpus),
        "runtime_env": thread_environment(count),
    }
    actor = ray.remote(Refiner).options(**options).remote(replica, str((folder.path / FOLDER).resolve()))
    try:
        yield _Remote(actor)
    finally:
        ray.kill(actor)


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
