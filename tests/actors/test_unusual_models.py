"""Models that no family fits as it stands: modules missing or elsewhere, blocks of unknown types, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
)

from actors.export import low_rank_model
from actors.families import family_of
from actors.families.experts import experts_of_config
from actors.families.family import Family
from actors.low_rank import TrialModel
from actors.models import count_parameters, list_targets, load_model
from actors.types import Allocation, FactorSpec, ModelSource, RankfrontError
from search.cost import CostModel


def tiny_llama_model() -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_every_missing_module_of_a_named_family_is_told() -> None:
    model = tiny_llama_model()
    del model.model.layers[1].mlp.up_proj
    model.model.layers[2].self_attn.q_proj = nn.LayerNorm(16)
    with pytest.raises(RankfrontError) as error:
        list_targets(model)
    assert str(error.value).splitlines() == [
        "family 'llama' in LlamaForCausalLM: model.layers.1.mlp.up_proj is missing",
        "family 'llama' in LlamaForCausalLM: model.layers.2.self_attn.q_proj is a LayerNorm, no linear layer",
    ]


def test_a_block_may_lack_what_is_optional() -> None:
    model = tiny_llama_model()
    del model.model.layers[1].mlp.up_proj
    family = Family("pruned", ("llama",), modules=("mlp.up_proj",), optional=("mlp.up_proj",))
    assert [(block, module) for block, module, _ in family.linears(model)] == [
        (0, "mlp.up_proj"),
        (2, "mlp.up_proj"),
    ]


def test_a_named_family_whose_blocks_are_elsewhere_is_refused() -> None:
    model = tiny_llama_model()
    model.model.blocks = model.model.layers
    del model.model.layers
    with pytest.raises(
        RankfrontError, match=r"LlamaForCausalLM has no list of decoder blocks at model\.layers"
    ):
        list_targets(model)


def test_undeclared_layers_of_a_named_family_are_left_alone() -> None:
    """GPT-2 with cross-attention, which a causal language model never runs."""
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, add_cross_attention=True
    )
    modules = {target.module for target in list_targets(GPT2LMHeadModel(config))}
    assert modules == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


class Body(nn.Module):
    """A model of hand-made blocks, of a type nobody knows."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.body = nn.ModuleList(blocks)


def mlp(width: int = 8, inner: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))


def block(**parts: Any) -> nn.Module:
    made = nn.Module()
    made.attention = nn.Linear(8, 8)
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            part = nn.Parameter(part)
        setattr(made, name, part)
    return made


def test_a_layer_that_blocks_share_is_no_target() -> None:
    shared, tied = nn.Linear(8, 8), nn.Linear(8, 8)
    tied.weight = (other := nn.Linear(8, 8)).weight
    model = Body(block(shared=shared, tied=tied, own=nn.Linear(8, 8)), block(shared=shared, tied=other))
    names = [target.name for target in list_targets(model)]
    assert names == ["body.0.attention", "body.0.own", "body.1.attention"]
    assert family_of(model).shared(model) == (
        *("body.0.shared", "body.0.tied"),
        *("body.1.shared", "body.1.tied"),
    )


def test_a_layer_tied_to_something_outside_the_blocks_is_no_target() -> None:
    model = Body(block(), block())
    model.embedding = nn.Embedding(8, 8)
    model.body[1].attention.weight = model.embedding.weight
    assert [target.name for target in list_targets(model)] == ["body.0.attention"]


def test_a_bias_may_be_shared() -> None:
    model = Body(block(), block())
    model.body[1].attention.bias = model.body[0].attention.bias
    assert len(list_targets(model)) == 2


def test_one_block_at_every_depth_has_no_targets() -> None:
    again = block()
    with pytest.raises(
        RankfrontError, match=r"no linear layer inside body but 2 that .*, such as body\.0\.att"
    ):
        list_targets(Body(again, again))


ZAMBA2 = {
    "num_hidden_layers": 4,
    "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"],
    "num_mem_blocks": 1,
    "mamba_d_state": 4,
    "mamba_headdim": 16,
    "n_mamba_heads": 4,
    "mamba_ngroups": 1,
    "attention_head_dim": 16,
    "adapter_rank": 4,
    "chunk_size": 8,
}


