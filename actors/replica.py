"""The Ray actors, thin: a preparer that runs once, replicas that live for the whole search.

Nothing heavy is imported until an actor starts, so the driver can name these classes without torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from actors.types import Allocation, PreparationSpec, Prepared, ReplicaSpec, Score


def quieten() -> None:
    """Keep library progress bars and advice out of a worker's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class Preparer:
    """Runs a preparation and streams its progress."""

    def prepare(self, spec: PreparationSpec, threads: int) -> Iterator[str | Mapping[str, str] | Prepared]:
        quieten()
        from actors.preparation import prepare

        yield from prepare(spec, threads)


class Replica:
    """Holds one model and answers scores, one at a time."""

    def __init__(self, spec: ReplicaSpec) -> None:
        quieten()
        import torch

        from actors.scoring import Scorer

        torch.set_num_threads(spec.threads)
        self._name = spec.name
        self._scorer = Scorer(spec)

    def ready(self) -> str:
        return self._name

    def score(self, allocation: Allocation, split: str) -> Score:
        return self._scorer.score(allocation, split)
