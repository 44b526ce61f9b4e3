"""The contract every model family keeps, on the tiny random model of each in `family_cases`."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from family_cases import BLOCKS, CASES, Case, Setting
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from actors.busy import Busy
from actors.calibration import collect_moments
from actors.export import low_rank_model
from actors.factors import FactorStore
from actors.families import FAMILIES, family_of
from actors.linears import bias_of, weight_of
from actors.low_rank import TrialModel
from actors.models import count_parameters, list_targets, load_model
from actors.perplexity import window_losses
from actors.prefix import PrefixCache
from actors.reasoning import PackedTask, log_likelihoods, pack
from actors.spans import spread
from actors.streams import Stream
from actors.tasks import Example
from actors.types import Allocation, FactorSpec, ModelSource, TargetSpec

FEW, MANY = 1, 10**9  # tokens for which a low rank runs as two factors, and a high one as one product


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model_type)
def setting(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    case: Case = request.param
    root = tmp_path_factory.mktemp(case.model_type)
    folder = tiny.tiny_model(root / "model", case.model_type, **case.settings)
    model = load_model(folder, ModelSource(str(folder)))
    targets = list_targets(model)
    moments = collect_moments(model, targets, ids, [target.name for target in targets], "data")
    spec = FactorSpec("weight", choices=("feature",))
    return Setting(
        case, folder, targets, moments, tiny.tiny_store(root / "store", model, targets, moments, spec)
    )


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the largest logit."""
    return ((one - other).abs().max() / other.abs().max()).item()


@cache
def questions() -> PackedTask:
    rows = [
        Example((row["goal"],) * 2, (" " + row["sol1"], " " + row["sol2"]), (1, 1), 0)
        for row in tiny.piqa_rows(6)
    ]
    return pack("piqa", True, rows, tiny.tiny_tokenizer())


def answers(model: nn.Module, ids: torch.Tensor) -> list[float]:
    """Losses of windows and log-likelihoods of packed questions, to the bit."""
    losses = window_losses(model, ids, 5 * ids.shape[1], "text").nats
    return torch.cat([losses, log_likelihoods(model, questions())]).tolist()