def test_layers_tied_across_blocks_are_dense_where_counted_installed_and_exported(
    ids: torch.Tensor, tmp_path: Path
) -> None:
    """Zamba2 has its attention blocks at several depths, as modules of their own with weights in common."""
    folder = tiny.tiny_model(tmp_path / "model", "zamba2", **ZAMBA2)
    source = ModelSource(str(folder))
    model = load_model(folder, source)
    targets, total = list_targets(model), count_parameters(model)
    assert {target.module for target in targets} == {
        *("linear", "mamba.in_proj", "mamba.out_proj"),
        *("mamba_decoder.mamba.in_proj", "mamba_decoder.mamba.out_proj"),
    }
    store = tiny.tiny_store(tmp_path / "store", model, targets, {}, FactorSpec("weight", bias="none"))
    allocation = Allocation.of({target.name: target.full_rank // 4 for target in targets}, targets)
    trial = TrialModel(model, targets, store)
    with torch.inference_mode():
        dense = model(ids[:2]).logits
        trial.install(allocation, ids[:2].numel())
        cut = model(ids[:2]).logits
    low_rank_model(load_model(folder, source), store, allocation, "factored").save_pretrained(
        tmp_path / "low"
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "low", dtype="auto").eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids[:2]).logits, cut, rtol=1e-4, atol=1e-4)
    assert (cut - dense).abs().max() > 0.01
    cost = CostModel(targets, total, "factored", "none")
    counted = total - cost.linear_parameters + cost.linear(allocation)
    assert counted == sum(parameter.numel() for parameter in loaded.parameters()) < total
    first, second = (f"layers.{depth}.shared_transformer.self_attn.q_proj.weight" for depth in (0, 2))
    inner = loaded.base.model
    assert inner.get_parameter(first) is inner.get_parameter(second)


def test_blocks_of_an_unknown_type_may_differ() -> None:
    model = Body(block(first=mlp()), block(second=nn.Linear(8, 4)))
    assert [(target.name, target.rows, target.cols) for target in list_targets(model)] == [
        ("body.0.attention", 8, 8),
        ("body.0.first.0", 16, 8),
        ("body.0.first.2", 8, 16),
        ("body.1.attention", 8, 8),
        ("body.1.second", 4, 8),
    ]


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (MixtralConfig(num_local_experts=4, **SMALL), r"block 0, mlp\.experts\.gate_up_proj: 4 matrices"),
        (
            Qwen3MoeConfig(num_experts=6, mlp_only_layers=[0], **SMALL),
            r"block 1, mlp\.experts\.gate_up_proj: 6 matrices",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_mix_experts_are_told_by_their_structure(config: Any, where: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    model.config = PreTrainedConfig()  # says nothing of experts
    with pytest.raises(RankfrontError, match=rf"mixes experts, which has no adapter yet \(.*{where}"):
        list_targets(model)


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        ({"experts": nn.ModuleList(mlp() for _ in range(3))}, "experts: 3 MLPs of one shape"),
        ({"choices": nn.ModuleDict({"a": mlp(), "b": mlp()})}, "choices: 2 MLPs of one shape"),
        (
            {"up": torch.ones(4, 16, 8), "down": torch.ones(4, 8, 16)},
            r"down: 4 matrices \(8, 16\) in one parameter",
        ),
        (
            {"gate_up": torch.ones(4, 8, 32), "down": torch.ones(4, 16, 8)},
            r"down: 4 matrices \(16, 8\) in one parameter",
        ),
        ({"experts": torch.ones(4, 8, 8)}, r"experts: 4 matrices \(8, 8\) in one parameter"),
    ],
    ids=["list", "dict", "up and down", "gate and up in one", "by name"],
)
def test_hand_made_experts_are_refused(parts: dict[str, Any], where: str) -> None:
    with pytest.raises(RankfrontError, match=rf"Body mixes experts.* \(body, block 1, {where}\)"):
        list_targets(Body(block(), block(**parts)))


@pytest.mark.parametrize(
    "parts",
    [
        {"only": nn.ModuleList([mlp()])},
        {"unlike": nn.ModuleList([mlp(), mlp(inner=12)])},
        {"stages": nn.ModuleList(nn.Sequential(nn.LayerNorm(8), *mlp()) for _ in range(2))},
        {"adapters": nn.ModuleList(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 16)) for _ in range(2))},
        {"drops": nn.ModuleList(nn.Dropout() for _ in range(2))},
        {"heads": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))},
        {"kernel": nn.Conv1d(8, 8, 3), "other": nn.Conv1d(8, 4, 2)},
        {"q": torch.ones(8, 2, 4), "k": torch.ones(8, 2, 4)},
        {"mix": torch.ones(1, 1, 8), "decay": torch.ones(1, 8, 1)},
        {"x_proj": torch.ones(2, 6, 8), "dt_proj": torch.ones(2, 8, 4)},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_what_only_resembles_experts_is_taken(parts: dict[str, Any]) -> None:
    assert "body.1.attention" in {target.name for target in list_targets(Body(block(), block(**parts)))}


def test_gates_per_head_are_no_experts() -> None:
    """RecurrentGemma holds (heads, width, width) gates."""
    config = RecurrentGemmaConfig(
        num_hidden_layers=3, vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    assert any(p.dim() == 3 and p.shape[0] == 2 for p in model.parameters())
    assert len({target.block for target in list_targets(model)}) == 3


@pytest.mark.parametrize(
    ("settings", "experts"),
    [({}, 1), ({"num_local_experts": 0}, 1), ({"num_experts": 1}, 1), ({"n_routed_experts": 8}, 8)],
)
def test_one_expert_is_no_mixture(settings: dict[str, Any], experts: int) -> None:
    config = AutoConfig.for_model("llama")
    for name, value in settings.items():
        setattr(config, name, value)
    assert experts_of_config(config) == experts
