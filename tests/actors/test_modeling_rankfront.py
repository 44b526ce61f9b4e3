"""The layers and the model class of an export: what they compute, compiled, cached, sharded and adapted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from actors.calibration import collect_moments
from actors.check import tensor_bytes
from actors.export import low_rank_model
from actors.modeling_rankfront import FactoredLinear, PivotedLinear, RankfrontForCausalLM
from actors.models import list_targets, load_model
from actors.types import Allocation, FactorSpec, ModelSource

M, N, R, T = 12, 10, 5, 7


def pivoted(rank: int = R, bias: bool = True, rows: int = M, cols: int = N) -> PivotedLinear:
    layer = PivotedLinear(cols, rows, rank, bias)
    generator = torch.Generator().manual_seed(rank)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    layer.order.copy_(torch.randperm(rows, generator=generator))
    return layer


def by_hand(layer: PivotedLinear, x: torch.Tensor) -> torch.Tensor:
    """P [I; C] R x + P [c; C c + d] in float64, by matrices."""
    rank, weight = layer.rank, layer.pivots.double()
    tall = torch.cat((torch.eye(rank, dtype=torch.float64), layer.coefficients.double()))
    bias = torch.zeros(layer.out_features, dtype=torch.float64)
    if layer.bias is not None:
        own, others = layer.bias.double()[:rank], layer.bias.double()[rank:]
        bias = torch.cat((own, layer.coefficients.double() @ own + others))
    return (x.double() @ (tall @ weight).T + bias)[..., layer.order.long()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "cols"), [(M, N), (N, M), (N, N)])
@pytest.mark.parametrize("rank", [1, R, N])
@pytest.mark.parametrize("before", [(), (1, 1), (2,), (2, 3), (0,)])
def test_a_pivoted_layer_computes_its_matrix(
    before: tuple[int, ...], rank: int, rows: int, cols: int, bias: bool
) -> None:
    layer = pivoted(rank, bias, rows, cols)
    x = torch.randn(*before, cols)
    with torch.no_grad():
        found = layer(x)
    tracked = layer(x)
    assert found.shape == tracked.shape == (*before, rows)
    torch.testing.assert_close(found.double(), by_hand(layer, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tracked, found, rtol=1e-5, atol=1e-5)


def test_as_many_rows_as_pivots() -> None:
    layer = PivotedLinear(N, R, R, True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.order.copy_(torch.arange(R).flip(0))
    x = torch.randn(T, N)
    with torch.no_grad():
        expected = (x @ layer.pivots.T + layer.bias).flip(-1)
        torch.testing.assert_close(layer(x), expected)


def test_autocast_and_gradients_reach_every_weight() -> None:
    layer, x = pivoted(), torch.randn(T, N)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("tracked", [True, False])
def test_layers_take_the_operations_that_their_form_promises(tracked: bool) -> None:
    """Two per multiplication: r (m + n) for factors, r (m + n - r) for pivots."""
    for layer, products in (
        (FactoredLinear(N, M, R, True), R * (M + N)),
        (PivotedLinear(N, M, R, True), R * (M + N - R)),
    ):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(tracked):
            layer(torch.randn(T, N))
        assert counter.get_total_flops() == 2 * T * products


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama exported in all three forms."""
    root = tmp_path_factory.mktemp("exported")
    tiny.tiny_llama(root / "model")
    model = load_model(root / "model", ModelSource("x"))
    targets = list_targets(model)
    moments = collect_moments(model, targets, torch.arange(64).reshape(2, 32), (), "data")
    store = tiny.tiny_store(root / "store", model, targets, moments, FactorSpec("weight"))
    shares = (0.3, 0.6, 1.0, None)
    ranks = {
        target.name: None if share is None else int(share * target.full_rank)
        for target, share in zip(targets, shares * len(targets), strict=False)
    }
    made = low_rank_model(model, store, Allocation.of(ranks, targets), "auto")
    made.save_pretrained(root / "exported")
    return root / "exported"


@pytest.fixture
def model(folder: Path) -> RankfrontForCausalLM:
    found = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(found, RankfrontForCausalLM)
    return found


def test_all_forms_are_there(model: RankfrontForCausalLM) -> None:
    assert {layer["form"] for layer in model.config.layers.values()} == {"dense", "factored", "pivoted"}


PROBE = torch.arange(3, 40)[None]


def logits(model: Any, ids: torch.Tensor = PROBE) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found