def seen(model: nn.Module, targets: tuple[TargetSpec, ...], ids: torch.Tensor) -> dict[str, Any]:
    """Inputs (tokens, n) and outputs (tokens, m) of every target on `ids`, as float64 arrays."""
    found: dict[str, Any] = {}

    def hook_of(name: str, width: int) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            pair = (args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1]))
            found[name] = tuple(tensor.double().numpy() for tensor in pair)

        return hook

    handles = [
        model.get_submodule(target.name).register_forward_hook(hook_of(target.name, target.cols))
        for target in targets
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def matrix(layer: nn.Module) -> Any:
    """W (m, n) in float64 by asking the layer itself: its answers to the unit vectors, less its bias."""
    width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
    with torch.inference_mode():
        answers = layer.double()(torch.eye(width, dtype=torch.float64)) - layer(
            torch.zeros(1, width, dtype=torch.float64)
        )
    return answers.T.numpy()


def test_targets_are_the_declared_modules_of_every_block(setting: Setting) -> None:
    case = setting.case
    assert setting.targets == tuple(
        TargetSpec(
            f"{case.blocks}.{block}.{module}",
            *shape,
            any(fnmatchcase(module, pattern) for pattern in case.biased),
            block,
            module,
        )
        for block in range(BLOCKS)
        for module, shape in case.shapes.items()
    )


def test_the_family_is_the_types_own_or_says_that_there_is_none(setting: Setting) -> None:
    family, case = family_of(setting.dense()), setting.case
    assert case.model_type in family.model_types
    assert family.blocks == case.blocks
    if case.generic:
        assert family not in FAMILIES
        every = f"every linear layer inside {case.blocks} is a target"
        assert family.note == f"no family of its own for {case.model_type!r}: {every}"
    else:
        assert family in FAMILIES
        assert family.note is None


def test_embeddings_and_head_are_never_targets(setting: Setting) -> None:
    model = setting.dense()
    chosen = {model.get_submodule(target.name) for target in setting.targets}
    assert {model.get_input_embeddings(), model.get_output_embeddings()}.isdisjoint(chosen)
    inside = set(model.get_submodule(setting.case.blocks).modules())
    assert chosen <= inside
    linears = {module for module in inside if type(module).__name__ in ("Linear", "Conv1D")}
    assert chosen == linears


def test_every_target_computes_w_x_plus_b(setting: Setting, ids: torch.Tensor) -> None:
    model = setting.dense()
    for name, (inputs, outputs) in seen(model, setting.targets, ids[:2]).items():
        layer = model.get_submodule(name)
        weight, bias = weight_of(layer).double().numpy(), bias_of(layer)
        expected = inputs @ weight.T + (0 if bias is None else bias.double().numpy())
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
        assert bias is None or bias.abs().min() > 0  # a forgotten one would show


def test_parameters_are_what_is_saved(setting: Setting) -> None:
    """Tied weights are saved once. The head is tied in all but one of the models."""
    with safe_open(setting.folder / "model.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    model = setting.dense()
    tied = setting.case.settings.get("tie_word_embeddings", True)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert count_parameters(model) == sum(saved.values())
    filed = {setting.case.name_in_file(target.name) for target in setting.targets}
    of_targets = sum(count for name, count in saved.items() if name.rpartition(".")[0] in filed)
    assert sum(target.parameters for target in setting.targets) == of_targets


@pytest.mark.parametrize("method", [None, "feature"])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_full_rank_is_the_dense_model(
    tokens: int, method: str | None, setting: Setting, ids: torch.Tensor
) -> None:
    model, trial = setting.installed(setting.allocation(1.0, method), tokens)
    assert all(trial.layer(target.name).rank == target.full_rank for target in setting.targets)
    assert largest_difference(logits(model, ids[:4]), logits(setting.dense(), ids[:4])) < 1e-4


def by_hand(setting: Setting, allocation: Allocation, ids: torch.Tensor) -> nn.Module:
    """The dense model with weights and biases replaced by what numpy makes of what it saw.

    W_r = U_r U_r^T W with U the left singular vectors of W (`weight`) or the eigenvectors of cov(W x)
    (`feature`); b_r = b + (W - W_r) mu.
    """
    model = setting.dense()
    inputs = {name: x for name, (x, _) in seen(model, setting.targets, ids).items()}
    methods = dict(allocation.methods)
    for name, rank in allocation:
        if rank is None:
            continue
        layer = model.get_submodule(name)
        own, weight, mu = bias_of(layer), matrix(copy.deepcopy(layer)), inputs[name].mean(0)
        if methods.get(name) == "feature":
            basis = np.linalg.eigh(np.cov((inputs[name] @ weight.T).T))[1][:, ::-1][:, :rank]
        else:
            basis = np.linalg.svd(weight)[0][:, :rank]
        cut = basis @ basis.T @ weight
        bias = (weight - cut) @ mu + (0 if own is None else own.double().numpy())
        replacement = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            replacement.weight.copy_(torch.from_numpy(cut))
            replacement.bias.copy_(torch.from_numpy(bias))
        model.set_submodule(name, replacement)
    return model


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_an_allocation_is_the_model_truncated_by_hand(
    tokens: int, setting: Setting, ids: torch.Tensor
) -> None:
    allocation = setting.mixed()
    model, _ = setting.installed(allocation, tokens)
    expected = logits(by_hand(setting, allocation, ids), ids[:4])
    assert largest_difference(logits(model, ids[:4]), expected) < 1e-4
    assert largest_difference(logits(setting.dense(), ids[:4]), expected) > 0.05  # it does change the model


def test_restored_is_the_dense_model_to_the_bit(setting: Setting, ids: torch.Tensor) -> None:
    before = logits(setting.dense(), ids[:2])
    for tokens in (FEW, MANY):
        model, trial = setting.installed(setting.mixed(), tokens)
        assert not torch.equal(logits(model, ids[:2]), before)
        trial.install(Allocation.dense(setting.targets), tokens)
        assert torch.equal(logits(model, ids[:2]), before)


def test_moments_are_those_of_what_the_targets_saw(setting: Setting, ids: torch.Tensor) -> None:
    model = setting.dense()
    inputs = {name: x for name, (x, _) in seen(model, setting.targets, ids).items()}
    for target in setting.targets:
        moments, x = setting.moments[target.name], inputs[target.name]
        assert moments.tokens == ids.numel()
        np.testing.assert_allclose(moments.input_mean, x.mean(0), rtol=1e-4, atol=1e-5)
        of = x if moments.side == "input" else x @ matrix(copy.deepcopy(model.get_submodule(target.name))).T
        covariance = np.cov(of.T, bias=True)
        found = moments.spread
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-4, atol=1e-5 * covariance.max())
        np.testing.assert_allclose(found.mean, of.mean(0), rtol=1e-4, atol=1e-4)


def test_gradient_moments_are_those_of_autograd(setting: Setting, ids: torch.Tensor) -> None:
    """Of the summed next-token loss, in W^T g where that is narrower: g over the root of its norm; the trace
    is that of g itself, per predicted token."""
    model = setting.dense()
    outputs: dict[str, torch.Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            outputs[name] = output if output.requires_grad else output.requires_grad_(True)
            outputs[name].retain_grad()
            return outputs[name]

        return hook

    for target in setting.targets:
        model.get_submodule(target.name).register_forward_hook(hook_of(target.name))
    predicted = model(ids).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum").backward()
    for target in setting.targets:
        gradient = outputs[target.name].grad
        assert gradient is not None
        g = gradient.reshape(-1, target.rows).double().numpy()
        if target.cols < target.rows:
            g = g @ matrix(copy.deepcopy(model.get_submodule(target.name)))
        found, norms = setting.moments[target.name].gradient, np.linalg.norm(g, axis=1, keepdims=True)
        held = g / np.sqrt(norms, where=norms > 0, out=np.ones_like(norms))
        expected = held.T @ held * (g**2).sum() / norms.sum() / len(predicted)
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_an_export_is_the_searched_model(
    storage: str, setting: Setting, ids: torch.Tensor, tmp_path: Path
) -> None:
    allocation = setting.mixed()
    low_rank_model(setting.dense(), setting.store, allocation, storage).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", use_safetensors=True).eval()
    searched, _ = setting.installed(allocation, MANY)
    assert largest_difference(logits(loaded, ids[:4]), logits(searched, ids[:4])) < 1e-4
    tied = setting.case.settings.get("tie_word_embeddings", True)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    kept = {target.name for target in setting.targets} - {
        name for name, rank in allocation if rank is not None
    }
    assert kept
    for name in kept:
        layer = setting.dense().get_submodule(name)
        assert torch.equal(loaded.base.get_submodule(name).weight, layer.weight)


def test_every_family_is_in_the_suite() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    assert set(types) == {case.model_type for case in CASES if not case.generic}


def test_a_restart_gives_the_bits_of_a_full_pass(setting: Setting, ids: torch.Tensor) -> None:
    """From the last block to the first and back, with methods that differ where ranks agree."""
    ids, dense = ids[:12], Allocation.dense(setting.targets)
    model, trial = setting.installed(dense, MANY)
    prefix = PrefixCache(model, setting.targets, dense, 10**4, 100.0, stride=1)
    first = setting.targets[0].name
    runs: list[str] = []
    trial.layer(first).register_forward_hook(lambda *_: runs.append(first))
    full_passes = []
    for block in (2, 1, 0, 2, BLOCKS):
        later = {target.name for target in setting.targets if target.block >= block}
        for whole in (setting.mixed(), setting.allocation(0.4), setting.allocation(0.4, "feature")):
            ranks = {name: rank for name, rank in whole if name in later}
            methods = {name: method for name, method in whole.methods if name in later}
            trial.install(Allocation.of(ranks, setting.targets, methods=methods), MANY)
            full = answers(model, ids)
            runs.clear()
            with prefix.reused(Allocation.of(ranks, setting.targets, methods=methods)):
                assert answers(model, ids) == full
            if runs:
                full_passes.append(block)
    assert full_passes == [2, 0, 0, 0], "the very first keeps the states; what changes block 0 uses none"


@pytest.mark.parametrize("devices", [2, 3])
def test_several_devices_give_the_bits_of_one(setting: Setting, ids: torch.Tensor, devices: int) -> None:
    """Whatever is installed, with several passes under way, from the first block or from a later one."""
    ids, dense = ids[:12], Allocation.dense(setting.targets)
    model, store = setting.dense(), FactorStore(setting.store.folder)
    spread(model, setting.targets, store, ["cpu"] * devices, Busy(["cpu"] * devices))
    trial = TrialModel(model, setting.targets, store)
    prefix = PrefixCache(model, setting.targets, dense, 10**4, 100.0, stride=1)
    alone, plain = setting.installed(dense, MANY)
    for block in (2, 0, 1, BLOCKS):
        later = {target.name for target in setting.targets if target.block >= block}
        ranks = {name: rank for name, rank in setting.mixed() if name in later}
        allocation = Allocation.of(ranks, setting.targets)
        trial.install(allocation, MANY)
        plain.install(allocation, MANY)
        expected = answers(alone, ids)
        assert answers(model, ids) == expected
        with prefix.reused(allocation):
            assert answers(model, ids) == expected
    assert prefix.bytes


def test_what_blocks_on_another_device_are_given_is_brought_there(
    setting: Setting, ids: torch.Tensor
) -> None:
    """To `meta`, whose tensors take part in nothing together with others, and from which none come back."""
    model, store = setting.dense(), FactorStore(setting.store.folder)
    spread(model, setting.targets, store, ["cpu", "meta"], Busy(["cpu", "cpu"]))
    TrialModel(model, setting.targets, store).install(setting.mixed(), MANY)
    with torch.inference_mode():
        if model.get_output_embeddings().weight.device.type == "meta":
            assert model(ids[:2]).logits.device.type == "meta"
            return
        with pytest.raises(NotImplementedError, match="out of meta tensor"):  # torch's own words
            model(ids[:2])


def test_a_text_taken_through_block_by_block_has_the_bits_of_a_full_pass(
    setting: Setting, ids: torch.Tensor
) -> None:
    model, made = setting.dense(), []

    def state(output: Any) -> torch.Tensor:
        return output if isinstance(output, torch.Tensor) else output[0]

    blocks = model.get_submodule(setting.case.blocks)
    handles = [b.register_forward_hook(lambda *seen: made.append(state(seen[-1]).clone())) for b in blocks]
    expected = {}
    for number, batch in enumerate(ids[:6].split(4)):
        logits(model, batch)
        expected |= {(block, number): made.pop(0) for block in range(BLOCKS)}
    for handle in handles:
        handle.remove()
    stream = Stream(model, ids[:6], rows=4)
    for block in range(BLOCKS):
        for number in range(stream.batches):
            assert torch.equal(state(stream.run(number)), expected[block, number])
        stream.advance()
    assert not any("forward" in vars(block) for block in blocks)
