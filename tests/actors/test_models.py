"""Which models are taken, what is refused and never run, and which layers are targets."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, PretrainedConfig, T5Config

from actors.models import (
    check_causal,
    count_parameters,
    decoder_blocks,
    fingerprint,
    list_targets,
    load_model,
    materialise,
)
from actors.types import ModelSource, RankfrontError, TargetSpec

HIDDEN, INTERMEDIATE, KEYS = 32, 64, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def config_folder(folder: Path, config: PretrainedConfig) -> ModelSource:
    config.save_pretrained(folder)
    return ModelSource(str(folder))


def test_targets_are_the_linear_layers_of_the_blocks_in_order(llama: Path, biased_llama: Path) -> None:
    for folder, bias in ((llama, False), (biased_llama, True)):
        model = load_model(folder, ModelSource(str(folder)))
        assert list_targets(model) == tuple(
            TargetSpec(f"model.layers.{block}.{module}", rows, cols, bias, block, module)
            for block in range(3)
            for module, (rows, cols) in SHAPES.items()
        )


def test_include_and_exclude_choose_by_shell_patterns(llama: Path) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    chosen = list_targets(model, include=("*.1.*", "*.down_proj"), exclude=("*.self_attn.[qk]_proj",))
    assert [target.name.removeprefix("model.layers.") for target in chosen] == [
        "0.mlp.down_proj",
        "1.self_attn.v_proj",
        "1.self_attn.o_proj",
        "1.mlp.gate_proj",
        "1.mlp.up_proj",
        "1.mlp.down_proj",
        "2.mlp.down_proj",
    ]
    with pytest.raises(RankfrontError, match=r"leaves none of 21 linear layers, such as model\.layers\.0\."):
        list_targets(model, include=("*.mlp.*",), exclude=("*.layers.*",))


def test_a_pattern_that_fits_no_layer_is_refused(llama: Path) -> None:
    """A misspelt one would leave what it was to protect to the search; the head is in no block."""
    model = load_model(llama, ModelSource(str(llama)))
    with pytest.raises(RankfrontError) as error:
        list_targets(model, include=("*", "lm_head"), exclude=("*.v_proj", "*.MLP.*"))
    assert str(error.value) == (
        "targets.include[1]: 'lm_head' fits none; targets.exclude[1]: '*.MLP.*' fits none of the 21 linear "
        "layers that may be compressed: model.layers.N.MODULE with self_attn.q_proj, self_attn.k_proj, "
        "self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj"
    )


def test_a_loaded_model_computes_what_was_saved(llama: Path) -> None:
    plain = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    model = load_model(llama, ModelSource(str(llama)))
    probe = torch.arange(20)[None]
    assert torch.equal(model(probe).logits, plain(probe).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    half = load_model(llama, ModelSource(str(llama), dtype="bfloat16"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_tied_parameters_count_once(llama: Path, biased_llama: Path) -> None:
    linear = sum(rows * cols for rows, cols in SHAPES.values())
    biases = sum(rows for rows, _ in SHAPES.values())
    embedding, norms = 384 * HIDDEN, 7 * HIDDEN
    tied = load_model(llama, ModelSource(str(llama)))
    assert count_parameters(tied) == 3 * linear + embedding + norms
    own_head = load_model(biased_llama, ModelSource(str(biased_llama)))
    assert count_parameters(own_head) == 3 * (linear + biases) + 2 * embedding + norms


def test_blocks_are_the_largest_list() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    model.decoder = nn.Module()
    model.decoder.blocks = nn.ModuleList([nn.Linear(9, 9)])
    prefix, blocks = decoder_blocks(model)
    assert prefix == "decoder.blocks"
    assert blocks is model.decoder.blocks
    with pytest.raises(RankfrontError, match="Sequential has no list of decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_materialise_uses_a_safetensors_folder_where_it_is(llama: Path, tmp_path: Path) -> None:
    assert materialise(ModelSource(str(llama)), tmp_path) == llama.resolve()
    assert list(tmp_path.iterdir()) == []


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    source = config_folder(tmp_path / "t5", T5Config(d_model=8, num_layers=1))
    with pytest.raises(RankfrontError, match="'t5' is not a causal language model"):
        materialise(source, tmp_path)


def test_encoders_are_refused_unless_they_are_decoders(tmp_path: Path) -> None:
    """An encoder's loss is of tokens it has seen, and says so nowhere."""
    settings = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    for is_decoder in (False, True):
        config = transformers.BertConfig(**settings, is_decoder=is_decoder)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
        first, second = model(ids).logits
        assert torch.equal(first[:2], second[:2]) == is_decoder
        source = config_folder(tmp_path / str(is_decoder), config)
        with (
            nullcontext() if is_decoder else pytest.raises(RankfrontError, match="'bert' sees the tokens it")
        ):
            check_causal(source, transformers.AutoConfig.from_pretrained(source.source))


def test_classifiers_are_refused(tmp_path: Path) -> None:
    source = config_folder(tmp_path / "vit", transformers.ViTConfig())
    with pytest.raises(RankfrontError, match="'vit' is not a causal language model"):
        materialise(source, tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(num_local_experts=2),
        transformers.Qwen3MoeConfig(),
        transformers.DeepseekV3Config(),
        transformers.Ernie4_5_MoeConfig(),  # counts them under a name of its own
        transformers.Qwen3_5MoeConfig(),  # says so in the config of its text part only
    ],
    ids=lambda config: config.model_type,
)
def test_mixtures_of_experts_are_refused(config: PretrainedConfig, tmp_path: Path) -> None:
    source = config_folder(tmp_path / "moe", config)
    with pytest.raises(RankfrontError, match="mixes experts, which has no adapter yet"):
        materialise(source, tmp_path)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(RankfrontError, match=r"no config\.json; a model is a folder with one or a \.gguf"):
        materialise(ModelSource(str(tmp_path)), tmp_path)


