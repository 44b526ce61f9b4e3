"""Scores of the model as it stands, and the scorer that holds the resident model."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

from torch import nn

from actors.busy import Busy
from actors.devices import devices_of
from actors.divergence import DenseTop, dense_top
from actors.factors import FactorStore
from actors.low_rank import TrialModel
from actors.models import context_limit, load_model, load_tokenizer
from actors.perplexity import kl_score, text_score, window_losses
from actors.prefix import PrefixCache
from actors.reasoning import score_task
from actors.relay import InTurn, conduct
from actors.resident import resident
from actors.sentences import score_sentences
from actors.spans import spread
from actors.splits import SplitData, load_choice, load_split
from actors.stages import Judge
from actors.text import ScoredText
from actors.types import CHOICE, Allocation, RankfrontError, ReplicaSpec, Rival, Score, TextScore


def score_split(
    model: nn.Module,
    data: SplitData,
    batch_tokens: int,
    replica: str,
    dense: DenseTop | None = None,
    judge: Judge | None = None,
) -> Score:
    """Score the model as it stands; the values are checked before anyone sees them.

    `dense` is what is kept of the dense model on the split's windows; without it there is no divergence.
    Where a `judge` stops the model, the score is partial and says so.

    Raises:
        ScoringError: a value that cannot be a score, naming it.
    """
    start = time.perf_counter()
    text = data.text
    losses = window_losses(model, text.windows, batch_tokens, text.name, dense, text.scored, judge)
    stopped_by = judge.stopped_by if judge is not None else None
    whole = stopped_by is None
    scored = text.scored[: len(losses.nats)]
    corpora = {
        name: _corpus_score(model, corpus, batch_tokens) for name, corpus in data.corpora.items() if whole
    }
    tasks = {task.name: score_task(model, task) for task in data.tasks if whole}
    bias = {one.name: score_sentences(model, one) for one in data.bias if whole}
    seconds = time.perf_counter() - start
    score = Score(
        data.split,
        text_score(losses.nats, scored, text.name),
        tasks,
        forward_tokens=data.tokens if whole else len(losses.nats) * data.windows.shape[1],
        seconds=seconds,
        replica=replica,
        kl=kl_score(losses.kl, scored, dense.top_k) if dense is not None and losses.kl is not None else None,
        corpora=corpora,
        bias=bias,
        stopped_by=stopped_by,
    )
    score.check()
    return score


def _corpus_score(model: nn.Module, text: ScoredText, batch_tokens: int) -> TextScore:
    losses = window_losses(model, text.windows, batch_tokens, text.name, scored=text.scored)
    return text_score(losses.nats, text.scored, text.name)


class Scorer:
    """A resident model, its factor store and the splits asked for so far."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec = replace(spec, prepared=resident(spec.preparation, spec.prepared))
        devices = devices_of(spec)
        preparation, prepared = spec.preparation, spec.prepared
        self.tokenizer = load_tokenizer(prepared.model_folder, preparation.model)
        first = devices[0] if len(devices) == 1 else "cpu"  # until it is spread
        self.model = load_model(prepared.model_folder, preparation.model, first)
        self.limit = context_limit(self.model)
        self.store = FactorStore(prepared.factor_store, devices[0])
        # A single CPU is busy while it scores: that is `seconds`.
        self._busy, self._measured = Busy(devices), devices != ("cpu",)
        if len(devices) > 1:
            spread(self.model, prepared.targets, self.store, devices, self._busy)
        elif self._measured:
            conduct(self.model, InTurn(self._busy))
        self.trial_model = TrialModel(self.model, prepared.targets, self.store)
        self._splits: dict[str, SplitData] = {}
        self._dense: dict[str, DenseTop] = {}
        scoring, dense = preparation.scoring, Allocation.dense(prepared.targets)
        self.prefix = PrefixCache(
            self.model,
            prepared.targets,
            dense,
            self.split("search").tokens,
            scoring.prefix_memory_mb,
            scoring.prefix_stride,
        )
        self._dense_top("search")

    def split(self, name: str) -> SplitData:
        """The data of a split, loaded at its first use."""
        if name not in self._splits:
            self._splits[name] = self._loaded(name)
        return self._splits[name]

    def _loaded(self, name: str) -> SplitData:
        """A split as the study was prepared with it.

        Raises:
            RankfrontError: it is another one by now, or here.
        """
        spec = self._spec.preparation
        if name == CHOICE:
            found = load_choice(spec, self.tokenizer)
            if found is None:
                raise RankfrontError(f"{spec.scoring.text.source}: no text is left to choose by")
        else:
            found = load_split(spec, name, self.tokenizer, self.limit)
        if found.fingerprint != self._spec.prepared.fingerprints.get(name, found.fingerprint):
            texts = [spec.scoring.text.source, *(corpus.text.source for corpus in spec.scoring.corpora)]
            sets = [source.source for source in (*spec.scoring.tasks, *spec.scoring.bias)]
            named = ", ".join(dict.fromkeys([*texts, *sets]))
            raise RankfrontError(f"{named}: no longer the {name} split that the study was prepared with")
        return found

    def _dense_top(self, split: str) -> DenseTop | None:
        """What is kept of the dense model on a split, from one pass at its first use; None if not asked."""
        data, scoring = self.split(split), self._spec.preparation.scoring
        if scoring.kl_top_k is None or split == CHOICE:
            return None
        if split not in self._dense:
            allocation = Allocation.dense(self._spec.prepared.targets)
            self.trial_model.install(allocation, data.tokens)
            with self._reusing(allocation, split):
                self._dense[split] = dense_top(
                    self.model, data.windows, scoring.batch_tokens, scoring.kl_top_k, data.text.name
                )
        return self._dense[split]

    def _reusing(self, allocation: Allocation, split: str) -> contextlib.AbstractContextManager[None]:
        """Prefix reuse for trials, which see the search split: the test split sees a model once."""
        if split != "search" or not self._spec.preparation.scoring.prefix_memory_mb:
            return contextlib.nullcontext()
        return self.prefix.reused(allocation)

    def score(self, allocation: Allocation, split: str = "search", rivals: tuple[Rival, ...] = ()) -> Score:
        """Install the allocation and score it, on the search split no further than a rival lets it.

        Raises:
            ScoringError: no valid score.
        """
        data, dense = self.split(split), self._dense_top(split)
        self._busy.take()  # of what came before, such as a score that failed
        start = time.perf_counter()
        self.trial_model.install(allocation, data.tokens)
        installed = time.perf_counter() - start
        scoring = self._spec.preparation.scoring
        judge = Judge(scoring.stages, scoring.window, rivals) if split == "search" else None
        with self._reusing(allocation, split):
            score = score_split(self.model, data, scoring.batch_tokens, self._spec.name, dense, judge)
        busy = self._busy.take() if self._measured else ()
        return replace(score, seconds=score.seconds + installed, busy=busy)
