"""What is kept, for whom, and within which memory. That bits agree is in the contract of the families."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from actors.models import list_targets, load_model
from actors.prefix import PrefixCache, boundaries
from actors.types import Allocation, ModelSource, TargetSpec

WIDTH = 4


class Block(nn.Module):
    """Adds its number to the state; hands on whatever `beside` says with it. Counts its runs."""

    def __init__(self, number: int, beside: tuple[Any, ...] | None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.number, self.beside, self.runs = number, beside, 0

    def forward(self, hidden_states: torch.Tensor) -> Any:
        self.runs += 1
        hidden_states += self.number  # in place, on purpose
        return hidden_states if self.beside is None else (hidden_states, *self.beside)


class Stack(nn.Module):
    """A model of blocks that can be followed by hand: the state is the ids, repeated."""

    def __init__(self, blocks: int = 6, beside: tuple[Any, ...] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(10**number, beside) for number in range(blocks))
        self.config = SimpleNamespace(model_type="made-up")

    def forward(self, ids: torch.Tensor, mask: Any = None, keyword: bool = False) -> Any:
        hidden = ids[..., None].repeat(*[1] * ids.dim(), WIDTH).float()
        for layer in self.layers:
            out = layer(hidden_states=hidden) if keyword else layer(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    @property
    def runs(self) -> list[int]:
        """Runs of each block since the last look."""
        found = [layer.runs for layer in self.layers]
        for layer in self.layers:
            layer.runs = 0
        return found


def targets_of(model: Stack) -> tuple[TargetSpec, ...]:
    return tuple(
        TargetSpec(f"layers.{block}.linear", WIDTH, WIDTH, True, block, "linear")
        for block in range(len(model.layers))
    )


def changing(targets: tuple[TargetSpec, ...], block: int) -> Allocation:
    return Allocation.of({f"layers.{block}.linear": 2}, targets)


def cache_of(model: Stack, memory_mb: float = 1.0, stride: int = 1, tokens: int = 8) -> PrefixCache:
    targets = targets_of(model)
    return PrefixCache(model, targets, Allocation.dense(targets), tokens, memory_mb, stride)


IDS = torch.arange(8).view(2, 4)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("beside", [None, (), (None,), (None, None)])
def test_blocks_before_the_first_changed_one_are_skipped(
    beside: tuple[Any, ...] | None, keyword: bool
) -> None:
    model = Stack(beside=beside)
    full, cache = model(IDS), cache_of(model)
    assert model.runs == [1] * 6
    for block, expected in (
        (3, [1] * 6),
        (5, [0, 0, 0, 1, 1, 1]),
        (5, [0] * 5 + [1]),
        (2, [0, 0, 1, 1, 1, 1]),
    ):
        with cache.reused(changing(targets_of(model), block)):
            assert torch.equal(model(IDS, keyword=keyword), full)
        assert model.runs == expected
    with cache.reused(changing(targets_of(model), 0)):
        model(IDS)
    assert model.runs == [1] * 6
    with cache.reused(Allocation.dense(targets_of(model))):
        model(IDS)
    assert model.runs == [0] * 5 + [1], "nothing is changed: the last boundary there is"


def test_states_are_those_of_their_input() -> None:
    """Other ids, another shape of them, another mask, also of a type of layer: nothing is known of it."""
    model = Stack()
    cache, allocation = cache_of(model), changing(targets_of(model), 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    inputs: list[tuple[Any, ...]] = [(IDS,), (IDS + 1,), (IDS.view(4, 2),), (IDS, mask), (IDS, ~mask)]
    inputs += [(IDS, mask.bfloat16()), (IDS, {"full": mask}), (IDS, {"full": ~mask}), (IDS, {"near": mask})]
    for arguments in inputs:
        with cache.reused(allocation):
            assert torch.equal(model(*arguments), Stack()(*arguments))
        assert model.runs == [1] * 6
    for arguments in inputs:
        with cache.reused(allocation):
            assert torch.equal(model(*arguments), Stack()(*arguments))
        assert model.runs == [0] * 4 + [1, 1]


def test_the_model_is_as_it_was_afterwards() -> None:
    model = Stack()
    cache = cache_of(model)
    model.layers[1].forward = special = model.layers[1].forward
    with cache.reused(changing(targets_of(model), 4)):
        model(IDS)
    with pytest.raises(TypeError), cache.reused(changing(targets_of(model), 4)):
        model()
    assert [vars(layer).get("forward") for layer in model.layers] == [None, special, None, None, None, None]
    assert not model._forward_pre_hooks
    model(IDS)
    assert model.runs == [2] * 6


def test_another_base_is_another_cache() -> None:
    """First changed counts from the base: ranks and methods, in either direction."""
    model = Stack()
    targets = targets_of(model)
    base = Allocation.of(
        {"layers.1.linear": 2, "layers.4.linear": 3}, targets, methods={"layers.1.linear": "weight"}
    )
    cache = PrefixCache(model, targets, base, 8, 1.0, 1)
    assert cache.first_changed(base) == 6
    assert cache.first_changed(Allocation.dense(targets)) == 1
    other = Allocation.of(base.to_dict(), targets, methods={"layers.1.linear": "feature"})
    assert cache.first_changed(other) == 1
    fewer = Allocation.of({"layers.1.linear": 2}, targets, methods=dict(base.methods))
    assert cache.first_changed(fewer) == 4


@pytest.mark.parametrize("beside", [(torch.zeros(1),), (None, 7)])
def test_a_block_that_hands_on_more_than_a_state_is_not_skipped(beside: tuple[Any, ...]) -> None:
    model = Stack(beside=beside)
    cache = cache_of(model)
    for _ in range(2):
        with cache.reused(changing(targets_of(model), 4)):
            model(IDS)
        assert model.runs == [1] * 6
    assert cache.bytes == 0


def test_a_block_that_runs_twice_is_not_skipped() -> None:
    model = Stack()
    model.layers[3] = model.layers[1]
    cache = cache_of(model)
    for _ in range(2):
        with cache.reused(changing(targets_of(model), 5)):
            assert torch.equal(model(IDS), model(IDS))
    assert cache.bytes == 0


def test_what_is_no_number_is_not_kept() -> None:
    """Else a pass that fails would begin behind the layer that broke, and name another."""
    model, ids = Stack(), torch.full((2, 4), torch.nan)
    cache = cache_of(model)
    with cache.reused(changing(targets_of(model), 5)):
        model(ids)
    assert cache.bytes == 0


def test_states_stay_within_their_memory() -> None:
    """A boundary of 8 tokens of 4 float32 takes 128 bytes; other inputs than the split's get no more."""
    for most in range(7):
        model = Stack()
        cache = cache_of(model, memory_mb=(128 * most + 127) / 1e6)
        for inputs in (1, 2, 3):
            with cache.reused(changing(targets_of(model), 5)):
                model(IDS + inputs)
            assert cache.bytes == 128 * min(most, 5 * inputs)


