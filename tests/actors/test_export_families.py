"""Every family of the contract suite, exported and loaded the three ways: logits, greedy text and bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from exported_models import make_case
from family_cases import CASES, GEMMA3_IMAGES
from safetensors import safe_open
from strangers import ask_stranger
from transformers import AutoModelForCausalLM

from actors.builder import Builder
from actors.calibration import collect_moments
from actors.check import own_bytes, recheck
from actors.dense_weights import dense_model
from actors.export import low_rank_model
from actors.factors import FactorStore
from actors.harness import LoadedFolder
from actors.low_rank import TrialModel
from actors.models import list_targets, load_model
from actors.scoring import Scorer
from actors.types import Allocation, FactorSpec, ModelSource, RankfrontError, ReplicaSpec, TargetSpec
from search.cost import CostModel

NEW_TOKENS = 64
STORAGE = "auto"
# The types whose config has room for every bias that the factors bring.
ROOM_FOR_BIASES = {"llama", "gpt2", "opt", "gpt_neox"}

# What another Python does, see `ask_stranger`.
STRANGER = """
from transformers import AutoModelForCausalLM
for name, folder in job["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor(job["ids"])
    with torch.inference_mode():
        logits = model(ids).logits
    answers[name] = {"logits": logits.tolist(), "text": model.generate(ids, **job["greedy"]).tolist()}
    again = f"{job['out']}/{name}"
    model.save_pretrained(again)
print(json.dumps(answers))
"""
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


@dataclass(frozen=True)
class Exported:
    """A family's tiny model: searched, and as the folders `low-rank` and, where there is room, `dense`."""

    model_type: str
    root: Path
    targets: tuple[TargetSpec, ...]
    store: FactorStore
    allocation: Allocation
    cost: CostModel

    def dense(self) -> Any:
        return load_model(self.root / "model", ModelSource(str(self.root / "model")))

    def searched(self) -> Any:
        model = self.dense()
        TrialModel(model, self.targets, self.store).install(self.allocation, 10**9)
        return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, ids: torch.Tensor) -> dict[str, Exported]:
    return {case.model_type: _export(case, tmp_path_factory.mktemp(case.model_type), ids) for case in CASES}


