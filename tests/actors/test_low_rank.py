"""Trial installation against a model whose weights were truncated in numpy, float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from decomposed import Decomposed, decomposed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from actors.calibration import collect_moments
from actors.factors import FactorStore
from actors.low_rank import TrialLinear, TrialModel
from actors.models import list_targets, load_model
from actors.types import Allocation, FactorSpec, ModelSource, TargetSpec

FEW, MANY = 1, 10**9  # tokens for which a rank below and near full runs as two factors, and as one product


@dataclass(frozen=True)
class Setting(Decomposed):
    def trial(self) -> tuple[Any, TrialModel]:
        model = self.dense()
        return model, TrialModel(model, self.targets, self.store)

    def allocation(self, **ranks: int) -> Allocation:
        """By module name, in every block."""
        last = {target.name: target.module.split(".")[-1] for target in self.targets}
        return Allocation.of(
            {name: ranks[module] for name, module in last.items() if module in ranks}, self.targets
        )


@pytest.fixture(
    scope="module", params=[("llama", "mean"), ("biased_llama", "mean"), ("biased_llama", "none")]
)
def setting(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    which, bias = request.param
    folder: Path = request.getfixturevalue(which)
    place = tmp_path_factory.mktemp("stores") / "store"
    made = decomposed(folder, place, ids, FactorSpec("feature", choices=("weight",), bias=bias))
    return Setting(folder, made.targets, made.store)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def truncated(setting: Setting, allocation: Allocation, ids: torch.Tensor) -> nn.Module:
    """The dense model with every chosen weight and bias replaced by what numpy makes of its inputs.

    W_r = V_r V_r^T W, V the eigenvectors of the outputs' second moment; b_r = b + (W - W_r) mu.
    """
    model = setting.dense()
    reference = copy.deepcopy(model)
    mean_bias = setting.store.manifest["bias"] == "mean"
    for name, rank in allocation:
        if rank is None:
            continue
        layer = model.get_submodule(name)
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        logits(model, ids)
        handle.remove()
        inputs = seen[0].flatten(0, 1).double().numpy()
        weight, mu = layer.weight.double().numpy(), inputs.mean(0)
        outputs = (inputs - mu if mean_bias else inputs) @ weight.T
        basis = np.linalg.eigh(outputs.T @ outputs)[1][:, ::-1][:, :rank]
        cut = basis @ basis.T @ weight
        bias = layer.bias.double().numpy() if layer.bias is not None else np.zeros(len(weight))
        if mean_bias:
            bias = bias + (weight - cut) @ mu
        replacement = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            replacement.weight.copy_(torch.from_numpy(cut))
            replacement.bias.copy_(torch.from_numpy(bias))
        reference.set_submodule(name, replacement)
    return reference


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_an_allocation_computes_what_the_truncated_weights_do(
    tokens: int, setting: Setting, ids: torch.Tensor
) -> None:
    allocation = setting.allocation(q_proj=12, v_proj=9, o_proj=20, up_proj=24, down_proj=28)
    model, trial = setting.trial()
    trial.install(allocation, tokens)
    found, dense = logits(model, ids[:4]), logits(setting.dense(), ids[:4])
    expected = logits(truncated(setting, allocation, ids), ids[:4])
    assert largest_difference(found, expected) < 1e-4
    assert largest_difference(dense, expected) > 0.05  # the ranks chosen do change the model


def test_both_products_agree_and_the_cheaper_one_runs(setting: Setting) -> None:
    _, trial = setting.trial()
    target = next(target for target in setting.targets if target.module == "mlp.up_proj")
    m, n = target.rows, target.cols
    x = torch.randn(50, n, generator=torch.Generator().manual_seed(0))
    for rank in (1, 10, 21, 22, 31, 32):  # mn / (m + n) = 21.3
        allocation = Allocation.of({target.name: rank}, setting.targets)
        outputs, operations = [], []
        for tokens in (FEW, MANY):
            trial.install(Allocation.dense(setting.targets), tokens)
            trial.install(allocation, tokens)
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                outputs.append(trial.layer(target.name)(x))
            operations.append(counter.get_total_flops() // (2 * len(x)))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
        # for one token making the product costs more than it saves, but for free at full rank; for many
        # it is spread to nothing
        factored = rank * (m + n)
        assert operations == [m * n if rank == n else factored, min(factored, m * n)]


def test_a_product_is_made_of_the_fewer_ranks(setting: Setting) -> None:
    """Those that are kept, or those that are left out: never more than half of the full rank."""
    _, trial = setting.trial()
    target = next(target for target in setting.targets if target.module == "mlp.up_proj")
    m, n = target.rows, target.cols
    for rank in (22, 31, 32):  # of 32; mn / (m + n) = 21.3
        with FlopCounterMode(display=False) as counter:
            trial.install(Allocation.of({target.name: rank}, setting.targets), MANY)
        counts = counter.get_flop_counts()["Global"]
        assert counts.get(torch.ops.aten.addmm, 0) == 2 * (32 - rank) * m * n
        assert counts.get(torch.ops.aten.mm, 0) <= 2 * rank * m  # the bias


def test_both_products_give_the_same_logits(setting: Setting, ids: torch.Tensor) -> None:
    allocation = setting.allocation(q_proj=30, k_proj=15, gate_proj=30, down_proj=30)
    found = []
    for tokens in (FEW, MANY):
        model, trial = setting.trial()
        trial.install(allocation, tokens)
        found.append(logits(model, ids[:2]))
    assert largest_difference(*found) < 1e-5


def test_dense_again_is_the_dense_model_to_the_bit(setting: Setting, ids: torch.Tensor) -> None:
    model, trial = setting.trial()
    before = logits(setting.dense(), ids[:2])
    assert torch.equal(logits(model, ids[:2]), before)  # wrapped, nothing installed
    for tokens in (FEW, MANY):
        trial.install(setting.allocation(q_proj=5, up_proj=31, down_proj=31), tokens)
        assert not torch.equal(logits(model, ids[:2]), before)
        trial.install(Allocation.dense(setting.targets), tokens)
        assert torch.equal(logits(model, ids[:2]), before)


def test_the_order_of_trials_leaves_no_trace(setting: Setting, ids: torch.Tensor) -> None:
    one, other = setting.allocation(q_proj=30, up_proj=10), setting.allocation(q_proj=7, down_proj=31)
    model, trial = setting.trial()
    trial.install(one, MANY)
    alone = logits(model, ids[:2])
    for allocation in (other, Allocation.dense(setting.targets), other, one):
        trial.install(allocation, MANY)
    assert torch.equal(logits(model, ids[:2]), alone)
    trial.install(one, FEW)  # as on another split, where the other product may be the cheaper one
    few = logits(model, ids[:2])
    trial.install(one, MANY)
    assert torch.equal(logits(model, ids[:2]), alone)
    assert not torch.equal(few, alone)


class Faltering:
    """A factor store that runs out of memory while it is asked for what one target leaves out."""

    def __init__(self, store: FactorStore) -> None:
        self._store, self.at = store, ""

    def rank(self, name: str, rank: int, method: str | None = None) -> Any:
        return self._store.rank(name, rank, method)

    def rest(self, name: str, rank: int, method: str | None = None) -> Any:
        if name == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._store.rest(name, rank, method)


def test_a_trial_that_ran_out_of_memory_leaves_no_trace(setting: Setting, ids: torch.Tensor) -> None:
    """Tried again where it failed it is that allocation, and not what its targets were before."""
    one, other = setting.allocation(q_proj=30, up_proj=30), setting.allocation(q_proj=29, up_proj=31)
    model, trial = setting.trial()
    trial.install(other, MANY)
    alone = logits(model, ids[:2])
    store = Faltering(setting.store)
    trial.use(store)
    trial.install(one, MANY)
    store.at = "model.layers.1.mlp.up_proj"
    with pytest.raises(torch.OutOfMemoryError):
        trial.install(other, MANY)
    store.at = ""
    trial.install(other, MANY)
    assert torch.equal(logits(model, ids[:2]), alone)


def test_only_changed_targets_are_touched(setting: Setting) -> None:
    _, trial = setting.trial()
    assert trial.install(Allocation.dense(setting.targets), MANY) == 0
    allocation = setting.allocation(q_proj=5, up_proj=20)
    assert trial.install(allocation, MANY) == 6
    assert trial.install(allocation, MANY) == 0
    changed = allocation.to_dict() | {"model.layers.1.mlp.up_proj": 21, "model.layers.2.mlp.down_proj": 3}
    assert trial.install(Allocation.of(changed, setting.targets), MANY) == 2
    assert trial.install(Allocation.dense(setting.targets), MANY) == 7


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_method_is_installed_as_a_rank_is(tokens: int, setting: Setting, ids: torch.Tensor) -> None:
    name, other = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    ranks = {name: 12, other: 9}
    feature = Allocation.of(ranks, setting.targets)
    mixed = Allocation.of(ranks, setting.targets, methods={name: "weight"})
    model, trial = setting.trial()
    assert trial.install(feature, tokens) == 2
    before = logits(model, ids[:2])
    assert trial.install(mixed, tokens) == 1
    assert (trial.layer(name).rank, trial.layer(name).method) == (12, "weight")
    # rank 12 of W's own singular vectors, with the other target left as it is
    left, values, right = np.linalg.svd(setting.dense().get_submodule(name).weight.double().numpy())
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = trial.layer(name)(x) - trial.layer(name)(torch.zeros(1, 32))
    expected = torch.from_numpy((left[:, :12] * values[:12]) @ right[:12])
    torch.testing.assert_close(found.double(), x.double() @ expected.T, rtol=1e-4, atol=1e-4)
    assert trial.install(mixed, tokens) == 0
    assert trial.install(feature, tokens) == 1
    assert torch.equal(logits(model, ids[:2]), before)
    trial.install(mixed, tokens)
    assert trial.install(Allocation.dense(setting.targets), tokens) == 2
    assert torch.equal(logits(model, ids[:2]), logits(setting.dense(), ids[:2]))


def test_a_conv1d_is_a_target_like_any_other(tmp_path: Path) -> None:
    """Its weight lies transposed; only the layer itself decides how the dense product is computed."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(Conv1D(nf=24, nx=16))
    dense = model[0]
    with torch.no_grad():
        dense.weight.copy_(torch.randn(16, 24, generator=generator))
        dense.bias.copy_(torch.randn(24, generator=generator))
    model.requires_grad_(False)
    target = TargetSpec("0", 24, 16, True, 0, "0")
    x = torch.randn(40, 16, generator=generator)
    before = model(x)
    trial = TrialModel(
        model, (target,), tiny.tiny_store(tmp_path / "store", model, (target,), {}, FactorSpec("weight"))
    )
    assert model[0].weight is dense.weight
    assert torch.equal(model(x), before)
    left, values, right = np.linalg.svd(dense.weight.T.double().numpy(), full_matrices=False)
    for tokens in (FEW, MANY):
        for rank in (3, 16):
            trial.install(Allocation((("0", rank),)), tokens)
            cut = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])
            expected = x.double() @ cut.T + dense.bias
            torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
        trial.install(Allocation((("0", None),)), tokens)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize(
    ("model_dtype", "store_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")],
)
def test_the_model_and_its_factors_may_differ_in_precision(
    model_dtype: str, store_dtype: str, tokens: int, llama: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """The config sets `model.dtype` and `factors.dtype` apart."""
    model = load_model(llama, ModelSource(str(llama), dtype=model_dtype))
    targets = list_targets(model)
    moments = collect_moments(model, targets, ids)
    store = tiny.tiny_store(
        tmp_path / "store", model, targets, moments, FactorSpec("feature", dtype=store_dtype)
    )
    dense = logits(model, ids[:2]).float()
    trial = TrialModel(model, targets, store)
    trial.install(Allocation(tuple((t.name, t.full_rank) for t in targets)), tokens)
    found = logits(model, ids[:2])
    assert found.dtype == getattr(torch, model_dtype)
    # full rank is the dense model but for rounding: 21 layers of a few parts in 2^8
    assert ((found.float() - dense).square().mean() / dense.square().mean()).sqrt() < 0.1


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_rounded_factors_are_what_runs(tokens: int, llama: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    """As an export has them: the dense weight less what they leave out is more exact, and not what is
    written."""
    model = load_model(llama, ModelSource(str(llama)))
    targets = list_targets(model)
    spec = FactorSpec("weight", dtype="bfloat16")
    store = tiny.tiny_store(tmp_path / "store", model, targets, {}, spec)
    trial = TrialModel(model, targets, store)
    trial.install(Allocation(tuple((t.name, t.full_rank - 2) for t in targets)), tokens)
    for target in targets:
        left, right, _ = store.rank(target.name, target.full_rank - 2)
        x = torch.randn(3, target.cols)
        expected = x.double() @ right.double().T @ left.double()
        found = model.get_submodule(target.name)(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "tokens"), [(2, FEW), (30, MANY)])
def test_only_the_ranks_that_are_taken_go_to_the_models_device(
    setting: Setting, rank: int, tokens: int
) -> None:
    """From factors in the memory of the machine: here to `meta`, in place of a GPU."""
    target = next(target for target in setting.targets if target.full_rank >= 32)
    layer = TrialLinear(setting.dense().get_submodule(target.name).to("meta"))
    layer.install(rank, FactorStore(setting.store.folder), target.name, tokens)
    held = [each for each in (layer._left, layer._right, layer._product, layer._bias) if each is not None]
    assert {tensor.device.type for tensor in held} == {"meta"}
    assert layer(torch.empty(3, target.cols, device="meta")).shape == (3, target.rows)
