"""One split's text and tasks, ready to score; and the scorer that holds the resident model."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actors.divergence import DenseTop, dense_top
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.models import load_model, load_tokenizer
from actors.perplexity import kl_score, text_score, window_losses
from actors.reasoning import PackedTask, pack, score_task
from actors.tasks import load_examples, task_of
from actors.text import fingerprint_windows, text_parts, windows
from actors.types import (
    Allocation,
    PreparationSpec,
    RankfrontError,
    ReplicaSpec,
    Score,
    ScoringSpec,
    TaskSource,
    digest,
)


@dataclass(frozen=True)
class SplitData:
    """Windows (windows, window) and packed tasks of one split, and their fingerprint."""

    split: str
    name: str
    windows: torch.Tensor
    tasks: tuple[PackedTask, ...]
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass over the split."""
        return self.windows.numel() + sum(task.tokens for task in self.tasks)


def load_split(spec: PreparationSpec, split: str, tokenizer: Any, limit: int | None) -> SplitData:
    """The text and the tasks of one split; `limit` is the model's context length, if it has one.

    Raises:
        RankfrontError: text too short, a task's table unreadable, a window or an example too long, more dense
            log-probabilities asked for than their memory holds.
    """
    scoring = spec.scoring
    problem = scoring.kl_problem(split)
    if problem is not None:
        raise RankfrontError(f"scoring.{problem}")
    if limit is not None and scoring.window > limit:
        raise RankfrontError(f"scoring.window: {scoring.window} tokens, the model reads {limit}")
    parts = text_parts(spec.calibration, scoring, spec.calibration_fraction)
    ids = windows(parts[split], scoring.text.join, tokenizer, scoring.window, scoring.tokens[split])
    tasks = tuple(_load_task(scoring, source, split, tokenizer, limit) for source in scoring.tasks)
    asked: list[Any] = [
        [task.name, [[e.contexts, e.continuations, e.gold] for e in task.examples]] for task in tasks
    ]
    if scoring.kl_top_k is not None:
        asked.append(["kl", scoring.kl_top_k])
    return SplitData(
        split=split,
        name=f"{scoring.text.source.rsplit('/', 1)[-1]}@{scoring.window}",
        windows=ids,
        tasks=tasks,
        fingerprint=digest([split, fingerprint_windows(ids), asked]),
    )


def _load_task(
    scoring: ScoringSpec, source: TaskSource, split: str, tokenizer: Any, limit: int | None
) -> PackedTask:
    """The split's share of one task: a seeded shuffle, the first part searches, the rest tests."""
    examples = load_examples(source)
    order = list(range(len(examples)))
    random.Random(f"{scoring.seed}/{source.name}").shuffle(order)
    border = max(1, round(scoring.search_fraction * len(order)))
    chosen = order[:border] if split == "search" else order[border:]
    if not chosen:
        raise RankfrontError(f"{source.source}: {source.name} leaves no example for the {split} split")
    chosen = chosen[: scoring.examples[split]]
    normalised = task_of(source.name, source.format).normalised
    return pack(source.name, normalised, [examples[i] for i in chosen], tokenizer, limit)


def score_split(
    model: nn.Module, data: SplitData, batch_tokens: int, replica: str, dense: DenseTop | None = None
) -> Score:
    """Score the model as it stands; the values are checked before anyone sees them.

    `dense` is what is kept of the dense model on the split's windows; without it there is no divergence.

    Raises:
        ScoringError: a value that cannot be a score, naming it.
    """
    start = time.perf_counter()
    losses = window_losses(model, data.windows, batch_tokens, data.name, dense)
    predicted = data.windows.shape[1] - 1
    tasks = {task.name: score_task(model, task) for task in data.tasks}
    seconds = time.perf_counter() - start
    score = Score(
        data.split,
        text_score(losses.nats, predicted, data.name),
        tasks,
        forward_tokens=data.tokens,
        seconds=seconds,
        replica=replica,
        kl=kl_score(losses.kl, predicted, dense.top_k)
        if dense is not None and losses.kl is not None
        else None,
    )
    score.check()
    return score


class Scorer:
    """A resident model, its factor store and the splits asked for so far."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        preparation, prepared = spec.preparation, spec.prepared
        self.tokenizer = load_tokenizer(prepared.model_folder, preparation.model)
        self.model = load_model(prepared.model_folder, preparation.model, device)
        self.limit = getattr(self.model.config, "max_position_embeddings", None)
        self.store = FactorStore(prepared.factor_store, device)
        self.trial_model = TrialModel(self.model, prepared.targets, self.store)
        self._splits: dict[str, SplitData] = {}
        self._dense: dict[str, DenseTop] = {}
        self._dense_top("search")

    def split(self, name: str) -> SplitData:
        """The data of a split, loaded at its first use."""
        if name not in self._splits:
            self._splits[name] = load_split(self._spec.preparation, name, self.tokenizer, self.limit)
        return self._splits[name]

    def _dense_top(self, split: str) -> DenseTop | None:
        """What is kept of the dense model on a split, from one pass at its first use; None if not asked."""
        data, scoring = self.split(split), self._spec.preparation.scoring
        if scoring.kl_top_k is None:
            return None
        if split not in self._dense:
            self.trial_model.install(Allocation.dense(self._spec.prepared.targets), data.tokens)
            self._dense[split] = dense_top(
                self.model, data.windows, scoring.batch_tokens, scoring.kl_top_k, data.name
            )
        return self._dense[split]

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """Install the allocation and score it.

        Raises:
            ScoringError: no valid score.
        """
        data, dense = self.split(split), self._dense_top(split)
        start = time.perf_counter()
        self.trial_model.install(allocation, data.tokens)
        installed = time.perf_counter() - start
        batch = self._spec.preparation.scoring.batch_tokens
        score = score_split(self.model, data, batch, self._spec.name, dense)
        return Score(**{**score.__dict__, "seconds": score.seconds + installed})
