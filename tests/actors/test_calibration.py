"""Moments against numpy in float64 on inputs captured apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from actors.calibration import collect_moments, shared_inputs
from actors.models import list_targets, load_model
from actors.types import ModelSource, TargetSpec

Floats = NDArray[np.float64]


def captured(model: nn.Module, names: list[str], ids: torch.Tensor) -> dict[str, tuple[Floats, Floats]]:
    """Inputs (tokens, n) and outputs (tokens, m) of layers in one forward pass, float64."""
    found = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            found[name] = tuple(t.detach().flatten(0, -2).double().numpy() for t in (args[0], output))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def close(found: torch.Tensor, expected: Floats, tolerance: float) -> None:
    """Equal relative to the largest entry."""
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("which", ["llama", "biased_llama"])
def test_moments_are_those_of_the_captured_inputs(
    which: str, ids: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    model = load_model(folder, ModelSource(str(folder)))
    targets = list_targets(model)
    moments = collect_moments(model, targets, ids)
    seen = captured(model, [target.name for target in targets], ids)
    assert [*moments] == [target.name for target in targets]
    sides = set()
    for target in targets:
        inputs, outputs = seen[target.name]
        if target.bias:
            outputs = outputs - model.get_submodule(target.name).bias.double().numpy()
        found = moments[target.name]
        sides.add((target.module, found.side))
        rows = inputs if found.side == "input" else outputs
        assert found.tokens == len(inputs) == ids.numel()
        close(found.mean, rows.mean(0), 1e-6)
        close(found.input_mean, inputs.mean(0), 1e-6)
        close(found.covariance, np.cov(rows.T, bias=True), 1e-6)
        close(found.second("mean"), np.cov(rows.T, bias=True), 1e-6)
        close(found.second("none"), rows.T @ rows / len(rows), 1e-6)
        assert torch.equal(found.covariance, found.covariance.T)
    # only the down projection is wider than tall and shares its input with nobody
    assert {module for module, side in sides if side == "output"} == {"mlp.down_proj"}


def test_splitting_into_batches_changes_nothing(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    targets = list_targets(model)
    whole = collect_moments(model, targets, ids, batch_tokens=ids.numel())
    for batch_tokens in (1, 5 * ids.shape[1]):  # one window at a time; a remainder of four
        parts = collect_moments(model, targets, ids, batch_tokens=batch_tokens)
        for target in targets:
            one, other = whole[target.name], parts[target.name]
            assert one.tokens == other.tokens
            close(other.covariance, one.covariance.numpy(), 1e-6)
            close(other.mean, one.mean.numpy(), 1e-6)


def test_layers_that_read_one_tensor_share_its_moments(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    targets = list_targets(model)
    short = {
        name.removeprefix("model.layers."): leader.removeprefix("model.layers.")
        for name, leader in shared_inputs(model, targets, ids[:1, :4]).items()
    }
    expected = {}
    for block in range(3):
        for leader, followers in {
            "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
            "self_attn.o_proj": ("o_proj",),
            "mlp.gate_proj": ("gate_proj", "up_proj"),
            "mlp.down_proj": ("down_proj",),
        }.items():
            part = leader.split(".")[0]
            expected |= {f"{block}.{part}.{follower}": f"{block}.{leader}" for follower in followers}
    assert short == expected
    moments = collect_moments(model, targets, ids[:2])
    for name, leader in short.items():
        one, other = (moments[f"model.layers.{n}"] for n in (name, leader))
        assert one.covariance is other.covariance  # kept once, not computed three times


def test_no_hook_stays_behind(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    collect_moments(model, list_targets(model), ids[:1])
    assert not any(module._forward_hooks for module in model.modules())


class Embedded(nn.Module):
    """A linear layer on a table of given inputs."""

    def __init__(self, table: torch.Tensor, out: int) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)
        self.linear = nn.Linear(table.shape[1], out, bias=False)

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.linear(self.table(ids)))


def test_means_far_beyond_the_deviation_do_not_cancel() -> None:
    """A few activations of real models are hundreds of times their deviation."""
    chance = np.random.default_rng(0)
    table = chance.normal(size=(64, 6)) * [1e-2, 1, 1, 1, 1, 5] + [3e3, -2e3, 500, 0, 0, 0]
    model = Embedded(torch.tensor(table, dtype=torch.float32), 8)
    ids = torch.from_numpy(chance.integers(0, 64, size=(32, 16)))
    target = TargetSpec("linear", rows=8, cols=6, bias=False, block=0, module="linear")
    found = collect_moments(model, [target], ids, batch_tokens=64)["linear"]
    rows = model.table.weight.double().numpy()[ids.flatten().numpy()]
    expected = np.cov(rows.T, bias=True)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    # float32 leaves 3000 in steps of 2.4e-4 and the mean is taken off in float32: a step, squared away
    assert (np.abs(found.covariance.numpy() - expected) / scale).max() < 1e-4
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), rtol=1e-7, atol=1e-6)
