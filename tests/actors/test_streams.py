"""What no text is taken through block by block. That it has the bits of a full pass is in the contract."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from actors.streams import Stream
from actors.types import RankfrontError

WIDTH = 4


class Block(nn.Module):
    def __init__(self, beside: tuple[Any, ...]) -> None:
        super().__init__()
        self.linear, self.beside = nn.Linear(WIDTH, WIDTH), beside

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return (self.linear(hidden_states), *self.beside)


class Model(nn.Module):
    """Two blocks that hand on a tuple; `unused` of them are never run."""

    def __init__(self, blocks: list[Block], unused: int = 0) -> None:
        super().__init__()
        self.layers, self.unused = nn.ModuleList(blocks), unused
        self.config = SimpleNamespace(model_type="made-up")

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = ids[..., None].repeat(1, 1, WIDTH).float()
        for layer in self.layers[: len(self.layers) - self.unused]:
            hidden = layer(hidden)[0]
        return hidden


IDS = torch.arange(6).view(3, 2)


def test_a_block_that_hands_on_a_tuple_is_passed() -> None:
    model = Model([Block((None,)), Block((None,))])
    stream = Stream(model, IDS, rows=2)
    stream.advance()
    assert (stream.block, stream.batches) == (1, 2)
    assert torch.equal(stream.run(1)[0], model(IDS[2:], use_cache=False))


def test_a_block_that_hands_on_more_than_a_state_is_refused() -> None:
    stream = Stream(Model([Block((None,)), Block((torch.ones(1),))]), IDS, rows=3)
    stream.advance()
    with pytest.raises(RankfrontError, match=r"Model: decoder block 1 hands on more .* gradient"):
        stream.advance()


def test_a_block_in_two_places_is_refused() -> None:
    block = Block((None,))
    with pytest.raises(RankfrontError, match=r"Model runs layers\.0 more than once in a pass, .* gradient"):
        Stream(Model([block, block]), IDS, rows=3)


def test_a_block_that_is_never_run_is_said() -> None:
    with pytest.raises(RankfrontError, match="never ran its decoder block 0"):
        Stream(Model([Block((None,))], unused=1), IDS, rows=3).run(0)
