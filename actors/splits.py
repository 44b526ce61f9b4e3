"""One split of a study: its text, further texts, tasks and bias sets, cut and packed, ready to score."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.bias import load_comparisons
from actors.reasoning import PackedTask, pack
from actors.sentences import PackedSentences, pack_sentences
from actors.tasks import load_examples, task_of
from actors.text import (
    ScoredText,
    TooShortError,
    between,
    corpus_part,
    fingerprint_windows,
    text_name,
    text_parts,
    windows,
)
from actors.types import CHOICE, PreparationSpec, RankfrontError, ScoringSpec, TaskSource, TextSource, digest


@dataclass(frozen=True)
class SplitData:
    """One split: its text and further ones by name, in windows, packed tasks, and their fingerprint."""

    split: str
    text: ScoredText
    corpora: Mapping[str, ScoredText]
    tasks: tuple[PackedTask, ...]
    bias: tuple[PackedSentences, ...]
    fingerprint: str

    @property
    def windows(self) -> torch.Tensor:
        """Of the text: (windows, window)."""
        return self.text.windows

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass over the split."""
        texts = (self.text, *self.corpora.values())
        packed = (*self.tasks, *self.bias)
        return sum(text.windows.numel() for text in texts) + sum(task.tokens for task in packed)


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
    text = _windowed(scoring, _name(scoring), scoring.text, parts[split], tokenizer, scoring.tokens[split])
    corpora = {
        corpus.name: _windowed(
            scoring,
            corpus.name,
            corpus.text,
            corpus_part(corpus.text, scoring.search_fraction, split),
            tokenizer,
            corpus.tokens[split],
        )
        for corpus in scoring.corpora
    }
    tasks = tuple(_load_task(scoring, source, split, tokenizer, limit) for source in scoring.tasks)
    bias = tuple(_load_bias(scoring, source, split, tokenizer, limit) for source in scoring.bias)
    asked: list[Any] = [
        [task.name, [[e.contexts, e.continuations, e.gold] for e in task.examples]] for task in tasks
    ]
    if scoring.kl_top_k is not None:
        asked.append(["kl", scoring.kl_top_k])
    if scoring.step != scoring.window:
        asked.append(["stride", scoring.step])
    asked += [["corpus", name, fingerprint_windows(corpus.windows)] for name, corpus in corpora.items()]
    asked += [["bias", one.name, [[c.sentences, c.term] for c in one.comparisons]] for one in bias]
    return SplitData(
        split=split,
        text=text,
        corpora=corpora,
        tasks=tasks,
        bias=bias,
        fingerprint=digest([split, fingerprint_windows(text.windows), asked]),
    )


def load_choice(spec: PreparationSpec, tokenizer: Any) -> SplitData | None:
    """The text of the search part behind that of the search split; None where no window of it is left."""
    scoring = spec.scoring
    documents = text_parts(spec.calibration, scoring, spec.calibration_fraction)["search"]
    cap, skip, text = scoring.tokens[CHOICE], scoring.tokens["search"], scoring.text
    try:
        ids = windows(documents, between(text), tokenizer, scoring.window, cap, scoring.step, skip)
    except TooShortError:
        return None
    name = text_name(_name(scoring), scoring.window, scoring.step, text.join)
    found = ScoredText(name, ids, scoring.step)
    return SplitData(CHOICE, found, {}, (), (), digest([CHOICE, fingerprint_windows(ids)]))


def _name(scoring: ScoringSpec) -> str:
    """What the text is called."""
    return scoring.text.source.rsplit("/", 1)[-1]


def _windowed(
    scoring: ScoringSpec, name: str, text: TextSource, documents: list[str], tokenizer: Any, tokens: int
) -> ScoredText:
    """Documents of one text as they are scored, at most `tokens` of their tokens.

    Raises:
        RankfrontError: they are too short for one window; names the text.
    """
    try:
        ids = windows(documents, between(text), tokenizer, scoring.window, tokens, scoring.step)
    except RankfrontError as error:
        raise RankfrontError(f"{text.source}: {error}") from error
    return ScoredText(text_name(name, scoring.window, scoring.step, text.join), ids, scoring.step)


def _load_task(
    scoring: ScoringSpec, source: TaskSource, split: str, tokenizer: Any, limit: int | None
) -> PackedTask:
    examples = load_examples(source)
    normalised = task_of(source.name, source.format).normalised
    chosen = _share(scoring, source, split, len(examples))
    return pack(source.name, normalised, [examples[i] for i in chosen], tokenizer, limit)


def _load_bias(
    scoring: ScoringSpec, source: TaskSource, split: str, tokenizer: Any, limit: int | None
) -> PackedSentences:
    rows = load_comparisons(source)
    chosen = _share(scoring, source, split, len(rows))
    return pack_sentences(source.name, [rows[i] for i in chosen], tokenizer, limit)


def _share(scoring: ScoringSpec, source: TaskSource, split: str, count: int) -> list[int]:
    """The split's share of `count` examples: a seeded shuffle, the first part searches, the rest tests."""
    order = list(range(count))
    random.Random(f"{scoring.seed}/{source.name}").shuffle(order)
    border = max(1, round(scoring.search_fraction * len(order)))
    chosen = order[:border] if split == "search" else order[border:]
    if not chosen:
        raise RankfrontError(f"{source.source}: {source.name} leaves no example for the {split} split")
    return chosen[: scoring.examples[split]]