def _export(case: Any, root: Path, ids: torch.Tensor) -> Exported:
    tiny.tiny_model(root / "model", case.model_type, **case.settings)
    model = load_model(root / "model", ModelSource(str(root / "model")))
    targets = list_targets(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    moments = collect_moments(model, targets, ids[:4], (), "data")
    store = tiny.tiny_store(root / "store", model, targets, moments, FactorSpec("weight"))
    ranks = {
        target.name: None if number % 5 == 4 else max(1, target.full_rank * (number % 5 + 1) // 4)
        for number, target in enumerate(targets)
    }
    allocation = Allocation.of(ranks, targets)
    low_rank_model(model, store, allocation, STORAGE).save_pretrained(root / "low-rank")
    made = Exported(
        case.model_type, root, targets, store, allocation, CostModel(targets, parameters, STORAGE, "mean")
    )
    if case.model_type in ROOM_FOR_BIASES:
        dense_model(made.dense(), store, allocation).save_pretrained(root / "dense")
    return made


@pytest.fixture(scope="module")
def stranger(exported: dict[str, Exported], ids: torch.Tensor, tmp_path_factory: Any) -> dict[str, Any]:
    """What another Python makes of all low-rank folders; it saves each again below `again`."""
    place = tmp_path_factory.mktemp("stranger")
    job = {
        "folders": {name: str(one.root / "low-rank") for name, one in exported.items()},
        "ids": ids[:1, :16].tolist(),
        "greedy": GREEDY,
        "out": str(place),
    }
    return {"again": place, **ask_stranger(STRANGER, job, place)}


FAMILIES = pytest.mark.parametrize("name", [case.model_type for case in CASES])


def apart(found: Any, expected: Any) -> float:
    """Relative to the largest logit."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def answers(model: Any, ids: torch.Tensor) -> tuple[Any, list[list[int]]]:
    with torch.inference_mode():
        logits = model(ids).logits.numpy()
    return logits, model.generate(ids, **GREEDY).tolist()


@FAMILIES
def test_all_ways_to_load_give_the_searched_model(
    name: str, exported: dict[str, Exported], stranger: dict[str, Any], ids: torch.Tensor
) -> None:
    one, probe = exported[name], ids[:1, :16]
    logits, text = answers(one.searched(), probe)
    assert len(text[0]) == 16 + NEW_TOKENS
    known = AutoModelForCausalLM.from_pretrained(one.root / "low-rank").eval()
    ways = {
        "rankfront": answers(known, probe),
        "remote": tuple(stranger[name][k] for k in ("logits", "text")),
    }
    if (one.root / "dense").exists():
        ordinary = AutoModelForCausalLM.from_pretrained(one.root / "dense").eval()
        assert ordinary.config.model_type == name
        ways["dense"] = answers(ordinary, probe)
    for way, (found, written) in ways.items():
        assert apart(found, logits) < 1e-4, way
        assert written == text, way


@FAMILIES
def test_the_tensors_take_what_the_front_says(name: str, exported: dict[str, Exported]) -> None:
    one = exported[name]
    size = 0
    with safe_open(one.root / "low-rank" / "model.safetensors", framework="np") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            size += file.get_tensor(key).nbytes
    assert size == one.cost.model_bytes(one.allocation)


@FAMILIES
def test_what_was_loaded_and_saved_is_the_same_folder(
    name: str, exported: dict[str, Exported], stranger: dict[str, Any]
) -> None:
    """By a stranger, from remote code: tensors to the bit, tied ones once, and the code travels on."""
    first, again = exported[name].root / "low-rank", stranger["again"] / name
    code = "modeling_rankfront.py"
    assert (again / code).read_bytes() == (first / code).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    assert configs[0] == configs[1]
    with (
        safe_open(first / "model.safetensors", framework="np") as one,
        safe_open(again / "model.safetensors", framework="np") as other,
    ):
        assert set(one.keys()) == set(other.keys())
        for key in one.keys():  # noqa: SIM118
            np.testing.assert_array_equal(one.get_tensor(key), other.get_tensor(key))


@FAMILIES
def test_a_dense_form_is_offered_where_there_is_room_for_the_biases(
    name: str, exported: dict[str, Exported]
) -> None:
    one = exported[name]
    if name in ROOM_FOR_BIASES:
        return
    with pytest.raises(
        RankfrontError, match=rf"no dense form: .* need a bias, .*{name}.* factors.bias: none"
    ):
        dense_model(one.dense(), one.store, one.allocation)


def test_without_biases_every_architecture_has_a_dense_form(tmp_path: Path) -> None:
    """Mistral has no place for a bias anywhere; GPT-2 keeps the transposed weights of its Conv1D."""
    for name in ("mistral", "gpt2"):
        root = tmp_path / name
        tiny.tiny_model(root / "model", name)
        model, searched = (load_model(root / "model", ModelSource(str(root / "model"))) for _ in range(2))
        targets, size = list_targets(model), own_bytes(model)
        store = tiny.tiny_store(root / "store", model, targets, {}, FactorSpec("weight", bias="none"))
        allocation = Allocation.of({target.name: target.full_rank // 2 for target in targets}, targets)
        TrialModel(searched, targets, store).install(allocation, 10**9)
        made = dense_model(model, store, allocation)
        probe = torch.arange(40)[None]
        with torch.inference_mode():
            assert apart(made(probe).logits, searched(probe).logits) < 1e-4
        assert own_bytes(made) == size


def test_switches_that_are_not_needed_stay_off(exported: dict[str, Exported], tmp_path: Path) -> None:
    """A Llama without biases whose factors bring some: room is made, and filled with zeros elsewhere."""
    tiny.tiny_llama(tmp_path / "model")
    model = load_model(tmp_path / "model", ModelSource("x"))
    targets = list_targets(model)
    q_proj, untouched = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.up_proj
    store = tiny.tiny_store(tmp_path / "none", model, targets, {}, FactorSpec("weight", bias="none"))
    allocation = Allocation.of({targets[0].name: 5}, targets)
    dense_model(model, store, allocation)
    assert q_proj.bias is None
    assert not model.config.attention_bias
    moments = collect_moments(model, targets, torch.arange(64).reshape(2, 32), (), "data")
    store = tiny.tiny_store(tmp_path / "mean", model, targets, moments, FactorSpec("weight"))
    dense_model(model, store, allocation).save_pretrained(tmp_path / "dense")
    assert q_proj.bias.abs().max() > 0
    assert untouched.bias.abs().max() == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(loaded.model.layers[0].self_attn.q_proj.bias, q_proj.bias)


def test_a_nested_config_is_asked_how_much_its_text_model_reads(tmp_path: Path) -> None:
    """One of images and text, exported as any other; a window beyond its 256 positions is refused."""
    case = make_case(tmp_path, "gemma3", "auto", "mean", **GEMMA3_IMAGES)
    spec = case.config.preparation()
    assert Scorer(ReplicaSpec("r", spec, case.prepared, threads=1, device="cpu")).limit == 256
    longer = replace(spec, scoring=replace(spec.scoring, window=257))
    with pytest.raises(RankfrontError, match=r"^scoring.window: 257 tokens, the model reads 256$"):
        recheck(case.folder, longer, case.score.metrics)
    with pytest.raises(RankfrontError, match=r"^--window 257: the model reads 256 tokens$"):
        LoadedFolder(case.folder, "cpu").perplexity(spec.scoring.text, 257, 512, 512)
    builder = Builder(replace(spec, calibration=replace(spec.calibration, window=257)))
    with pytest.raises(RankfrontError, match=r"^calibration.window: 257 tokens, the model reads 256$"):
        list(builder.inspect())
    builder.close()
