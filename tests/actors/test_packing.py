"""Packed scoring against plain passes, for every family, beyond its windows; models it is refused for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from family_cases import CASES
from transformers import MistralConfig, Qwen3Config
from transformers.masking_utils import sliding_window_causal_mask_function

from actors.attention import attention_mask
from actors.builder import Builder
from actors.models import load_model
from actors.packing import check_packing
from actors.reasoning import Packed, log_likelihoods, pack_trees
from actors.types import ModelSource, RankfrontError
from search.config import parse_config

WINDOW = 8
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{case.model_type: (case.model_type, dict(case.settings)) for case in CASES},
    "qwen2 with windows": ("qwen2", QWEN),
    "qwen3 with windows": ("qwen3", QWEN | {"head_dim": 16}),
    "phi3 with windows": ("phi3", {"sliding_window": WINDOW}),
}
HYBRID = ["full_attention", "linear_attention", "full_attention"]
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "lfm2": ({"layer_types": ["full_attention", "conv", "full_attention"]}, "tokens of one choice change"),
    "qwen3_5_text": ({"layer_types": HYBRID, "head_dim": 16}, "tokens of one choice change"),
    "recurrent_gemma": ({}, "tokens of one choice change"),
    "mpt": ({}, r"scores are 0\.\d+ nats a token off those of a choice alone, .* is below 0\.001"),
    "bloom": ({}, "it takes no attention mask of trees: "),
}

Made = Callable[[str, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    def make(model_type: str, settings: dict[str, Any]) -> Any:
        folder = tiny.tiny_model(tmp_path_factory.mktemp(model_type), model_type, **settings)
        return load_model(folder, ModelSource(str(folder)))

    return make


def choices_of(longest: int) -> list[list[tuple[list[int], int]]]:
    """Trees of up to `longest` tokens: branches at once, branches beyond a window, one choice in another."""
    chance = random.Random(longest)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(tiny.VOCABULARY) for _ in range(count)]

    trees = []
    for shared in (3, WINDOW + 1, longest // 2):
        context = tokens(shared)
        branches = [tokens(count) for count in (2, WINDOW + 2, longest - shared)]
        trees.append([(context + branch, shared) for branch in (*branches, branches[-1][:5])])
    return trees


def packed(longest: int) -> Packed:
    trees = choices_of(longest)
    return Packed("made up", sum(map(len, trees)), pack_trees(trees))


def one_by_one(model: Any, longest: int) -> list[float]:
    sums = []
    for ids, context in (choice for tree in choices_of(longest) for choice in tree):
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(scores[place - 1, ids[place]].item() for place in range(context, len(ids))))
    return sums


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_plain_for_every_family(name: str, made: Made) -> None:
    """Trees up to three windows deep, several in a lane."""
    model = made(*MODELS[name])
    task, expected = packed(3 * WINDOW), one_by_one(model, 3 * WINDOW)
    np.testing.assert_allclose(log_likelihoods(model, task).numpy(), expected, rtol=0, atol=1e-3)
    check_packing(model, [task])


def test_a_window_counts_as_in_transformers() -> None:
    """Of one tree that is a text, at every window around its length."""
    for window in range(1, 8):
        model: Any = torch.nn.Linear(1, 1)
        kinds = ["sliding_attention", "full_attention"]
        model.config = Qwen3Config(
            num_hidden_layers=2, use_sliding_window=True, sliding_window=window, layer_types=kinds
        )
        positions = torch.arange(6)[None]
        causal = torch.ones(1, 6, 6, dtype=torch.bool).tril()
        mask = attention_mask(model, causal, positions, torch.device("cpu"), torch.float32)
        found = mask["sliding_attention"] if isinstance(mask, dict) else mask
        inside = sliding_window_causal_mask_function(window)
        expected = inside(torch.tensor(0), torch.tensor(0), torch.arange(6)[:, None], torch.arange(6)[None])
        assert torch.equal(found[0, 0] == 0, expected)
        assert isinstance(mask, dict) == (window < 6), "one mask does where no window is exceeded"
        assert not isinstance(mask, dict) or torch.equal(mask["full_attention"][0, 0] == 0, causal[0])


@pytest.mark.parametrize("model_type", UNFIT)
def test_a_model_that_packing_contaminates_is_refused(model_type: str, made: Made) -> None:
    settings, why = UNFIT[model_type]
    model = made(model_type, settings)
    check_packing(model, [])
    with pytest.raises(RankfrontError, match=rf"{type(model).__name__} cannot score choices .*; {why}"):
        check_packing(model, [packed(20)])


def test_a_leak_shows_where_rounding_would_hide_it(made: Made) -> None:
    """At 16 bits, where the scores of this one differ by less than logits are rounded by."""
    model = made("recurrent_gemma", {}).bfloat16()
    with pytest.raises(RankfrontError, match="tokens of one choice change the scores of another"):
        check_packing(model, [packed(20)])


def test_a_window_that_the_config_does_not_tell_is_found_by_the_longest_question(made: Made) -> None:
    model = made("mistral", {"sliding_window": WINDOW})
    check_packing(model, [packed(2), packed(3 * WINDOW)])
    inner, model.config = model.config, MistralConfig(sliding_window=None)
    assert inner is model.model.config
    with pytest.raises(RankfrontError, match="nats a token off"):
        check_packing(model, [packed(2), packed(3 * WINDOW)])


def test_a_window_over_places_in_the_lane_is_found_by_the_longest_lane(made: Made) -> None:
    """GPT-Neo's local layers count so: no choice is longer than the window, but the last begin far behind."""
    kinds = [[["global", "local", "global"], 1]]
    model = made("gpt_neo", {"attention_types": kinds, "window_size": 32})
    short, wide = (
        [([*range(6), *range(first, first + 8)], 6) for first in range(9, 9 * count + 9, 9)]
        for count in (2, 8)
    )
    task = Packed("made up", 10, pack_trees([short, wide]))
    with pytest.raises(RankfrontError, match="nats a token off"):
        check_packing(model, [packed(2), task])
    check_packing(model, [Packed("made up", 2, pack_trees([short]))])


def test_what_is_no_number_is_left_to_those_who_name_the_layer(made: Made) -> None:
    model = made("llama", {})
    model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    check_packing(model, [packed(20)])


def test_a_preparation_with_tasks_is_refused_and_one_without_goes_on(tmp_path: Path) -> None:
    settings, _ = UNFIT["lfm2"]
    tiny.tiny_model(tmp_path / "model", "lfm2", **settings)
    for tasks in (True, False):
        raw = tiny.tiny_config(tmp_path, **({} if tasks else {"scoring": {"tasks": [], "examples": {}}}))
        builder = Builder(parse_config(raw).preparation())
        if tasks:
            with pytest.raises(
                RankfrontError, match=r"scoring\.tasks, scoring\.bias: Lfm2ForCausalLM cannot"
            ):
                list(builder.inspect())
        else:
            assert any("decomposing" in str(line) for line in builder.inspect())
        builder.close()