def test_a_config_of_no_known_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "not-a-model"}))
    with pytest.raises(RankfrontError, match="cannot be read as a model"):
        materialise(ModelSource(str(tmp_path)), tmp_path)


def test_a_model_without_linear_layers_says_so() -> None:
    model = nn.Module()
    model.body = nn.ModuleList(nn.Conv2d(2, 2, 3) for _ in range(2))
    with pytest.raises(RankfrontError, match=r"Module has no targets: no linear layer inside body"):
        list_targets(model)


def test_pickled_weights_are_refused_and_never_unpickled(llama: Path, tmp_path: Path) -> None:
    folder, trap = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(RankfrontError, match=r"safetensors"):
        load_model(folder, ModelSource(str(folder)))
    assert not trap.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert trap.exists()  # the trap works


@pytest.mark.parametrize(
    "lost", [["lm_head.weight"], ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]]
)
def test_a_weight_that_is_missing_is_not_made_up(biased_llama: Path, tmp_path: Path, lost: list[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(biased_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k not in lost}, folder / "model.safetensors", {"format": "pt"}
    )
    others = " and 1 more" if len(lost) == 2 else ""
    says = f"{folder}: its files lack lm_head.weight{others} of LlamaForCausalLM"
    with pytest.raises(RankfrontError, match=f"^{re.escape(says)}$"):
        load_model(folder, ModelSource(str(folder)))


def test_a_weight_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RankfrontError, match=f"^{folder}: cannot be loaded as a model: "):
        load_model(folder, ModelSource(str(folder)))


def changed(llama: Path, folder: Path, **settings: Any) -> ModelSource:
    """A copy of a model with some keys of its config replaced."""
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return ModelSource(str(folder))


@pytest.mark.parametrize(
    ("settings", "by"),
    [
        ({"quant_method": "gptq", "bits": 4}, " by gptq"),
        ({"quant_method": "awq", "bits": 4}, " by awq"),
        ({"quant_method": "compressed-tensors"}, " by compressed-tensors"),
        ({"quant_method": "fp8"}, " by fp8"),  # would be dequantised where there is no GPU, and only there
        ({"load_in_4bit": True}, ""),
    ],
)
def test_quantised_models_are_refused_by_name(
    settings: dict[str, Any], by: str, llama: Path, tmp_path: Path
) -> None:
    source = changed(llama, tmp_path / "model", quantization_config=settings)
    says = f"{tmp_path / 'model'}: quantised{by}; name the unquantised model, or a .gguf file of it"
    with pytest.raises(RankfrontError, match=f"^{re.escape(says)}$"):
        materialise(source, tmp_path)


def test_what_a_quantised_model_needs_to_be_loaded_is_said(llama: Path, tmp_path: Path) -> None:
    """It can be measured where that is installed."""
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    source = changed(llama, tmp_path / "model", **settings)
    with pytest.raises(RankfrontError, match=f"^{tmp_path / 'model'}: cannot be loaded as a model: .*GPTQ"):
        load_model(source.source, source)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"hidden_size": "32"}, "Field 'hidden_size' expected int, got str (value: '32')"),
        (
            {"num_attention_heads": 5},
            "The hidden size (32) is not a multiple of the number of attention",
        ),
        ({"num_attention_heads": 0}, "integer modulo by zero"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "Missing required keys in `rope_parameters`"),
        ({"quantization_config": ["gptq"]}, "'list' object"),
        ({"auto_map": 5}, "argument of type 'int'"),
    ],
)
def test_a_config_that_is_none_is_named_with_its_cause(
    settings: dict[str, Any], cause: str, llama: Path, tmp_path: Path
) -> None:
    source = changed(llama, tmp_path / "model", **settings)
    for refused in (lambda: materialise(source, tmp_path), lambda: load_model(source.source, source)):
        with pytest.raises(RankfrontError, match=rf"^{source.source}: cannot be .*{re.escape(cause)}.*$"):
            refused()


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"hidden_act": "foo"}, "'foo' is missing, or unknown to transformers"),
        ({"rope_scaling": {"rope_type": "foo"}}, "'foo' is missing, or unknown to transformers"),
        ({"pad_token_id": 7777}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_a_setting_that_only_the_model_looks_at_is_named(
    settings: dict[str, Any], cause: str, llama: Path, tmp_path: Path
) -> None:
    source = changed(llama, tmp_path / "model", **settings)
    says = f"{source.source}: cannot be loaded as a model: {cause}"
    with pytest.raises(RankfrontError, match=f"^{re.escape(says)}$"):
        load_model(source.source, source)


def test_remote_code_is_refused_and_never_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Config: pass\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    with pytest.raises(RankfrontError, match="trust_remote_code"):
        materialise(ModelSource(str(folder)), tmp_path)
    assert not sprung.exists()


def test_fingerprint_is_of_files_and_precision(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    source = ModelSource(str(copy))
    before = fingerprint(source)
    assert before == fingerprint(ModelSource(str(llama)))
    (copy / "README.md").write_text("a note beside the model")
    assert before == fingerprint(source)
    assert before != fingerprint(ModelSource(str(copy), dtype="bfloat16"))
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        last = weights.read(1)
        weights.seek(-1, 2)
        weights.write(bytes([last[0] ^ 1]))
    assert before != fingerprint(source)