def test_it_compiles_as_one_graph(model: RankfrontForCausalLM) -> None:
    """`fullgraph` raises at a graph break; a second length, where shapes become dynamic, is none either."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (20, 31):
            found = compiled(PROBE[:, :length]).logits
            torch.testing.assert_close(found, model(PROBE[:, :length]).logits, rtol=1e-4, atol=1e-4)
        explained = torch._dynamo.explain(model)(PROBE)
    assert explained.graph_break_count == 0
    torch._dynamo.reset()


@pytest.mark.slow  # inductor compiles C++ for each layer
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler; without one the graph is tested above"
)
def test_the_compiled_layers_compute_what_they_do_uncompiled(tmp_path: Path, monkeypatch: Any) -> None:
    """By inductor, each layer as one graph, at two lengths."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    factored = FactoredLinear(N, M, R, True)
    for parameter in factored.parameters():
        torch.nn.init.normal_(parameter)
    torch._dynamo.reset()
    for layer in (factored, pivoted()):
        compiled = torch.compile(layer, fullgraph=True)
        with torch.no_grad():
            for tokens in (T, 3 * T):
                x = torch.randn(2, tokens, N)
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow  # inductor compiles C++ for the whole model
@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="inductor needs a C++ compiler; without one generation is tested below",
)
def test_a_compiled_step_with_a_static_cache_generates_the_same(
    model: RankfrontForCausalLM, tmp_path: Path, monkeypatch: Any
) -> None:
    """Prompt and steps as inductor compiles them, without a graph break."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    usual = model.generate(PROBE, **settings)
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(model.base, "forward", torch.compile(model.base.forward, fullgraph=True))
        static = model.generate(PROBE, cache_implementation="static", disable_compile=True, **settings)
    torch._dynamo.reset()
    assert static.tolist() == usual.tolist()


def test_a_static_cache_generates_what_a_growing_one_does(model: RankfrontForCausalLM) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    usual = model.generate(PROBE, **settings)
    # `disable_compile`: else generate compiles each step by inductor, minutes for a tiny model.
    static = model.generate(PROBE, cache_implementation="static", disable_compile=True, **settings)
    assert static.tolist() == usual.tolist()
    assert len({*usual[0, -24:].tolist()}) > 3


def test_lora_trains_on_top_and_comes_back(model: RankfrontForCausalLM, tmp_path: Path) -> None:
    """Whole targets by their usual names, whatever form each is stored in; nothing else learns."""
    before = logits(model)
    names = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, model.with_lora(config))
    forms = {type(m.base_layer) for m in adapted.modules() if hasattr(m, "base_layer")}
    assert {FactoredLinear, PivotedLinear} <= forms
    torch.testing.assert_close(logits(adapted), before)
    learning = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    assert learning
    assert all("lora_" in name for name, _ in learning)
    optimizer = torch.optim.SGD([p for _, p in learning], lr=0.5)
    losses = []
    for _ in range(4):
        loss = adapted(PROBE, labels=PROBE).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    expected = logits(adapted.eval())
    fresh = AutoModelForCausalLM.from_pretrained(model.name_or_path).eval()
    saved = fresh.with_lora(LoraConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path, config=saved)), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_trainers_find_what_to_pass_on(
    adapted: bool, model: RankfrontForCausalLM, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Columns of a data set by the names of the forward pass, a loss, and recomputed activations."""
    trained: Any = model
    if adapted:
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        trained = get_peft_model(model, model.with_lora(config))
    rows = [{"input_ids": row, "labels": row, "of no use": 1} for row in ids[:4].tolist()]
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(trained, settings, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.base.modules())
    assert trainer.evaluate()["eval_loss"] < before


def test_shards_and_tied_weights_come_back(model: RankfrontForCausalLM, folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    assert tensor_bytes(tmp_path) == tensor_bytes(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model))
    assert {file.name for file in tmp_path.iterdir() if file.suffix == ".py"} == {"modeling_rankfront.py"}
    kept = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert kept[0] == kept[1]


def test_devices_and_precisions_can_be_asked_for(model: RankfrontForCausalLM, folder: Path) -> None:
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        placed = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()
        assert torch.equal(logits(placed), logits(model))
    parts = {"base.model.embed_tokens": "cpu", "base.lm_head": "cpu", "base.model": "cpu"}
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(folder, device_map=parts).eval()), logits(model)
    )
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    orders = [m.order for m in half.modules() if isinstance(m, PivotedLinear)]
    assert orders
    assert all(order.dtype == torch.int32 for order in orders)
    apart = (logits(half).float() - logits(model)).square().mean().sqrt() / logits(
        model
    ).square().mean().sqrt()
    assert apart < 0.1


def test_attributes_of_the_base_are_read_through_the_config(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert config.hidden_size == 32
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        config.colour  # noqa: B018
