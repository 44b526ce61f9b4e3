"""Packed multiple-choice scoring against one plain forward pass per choice, and against lm-eval."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from actors import reasoning
from actors.models import load_tokenizer
from actors.reasoning import PackedTask, encode_pair, log_likelihoods, pack, score_task
from actors.tasks import TASKS, Example
from actors.types import ModelSource, RankfrontError, ScoringError

LIMIT = 256


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Any:
    return load_tokenizer(llama, ModelSource(str(llama)))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        llama, dtype=torch.float32, attn_implementation=request.param
    ).eval()


@pytest.fixture(scope="module")
def harness(llama: Path, tokenizer: Any) -> HFLM:
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, max_length=LIMIT)


def same_context(context: str, *choices: str, gold: int = 0) -> Example:
    return Example(
        contexts=(context,) * len(choices),
        continuations=tuple(f" {choice}" for choice in choices),
        lengths=tuple(map(len, choices)),
        gold=gold,
    )


def single_tokens(tokenizer: Any, count: int) -> list[str]:
    """Words that are one token behind a space."""
    words = sorted({word for document in tiny.documents(9) for word in document.split() if word.isalpha()})
    chosen = [word for word in words if len(tokenizer(f" {word}")["input_ids"]) == 1]
    assert len(chosen) >= count
    return chosen[:count]


def asked(name: str, tokenizer: Any) -> list[Example]:
    """Examples of one kind, each a shape of tree of its own."""
    if name == "winogrande":  # the contexts differ, the continuation is shared
        rows = [
            {"sentence": "The café gave _ the rope.", "option1": "Sarah", "option2": "Al", "answer": "1"},
            {"sentence": "_ left, as they said.", "option1": "Zoe", "option2": "The man", "answer": "2"},
            {"sentence": "He chose the _", "option1": "longer rope", "option2": "rope", "answer": "2"},
        ]
        return [TASKS["winogrande"].ask(row) for row in rows]
    if name == "one token":  # every branch is empty: the last token is only predicted
        words = single_tokens(tokenizer, 4)
        return [
            same_context(f"{document[:60]}\nAnswer:", *words[: 2 + n % 3], gold=n % 2)
            for n, document in enumerate(tiny.documents(6))
        ]
    if name == "nested":  # a choice that begins another, one said twice, one that is empty
        return [
            same_context("Which?", "tico", "tico is", "tico is it", "tico", gold=2),
            same_context("Which? ", "", "a", "ab", gold=1),
            same_context("Q", "x", "x", gold=1),
        ]
    if name == "long":  # one tree is wider than a row
        long = [tiny.sentence(random.Random(n), 70) for n in range(5)]
        return [same_context("Question: which?\nAnswer:", *long, gold=4), same_context("Q:", "a", "b")]
    rows = {"arc_easy": tiny.arc_rows, "piqa": tiny.piqa_rows, "boolq": tiny.boolq_rows}[name]()
    return [TASKS[name].ask(row) for row in rows]


KINDS = ["arc_easy", "piqa", "boolq", "winogrande", "one token", "nested", "long"]


def one_by_one(model: Any, tokenizer: Any, examples: list[Example]) -> list[float]:
    """Each choice on its own: the log-probabilities of the tokens behind the context's, summed."""
    sums = []
    for example in examples:
        for context, continuation in zip(example.contexts, example.continuations, strict=True):
            ids = tokenizer(context + continuation)["input_ids"]
            first = len(tokenizer(context.rstrip())["input_ids"])
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(scores[place - 1, ids[place]].item() for place in range(first, len(ids))))
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_no_log_likelihood(kind: str, model: LlamaForCausalLM, tokenizer: Any) -> None:
    examples = asked(kind, tokenizer)
    task = pack(kind, True, examples, tokenizer, LIMIT)
    assert task.slots == sum(len(example.continuations) for example in examples)
    expected = one_by_one(model, tokenizer, examples)
    np.testing.assert_allclose(log_likelihoods(model, task).numpy(), expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.1  # the model tells the choices apart


def test_tasks_fill_several_batches_and_leave_no_token_out(tokenizer: Any) -> None:
    """Every wanted token of every choice is in one batch, and little of a batch is padding."""
    task = pack("arc_easy", True, asked("arc_easy", tokenizer), tokenizer, LIMIT)
    assert len(task.batches) > 2
    assert all(batch.ids.numel() <= reasoning.BATCH_TOKENS for batch in task.batches)
    counts = torch.cat([batch.slot for batch in task.batches]).bincount().tolist()
    pairs = [pair for e in task.examples for pair in zip(e.contexts, e.continuations, strict=True)]
    encoded = [encode_pair(tokenizer, *pair) for pair in pairs]
    assert counts == [len(ids) - context for ids, context in encoded]
    bare = sum(pack("t", True, [example], tokenizer).tokens for example in task.examples)
    assert bare <= task.tokens < 1.1 * bare
    whole = sum(len(tokenizer(context + continuation)["input_ids"]) - 1 for context, continuation in pairs)
    assert bare < 0.7 * whole  # the shared questions are encoded once
    wide = pack("long", True, asked("long", tokenizer), tokenizer, LIMIT)
    assert max(batch.ids.numel() for batch in wide.batches) > reasoning.BATCH_TOKENS


@pytest.mark.parametrize("sizes", [[40] * 31, [600, 300, 299, 200, 9, 8, 7], [127, 128, 129], [5]])
def test_lanes_hold_every_tree_once_and_begin_with_one_that_fills_them(sizes: list[int]) -> None:
    batches = reasoning.pack_trees([[([1] * (size + 1), size)] for size in sizes])  # padding is 0
    assert sorted(torch.cat([batch.slot for batch in batches]).tolist()) == list(range(len(sizes)))
    assert sum(int(batch.ids.sum()) for batch in batches) == sum(sizes)
    for batch in batches:
        lanes, width = batch.ids.shape
        assert lanes == 1 or lanes * width <= reasoning.BATCH_TOKENS
        widest = max(sizes[slot] for slot in batch.slot)
        assert min(batch.ids.sum(1)) >= reasoning.FILLED * widest
        assert width <= max(widest, reasoning.LANE_TOKENS)


def test_no_branch_sees_another_or_a_stranger(tokenizer: Any, model: LlamaForCausalLM) -> None:
    """An example scores the same alone and among others, whatever its place in the batch."""
    examples = asked("piqa", tokenizer)[:6]
    together = log_likelihoods(model, pack("piqa", True, examples, tokenizer))
    for number, example in enumerate(examples):
        alone = log_likelihoods(model, pack("piqa", True, [example], tokenizer))
        torch.testing.assert_close(together[2 * number : 2 * number + 2], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("Question: why?\nAnswer:", " because"),
        ("ends in spaces  ", "so they move"),
        ("ends in a line\n", " break"),
        ("tic", "ou merges across"),
        ("the café", " naïve €"),
        ("one", ""),
    ],
)
def test_encode_pair_splits_as_the_harness_does(
    context: str, continuation: str, adds_bos: bool, llama: Path, harness: HFLM
) -> None:
    tokenizer = load_tokenizer(llama, ModelSource(str(llama)))
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
        )
    other = HFLM(pretrained=harness.model, tokenizer=tokenizer, device="cpu", max_length=LIMIT)
    context_ids, continuation_ids = other._encode_pair(context, continuation)
    whole, first = encode_pair(tokenizer, context, continuation)
    assert whole == other.tok_encode(context + continuation)
    assert (first, whole[first:]) == (len(context_ids), continuation_ids)
    assert (whole[0] == tokenizer.eos_token_id) == adds_bos


