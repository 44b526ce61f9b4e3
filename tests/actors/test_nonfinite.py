"""The layer a pass breaks in, on models that are broken on purpose."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from actors.low_rank import TrialModel
from actors.models import list_targets, load_model
from actors.nonfinite import all_finite, culprit
from actors.types import Allocation, ModelSource


class Overflowing:
    """A factor store whose products of one target are no numbers."""

    def __init__(self, target: str) -> None:
        self._target = target

    def rank(self, name: str, rank: int, method: str | None) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, cols = SHAPES[name.rpartition(".")[2]]
        value = torch.inf if name == self._target else 0.01
        return torch.full((rank, rows), value), torch.full((rank, cols), 0.01), None


SHAPES = {"v_proj": (16, 32), "down_proj": (32, 64), "q_proj": (32, 32)}


@pytest.mark.parametrize("tokens", [1, 10**9])  # as two factors, and as one product
@pytest.mark.parametrize("target", ["model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj"])
def test_a_broken_target_is_named(target: str, tokens: int, llama: Path, ids: torch.Tensor) -> None:
    """Not the layers after it, which are broken too; nor the dense layer inside it, which does not run."""
    model = load_model(llama, ModelSource(str(llama)))
    targets = [t for t in list_targets(model) if t.module.rpartition(".")[2] in SHAPES]
    trial = TrialModel(model, tuple(targets), Overflowing(target))  # type: ignore[arg-type]
    trial.install(Allocation.of(dict.fromkeys((t.name for t in targets), 12), targets), tokens)
    assert culprit(model, partial(model, ids[:2])) == f"first in {target}"
    trial.install(Allocation.dense(targets), tokens)
    assert culprit(model, partial(model, ids[:2])) == "though the output of every layer is finite"
    model.get_submodule(target).dense.weight.fill_(torch.nan)
    assert culprit(model, partial(model, ids[:2])) == f"first in {target}", "a dense target has one name too"


def test_what_is_no_target_is_named_too_and_nothing_is_left_behind(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    model.get_submodule("model.layers.1.input_layernorm").weight[3] = torch.inf
    assert culprit(model, partial(model, ids[:2])) == "first in model.layers.1.input_layernorm"
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_layers_has_no_culprit() -> None:
    model = nn.Identity()
    assert culprit(model, partial(model, torch.tensor([torch.nan]))) == (
        "though the output of every layer is finite"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_among_many_is_seen(dtype: torch.dtype) -> None:
    logits = torch.full((3, 70, 500), 100.0, dtype=dtype)  # their sum is beyond float16
    assert all_finite(logits)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = logits.clone()
        broken[1, 5, 7] = value
        assert not all_finite(broken)
    broken[1, 5, 8] = torch.inf
    assert not all_finite(broken), "infinities of both signs"
