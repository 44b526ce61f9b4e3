"""Models that run a block, or a layer of one, more than once in a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from actors.calibration import collect, collect_moments, finished
from actors.models import list_targets, load_model
from actors.planning import plan
from actors.prefix import PrefixCache
from actors.streams import Stream
from actors.types import Allocation, ModelSource, RankfrontError

WIDTH = 6


class Block(nn.Module):
    """q and k read one input; with `apart` 0 or 1, k another one in every second call. `inner` runs twice."""

    def __init__(self, apart: int | None, inner: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH) if inner else None
        self.apart, self.calls = apart, 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        other = hidden_states.sin() if self.calls % 2 == self.apart else hidden_states
        hidden_states = hidden_states + torch.tanh(self.q(hidden_states)) * self.k(other)
        return hidden_states if self.inner is None else self.inner(self.inner(hidden_states).cos())


class Loop(nn.Module):
    """Three blocks, gone through `cycles` times."""

    def __init__(self, cycles: int = 2, apart: int | None = None, inner: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(tiny.VOCABULARY, WIDTH)
            self.layers = nn.ModuleList(Block(apart, inner) for _ in range(3))
            self.head = nn.Linear(WIDTH, tiny.VOCABULARY)
        self.cycles, self.config = cycles, SimpleNamespace(model_type="looped")
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        hidden = self.table(ids)
        for _cycle in range(self.cycles):
            for layer in self.layers:
                hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def inputs_of(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """All inputs of every target, of all calls: (calls x tokens, n) float64."""
    seen: dict[str, list[Any]] = {target.name: [] for target in list_targets(model)}

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args: seen[name].append(args[0].flatten(0, -2).double().numpy())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in seen]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(found) for name, found in seen.items()}


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"apart": 0}, {"apart": 1}, {"cycles": 1, "inner": True}, {"cycles": 3}]
)
def test_moments_are_of_all_calls(settings: dict[str, Any], one_at_a_time: bool, ids: torch.Tensor) -> None:
    model = Loop(**settings)
    targets, expected = list_targets(model), inputs_of(model, ids)
    made = replace(plan(model, targets, ids, (), float("inf")), rows=len(ids))
    assert made.repeated
    groups = [[target] for target in targets] if one_at_a_time else [targets]
    found = {}
    for group in groups:
        found |= finished(collect(model, group, ids, made))
    for name, rows in expected.items():
        assert found[name].tokens == len(rows) > ids.numel() * (name.endswith("inner") or model.cycles > 1)
        np.testing.assert_allclose(found[name].input_mean, rows.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            found[name].spread.covariance, np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-5
        )


def test_a_pass_of_a_model_without_loops_still_ends_early(ids: torch.Tensor) -> None:
    model = Loop(cycles=1)
    made = plan(model, list_targets(model), ids, (), float("inf"))
    assert not made.repeated
    finished(collect(model, list_targets(model)[:2], ids[:1], made))
    before = [layer.calls for layer in model.layers]
    finished(collect(model, list_targets(model)[:2], ids[:1], made))
    assert [layer.calls - count for layer, count in zip(model.layers, before, strict=True)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "what"), [({}, r"layers\.0"), ({"cycles": 1, "inner": True}, r"layers\.0\.inner")]
)
def test_curvature_is_refused(settings: dict[str, Any], what: str, ids: torch.Tensor) -> None:
    model = Loop(**settings)
    targets = list_targets(model)
    with pytest.raises(RankfrontError, match=rf"curvature .* Loop runs {what} more than once .* use feature"):
        collect_moments(model, targets, ids, [target.name for target in targets])


def test_one_block_in_two_places_does_not_keep_curvature_from_the_others(ids: torch.Tensor) -> None:
    """Whether activations are kept or computed again."""
    model = Loop(cycles=1)
    model.layers[2] = model.layers[1]
    targets = list_targets(model)
    names = [target.name for target in targets]
    assert names == ["layers.0.q", "layers.0.k"]
    made = plan(model, targets, ids, names, float("inf"))
    kept, again = (
        finished(collect(model, targets, ids, replace(made, checkpointed=checkpointed), names, "data"))
        for checkpointed in (False, True)
    )
    for name in names:
        assert kept[name].gradient is not None
        assert kept[name].gradient.trace() > 0
        torch.testing.assert_close(again[name].gradient, kept[name].gradient)


@pytest.mark.parametrize("settings", [{}, {"cycles": 1, "inner": True}])
def test_no_text_is_taken_through_block_by_block(settings: dict[str, Any], ids: torch.Tensor) -> None:
    model = Loop(**settings)
    layers = [target.name for target in list_targets(model)]
    with pytest.raises(RankfrontError, match=r"Loop runs layers\.0.* more than once .* gradient"):
        Stream(model, ids, 4, layers)


def test_nothing_is_kept_and_every_pass_is_whole(ids: torch.Tensor) -> None:
    model = Loop()
    targets = list_targets(model)
    dense = Allocation.dense(targets)
    cache = PrefixCache(model, targets, dense, ids.numel(), 100.0, 1)
    full = model(ids).logits
    for _ in range(3):
        before = [layer.calls for layer in model.layers]
        with cache.reused(dense):
            assert torch.equal(model(ids).logits, full)
        assert [layer.calls - count for layer, count in zip(model.layers, before, strict=True)] == [2, 2, 2]
    assert cache.bytes == 0


def test_a_model_of_transformers_that_loops(ids: torch.Tensor, tmp_path: Path) -> None:
    """HRM-Text goes through its blocks three times in each of two cycles."""
    ids = ids[:4]
    folder = tiny.tiny_model(tmp_path, "hrm_text", num_layers_per_stack=2, head_dim=8)
    model = load_model(folder, ModelSource(str(folder)))
    targets = list_targets(model)
    found, rows = collect_moments(model, targets, ids), inputs_of(model, ids)
    assert {target.block for target in targets} == {0, 1}
    for target in targets:
        assert found[target.name].tokens == len(rows[target.name]) >= 2 * ids.numel()
        np.testing.assert_allclose(
            found[target.name].input_mean, rows[target.name].mean(0), rtol=1e-3, atol=1e-4
        )
    cache = PrefixCache(model, targets, Allocation.dense(targets), ids.numel(), 100.0, 1)
    with torch.inference_mode():
        full = model(ids, use_cache=False).logits
        for _ in range(2):
            with cache.reused(Allocation.dense(targets)):
                assert torch.equal(model(ids, use_cache=False).logits, full)