@pytest.mark.parametrize("kind", ["arc_easy", "boolq", "winogrande"])
def test_log_likelihoods_are_those_of_the_harness(kind: str, harness: HFLM, tokenizer: Any) -> None:
    examples = asked(kind, tokenizer)[:8]
    requests = [
        Instance("loglikelihood", {}, pair, index)
        for example in examples
        for index, pair in enumerate(zip(example.contexts, example.continuations, strict=True))
    ]
    expected = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    found = log_likelihoods(harness.model, pack(kind, True, examples, tokenizer, LIMIT))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["arc_easy", "piqa", "boolq", "winogrande"])
def test_accuracies_and_margin_are_numpys(kind: str, model: LlamaForCausalLM, tokenizer: Any) -> None:
    examples = asked(kind, tokenizer)
    values = iter(one_by_one(model, tokenizer, examples))
    hits, normalised, margins = [], [], []
    for example in examples:
        scores = np.array([next(values) for _ in example.continuations])
        hits.append(np.argmax(scores) == example.gold)
        normalised.append(np.argmax(scores / example.lengths) == example.gold)
        margins.append(scores[example.gold] - np.delete(scores, example.gold).max())
    for defined in (True, False):
        found = score_task(model, pack(kind, defined, examples, tokenizer, LIMIT))
        assert found.examples == len(examples)
        assert found.acc == pytest.approx(np.mean(hits), abs=1e-12)
        assert found.margin == pytest.approx(np.mean(margins), abs=1e-4)
        assert found.samples("acc") == tuple(map(float, hits))
        assert found.samples("margin") == pytest.approx(margins, abs=1e-4)
        assert found.samples("acc_norm") == (tuple(map(float, normalised)) if defined else ())
        if defined:
            assert found.acc_norm == pytest.approx(np.mean(normalised), abs=1e-12)
        else:
            assert found.acc_norm is None
    if kind == "arc_easy":
        assert 0 < np.mean(hits) < 1
        assert hits != normalised  # the lengths matter


def test_a_tie_goes_to_the_first_choice(model: LlamaForCausalLM, tokenizer: Any) -> None:
    first, second = (same_context("Which?", "tico", "tico", gold=gold) for gold in (0, 1))
    assert score_task(model, pack("t", True, [first], tokenizer)).acc == 1
    assert score_task(model, pack("t", True, [second], tokenizer)).acc == 0


def test_an_example_longer_than_the_context_is_refused(tokenizer: Any) -> None:
    example = same_context("Q:", "a", "a longer one")
    length = len(tokenizer("Q: a longer one")["input_ids"])
    pack("piqa", True, [example], tokenizer, limit=length)
    with pytest.raises(
        RankfrontError, match=rf"piqa: example 1 has {length} tokens, the model reads {length - 1}"
    ):
        pack("piqa", True, [same_context("Q:", "a"), example], tokenizer, limit=length - 1)


def test_weights_that_are_no_numbers_fail_the_task(llama: Path, tokenizer: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    task: PackedTask = pack("piqa", True, asked("piqa", tokenizer), tokenizer)
    where = rf"batch 0 of {len(task.batches)}, first in model\.layers\.1\.mlp\.up_proj$"
    with pytest.raises(ScoringError, match=f"piqa: non-finite log-likelihood in {where}"):
        score_task(model, task)
