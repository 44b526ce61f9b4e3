"""Multiply-accumulates against those that torch counts while the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from actors.linears import bias_of
from actors.modeling_rankfront import FORMS
from actors.models import count_parameters, list_targets
from actors.operations import operations
from actors.types import Allocation
from search.cost import CostModel

LENGTH = 12
# Windows no shorter than LENGTH: the model computes every pair of tokens and masks those beyond.
MODELS = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": LENGTH, "tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": LENGTH, "layer_types": ["sliding_attention"] * 3},
    "gpt2": {},
}


def loaded(folder: Path, model_type: str, **settings: Any) -> Any:
    tiny.tiny_model(folder, model_type, **settings)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def counted(model: Any) -> int:
    """Per token, of a pass over LENGTH tokens; torch counts a multiply and an add as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(LENGTH)[None], use_cache=False)
    counts = counter.get_flop_counts()
    rotations = sum(
        sum(found.values()) for name, found in counts.items() if name.rpartition(".")[2].startswith("rotary")
    )
    total = counter.get_total_flops() - rotations
    assert total % (2 * LENGTH) == 0
    return int(total // (2 * LENGTH))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_dense_model_computes_what_is_counted(model_type: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, model_type, **MODELS[model_type])
    targets = list_targets(model, exclude=("*.1.*",))
    known = operations(model, targets)
    cost = CostModel(targets, count_parameters(model), "auto", "none", operations=known, length=LENGTH)
    assert cost.macs(Allocation.dense(targets)) == counted(model)


@pytest.mark.parametrize("storage", ["factored", "pivoted", "auto"])
def test_a_compressed_model_computes_what_is_counted(storage: str, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager").eval()
    targets = list_targets(model)
    cost = CostModel(
        targets,
        count_parameters(model),
        storage,
        "mean",
        operations=operations(model, targets),
        length=LENGTH,
    )
    ranks = {target.name: (None, 3, target.full_rank)[i % 3] for i, target in enumerate(targets)}
    allocation = Allocation.of(ranks, targets)
    for target in targets:
        rank = ranks[target.name]
        if rank is not None:
            layer = FORMS[cost.form(target, rank)](target.cols, target.rows, rank, True)
            model.set_submodule(target.name, layer)
            assert bias_of(layer) is not None
    assert cost.macs(allocation) == counted(model)
    assert cost.macs(allocation) != cost.macs(Allocation.dense(targets))


def test_a_window_bounds_what_a_token_attends_to(tmp_path: Path) -> None:
    """By hand: 4 heads of 16, two products; the blocks' kinds as the config names them."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = loaded(tmp_path, "gemma3_text", head_dim=16, sliding_window=8, layer_types=kinds)
    known = operations(model, list_targets(model))
    assert known is not None
    assert known.attention == ((128, 8), (128, None), (128, 8))
    assert known.linear == model.get_output_embeddings().weight.numel()
    assert known.at(100) - known.at(99) == 128


def test_what_is_not_known_is_not_guessed(tmp_path: Path, llama: Path) -> None:
    """A family without a file of its own, blocks that do not attend, a layer that runs twice."""
    generic = loaded(tmp_path / "neox", "gpt_neox")
    assert operations(generic, list_targets(generic)) is None
    model = AutoModelForCausalLM.from_pretrained(llama)
    targets = list_targets(model)
    assert operations(model, targets) is not None
    model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    assert operations(model, targets) is None
    del model.config.layer_types
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert operations(model, list_targets(model)) is None
    assert CostModel(targets, 10**6, "auto", "none").macs(Allocation.dense(targets)) is None