def test_boundaries_lose_least() -> None:
    """Of all choices of as many blocks, by trying them out."""
    assert boundaries(30, 1, 10**6) == tuple(range(1, 30))
    assert boundaries(30, 4, 10**6) == (4, 8, 12, 16, 20, 24, 28)
    assert boundaries(30, 4, 3) == (8, 16, 24)
    assert boundaries(30, 1, 1) == (15,)
    assert boundaries(30, 1, 0) == boundaries(1, 1, 9) == boundaries(30, 40, 9) == ()
    for blocks in (2, 7, 9):
        for most in range(1, blocks):
            choices = combinations(range(1, blocks), most)
            assert saved(boundaries(blocks, 1, most), blocks) == max(saved(c, blocks) for c in choices)


def saved(chosen: tuple[int, ...], blocks: int) -> int:
    """Blocks that a walk over all of them skips."""
    return sum(max((b for b in chosen if b <= changed), default=0) for changed in range(blocks))


def test_a_real_model_is_skipped_as_far_as_it_is_known(llama: Path, ids: torch.Tensor) -> None:
    """Stride 2 of three blocks: a trial that changes the last one restarts at it, one before it does not."""
    model = load_model(llama, ModelSource(str(llama)))
    targets = list_targets(model)
    cache = PrefixCache(model, targets, Allocation.dense(targets), ids[:4].numel(), 1.0, 2)
    runs: list[int] = []
    for number in range(3):
        model.get_submodule(f"model.layers.{number}.mlp").register_forward_hook(
            lambda *_, number=number: runs.append(number)
        )
    with torch.inference_mode():
        full = model(ids[:4]).logits
        for block, expected in ((2, [0, 1, 2]), (1, [0, 1, 2]), (2, [2])):
            runs.clear()
            allocation = Allocation.of({f"model.layers.{block}.mlp.up_proj": 3}, targets)
            with cache.reused(allocation):
                assert torch.equal(model(ids[:4]).logits, full)
            assert runs == expected
    assert cache.bytes == ids[:4].numel() * 32 * 4
