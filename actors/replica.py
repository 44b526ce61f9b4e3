"""The Ray actors, thin: preparers that run once, replicas that live for the whole search.

Nothing heavy is imported until an actor starts, so the driver can name these classes without torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.harness_results import HarnessScore, HarnessSpec
from actors.helper import Helper
from actors.refinement import FEWER_NUMBERS, RefinementSpec, RefinementStep
from actors.shared_folder import Mark
from actors.types import (
    Allocation,
    BuildPlan,
    Foreseen,
    Place,
    PreparationSpec,
    Prepared,
    Progress,
    ReplicaSpec,
    Rival,
    Score,
    ShortOfMemoryError,
)

if TYPE_CHECKING:
    from torch import Tensor

    from actors.moments import Moments

T = TypeVar("T")

FEWER_TOKENS = "; a smaller scoring.batch_tokens takes less"
"""What an error says of a score that memory did not suffice for."""

LESS_MEMORY = (
    "; refine.checkpointed: true and a smaller scoring.batch_tokens take less for activations. "
    f"{FEWER_NUMBERS}"
)
"""What an error says of a refinement that memory did not suffice for."""


def quieten() -> None:
    """Keep library progress bars and advice out of a worker's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Read when `datasets` is imported, which JSON sources never need.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class Preparer:
    """One of the builders of a preparation; see `actors.builder.Builder`, whose methods these are."""

    def __init__(self, spec: PreparationSpec, threads: int) -> None:
        quieten()
        from actors.builder import Builder

        self._builder = Builder(spec, threads)

    def inspect(self) -> Iterator[str | Mapping[str, str] | Foreseen | Prepared | BuildPlan]:
        yield from self._builder.inspect()

    def mark(self) -> Mark:
        return self._builder.mark()

    def unmark(self, mark: Mark) -> None:
        self._builder.unmark(mark)

    def blind(self, mark: Mark) -> str | None:
        return self._builder.blind(mark)

    def collect(self, plan: BuildPlan, group: int, shard: int, shards: int) -> Iterator[Progress]:
        yield from self._builder.collect(plan, group, shard, shards)

    def part(self, name: str) -> Moments:
        return self._builder.part(name)

    def build(self, name: str, *others: Moments) -> None:
        self._builder.build(name, *others)

    def finish(self) -> Prepared:
        return self._builder.finish()


class Replica:
    """Holds one model and answers scores, one at a time."""

    def __init__(self, spec: ReplicaSpec) -> None:
        quieten()
        import torch

        from actors.devices import keep_to_share
        from actors.scoring import Scorer

        torch.set_num_threads(spec.threads)
        keep_to_share(spec)
        self._scorer = Scorer(spec)

    def ready(self) -> Place:
        """Answers when the model is loaded."""
        return Place(socket.gethostname(), os.getpid())

    def score(self, allocation: Allocation, split: str, rivals: tuple[Rival, ...]) -> Score:
        """Raises ScoringError where there is no valid score, ShortOfMemoryError where memory did not suffice
        for one: the replica stays."""
        return _scoring(lambda: self._scorer.score(allocation, split, rivals), split)


def _in_memory(work: Callable[[], T], where: str, hint: str = "") -> T:
    """What `work` returns; raises ShortOfMemoryError, what it took is free, where memory did not suffice."""
    import torch

    try:
        return work()
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
    # Past the handler: what the error's frames held is free by now. Torch's own class does not travel, a
    # driver would import torch to read it.
    torch.cuda.empty_cache()
    raise ShortOfMemoryError(f"out of memory{where}: {reason}{hint}")


def _scoring(work: Callable[[], T], split: str) -> T:
    """The same of a score, with what would take less."""
    return _in_memory(work, f" on the {split} split", FEWER_TOKENS)


def _refining(work: Callable[[], T]) -> T:
    """The same of a refinement."""
    return _in_memory(work, " while refining", LESS_MEMORY)


class Refiner:
    """Refines allocations and measures them, refined or not; see `actors.refiner.Refiner`.

    Want of memory is a ShortOfMemoryError; what it took is free again.
    """

    def __init__(self, spec: ReplicaSpec, folder: str) -> None:
        quieten()
        import torch

        from actors.refiner import Refiner

        torch.set_num_threads(spec.threads)
        self._refiner = Refiner(spec, Path(folder))

    def refine(
        self,
        allocation: Allocation,
        spec: RefinementSpec,
        facts: Mapping[str, Any],
        helpers: Sequence[Helper],
    ) -> Iterator[RefinementStep]:
        steps = self._refiner.refine(allocation, spec, facts, helpers)
        while (step := _refining(lambda: next(steps, None))) is not None:
            yield step

    def help(self, allocation: Allocation, spec: RefinementSpec) -> None:
        _refining(lambda: self._refiner.help(allocation, spec))

    def receive(self, number: int, values: Tensor) -> None:
        _refining(lambda: self._refiner.helping.receive(number, values))

    def share(self, step: int, place: int, count: int) -> float:
        return _refining(lambda: self._refiner.helping.share(step, place, count))

    def piece(self, number: int) -> Tensor:
        return _refining(lambda: self._refiner.helping.piece(number))

    def find(self, file: str) -> None:
        self._refiner.find(file)

    def score(self, allocation: Allocation, split: str, file: str | None) -> Score:
        return _scoring(lambda: self._refiner.score(allocation, split, file), split)

    def ask(self, allocation: Allocation, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore:
        return _in_memory(lambda: self._refiner.ask(allocation, file, spec, task), f" on {task}")
