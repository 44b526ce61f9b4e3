"""Whole sentences scored by a model and compared (`actors.bias`), packed as the choices of a question are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from actors.bias import BIAS_SETS, Comparison
from actors.reasoning import Packed, log_likelihoods, pack_trees
from actors.scores import BiasScore
from actors.types import RankfrontError


@dataclass(frozen=True)
class PackedSentences(Packed):
    """A set of comparisons ready to be scored any number of times; `lengths` are the tokens of each slot."""

    comparisons: tuple[Comparison, ...]
    lengths: tuple[int, ...]


def encode_sentence(tokenizer: Any, sentence: str) -> tuple[list[int], int]:
    """Token ids behind the one that begins a text, and how many of them are not scored: 1.

    As lm-evaluation-harness encodes a continuation of nothing: the token is BOS, or EOS where there is none,
    and is not put before a sentence that begins with it.

    Raises:
        RankfrontError: the tokenizer has neither, or makes no token of the sentence.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise RankfrontError("the tokenizer has no BOS and no EOS token for a sentence to begin behind")
    ids = tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids if ids[:1] == [begin] else [begin, *ids]
    if len(ids) < 2:
        raise RankfrontError(f"the tokenizer makes no token of the sentence {sentence!r}")
    return ids, 1


def pack_sentences(
    name: str, comparisons: Sequence[Comparison], tokenizer: Any, limit: int | None = None
) -> PackedSentences:
    """Tokenise and pack; `limit` is the model's context length, if it has one.

    Raises:
        RankfrontError: a sentence longer than the model's context, or that cannot be encoded; names its row.
    """
    encoded = []
    for number, comparison in enumerate(comparisons):
        where = comparison.origin or f"{name}: row {number}"
        try:
            found = [encode_sentence(tokenizer, sentence) for sentence in comparison.sentences]
        except RankfrontError as error:
            raise RankfrontError(f"{where}: {error}") from error
        longest = max(len(ids) for ids, _ in found)
        if limit is not None and longest > limit:
            raise RankfrontError(f"{where} has {longest} tokens, the model reads {limit}")
        encoded.append(found)
    lengths = tuple(len(ids) - begin for found in encoded for ids, begin in found)
    return PackedSentences(name, len(lengths), pack_trees(encoded), tuple(comparisons), lengths)


def score_sentences(model: nn.Module, packed: PackedSentences) -> BiasScore:
    """What the set measures (`actors.bias`).

    Raises:
        ScoringError: a non-finite log-likelihood.
    """
    chosen = BIAS_SETS[packed.name]
    values = log_likelihoods(model, packed).tolist()
    if chosen.per_token:
        values = [value / length for value, length in zip(values, packed.lengths, strict=True)]
    found = iter(values)
    likelihoods = [[next(found) for _ in one.sentences] for one in packed.comparisons]
    return chosen.measure(packed.comparisons, likelihoods)
