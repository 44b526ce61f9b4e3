"""Models whose later blocks read K/V that earlier ones left in a mapping that all blocks are called with."""

from __future__ import annotations

from collections import UserDict
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from captured import Setting, captured, close
from torch import nn

from actors.calibration import collect_moments
from actors.errors import OpaqueModelError
from actors.models import list_targets, load_model
from actors.passes import leaving
from actors.prefix import PrefixCache
from actors.streams import Stream
from actors.types import Allocation, ModelSource

SLIDING, FULL = "sliding_attention", "full_attention"
FOUR = [SLIDING, FULL, SLIDING, FULL]  # of the two that share none, both leave theirs
FIVE = [SLIDING, *FOUR]  # the first leaves nothing: the second is the last of its type
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma4_text": {"global_head_dim": 16},
    "gemma3n_text": {"laurel_rank": 4},
}


def made(folder: Path, model_type: str, layer_types: list[str], sharing: int) -> Any:
    """A tiny model of which the last `sharing` blocks have no K/V of their own."""
    blocks = len(layer_types)
    settings = SETTINGS[model_type] | {
        "num_hidden_layers": blocks,
        "num_kv_shared_layers": sharing,
        "layer_types": layer_types,
        "head_dim": 16,
        "sliding_window": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
    }
    if model_type == "gemma3n_text":
        settings |= {"intermediate_size": [64] * blocks, "activation_sparsity_pattern": [0.0] * blocks}
    tiny.tiny_model(folder, model_type, **settings)
    return load_model(folder, ModelSource(str(folder)))


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def runs_of(model: nn.Module, ids: torch.Tensor, changed: tuple[int, ...]) -> tuple[list[list[int]], int]:
    """Which blocks run in passes that change these blocks first, all of a full pass's bits; bytes kept."""
    targets, runs = list_targets(model), []
    cache = PrefixCache(model, targets, Allocation.dense(targets), ids.numel(), 100.0, 1)
    handles = [
        layer.mlp.register_forward_hook(lambda *_, number=number: runs[-1].append(number))
        for number, layer in enumerate(model.model.layers)
    ]
    runs.append([])
    full = logits(model, ids)
    for block in changed:
        runs.append([])
        with cache.reused(Allocation.of({f"model.layers.{block}.mlp.up_proj": 3}, targets)):
            assert torch.equal(logits(model, ids), full)
    for handle in handles:
        handle.remove()
    return runs[1:], cache.bytes


@pytest.mark.parametrize("model_type", SETTINGS)
def test_no_text_is_taken_through_block_by_block(model_type: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = made(tmp_path, model_type, FIVE, sharing=2)
    with pytest.raises(OpaqueModelError, match=r"model\.layers\.1 leaves .* use refine\.method: gradient"):
        Stream(model, ids[:4], rows=2)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_nothing_is_kept_behind_a_block_that_leaves_something(
    model_type: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = made(tmp_path / "four", model_type, FOUR, sharing=2)
    assert runs_of(model, ids[:4], (3, 3, 2, 1)) == ([[0, 1, 2, 3]] * 4, 0)
    model = made(tmp_path / "five", model_type, FIVE, sharing=2)
    runs, kept = runs_of(model, ids[:4], (4, 4, 3, 2, 1))
    assert runs == [[0, 1, 2, 3, 4], *[[1, 2, 3, 4]] * 4]
    assert kept > 0


@pytest.mark.parametrize("model_type", SETTINGS)
def test_where_nothing_is_shared_all_is_as_ever(model_type: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = made(tmp_path, model_type, FOUR, sharing=0)
    assert runs_of(model, ids[:4], (3, 3, 2))[0] == [[0, 1, 2, 3], [3], [2, 3]]
    stream, state = Stream(model, ids[:4], rows=4), []
    handle = model.model.layers[3].register_forward_hook(lambda *seen: state.append(seen[-1]))
    logits(model, ids[:4])
    handle.remove()
    for _ in range(3):
        stream.advance()
    assert torch.equal(stream.run(0), state[0])


def test_moments_are_of_every_token(ids: torch.Tensor, tmp_path: Path) -> None:
    """Also in the blocks that read others' K/V, of which a pass for one logit needs the last token alone."""
    model = made(tmp_path, "gemma4_text", FOUR, sharing=2)
    setting, ids = Setting(model, list_targets(model)), ids[:6]
    found, seen = collect_moments(model, setting.targets, ids), captured(setting, ids)
    for name, moments in found.items():
        mean, covariance = seen[name].spread(moments.side)
        assert moments.tokens == ids.numel()
        close(moments.spread.covariance, covariance, 1e-4)
        if moments.side == "input":
            close(moments.input_mean, mean, 1e-4)


class Writer(nn.Module):
    def __init__(self, leaves: dict[str, Any]) -> None:
        super().__init__()
        self.leaves = leaves

    def forward(self, state: int, *mappings: MutableMapping[str, Any], **named: Any) -> int:
        for mapping in (*mappings, *named.values()):
            mapping.update(self.leaves)
        return state


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("named", [False, True])
def test_what_is_left_is_told_by_identity(kind: type[MutableMapping[str, Any]], named: bool) -> None:
    """What was there already and is not exchanged is not left; what is equal and another tensor is."""
    there = torch.ones(3)
    cases = {"nothing": {}, "same": {"k": there}, "equal": {"k": there.clone()}, "new": {"v": there}}
    blocks = {name: Writer(leaves) for name, leaves in cases.items()}
    with leaving(blocks) as left:
        for block in blocks.values():
            given = kind({"k": there})
            block(0, shared=given) if named else block(0, given)
    assert left == {"equal", "new"}
