"""A model on several devices: each holds a span of its blocks, with their factors, one after another.

What stands before the blocks (embeddings) is with the first span, what has parameters and stands behind them
(norm, head) with the last. A head that shares the embedding's weights stays with these, and hidden states go
back to it. Hooks bring what a module is given to the module's device; all else is the model's own code.
"""

from __future__ import annotations

import threading
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from actors.busy import Busy
from actors.factors import FactorStore
from actors.linears import weight_of
from actors.models import decoder_blocks
from actors.relay import Relay, conduct
from actors.types import RankfrontError, TargetSpec

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """Bytes of each block, weights and factors; and of what goes with the first and with the last of them."""

    blocks: tuple[int, ...]
    before: int
    behind: int


def split(sizes: Sizes, parts: int) -> tuple[range, ...]:
    """Blocks in `parts` runs, none empty, of which the largest in bytes is as small as can be.

    Raises:
        RankfrontError: there are fewer blocks than parts.
    """
    count = len(sizes.blocks)
    if parts > count:
        raise RankfrontError(
            f"replicas.gpus: {parts} GPUs share {count} decoder blocks; {count} at most for this model"
        )
    ends = [sizes.before]  # bytes up to each border between blocks
    for size in sizes.blocks:
        ends.append(ends[-1] + size)
    # For each border, the least that the largest run before it takes, and the borders that give it.
    best: list[tuple[int, tuple[int, ...]]] = [(end, ()) for end in ends]
    for part in range(2, parts + 1):
        last = sizes.behind if part == parts else 0
        best = [
            min(
                (max(best[cut][0], ends[border] - ends[cut] + last), (*best[cut][1], cut))
                for cut in range(part - 1, border)
            )
            if border >= part
            else best[border]
            for border in range(count + 1)
        ]
    borders = (0, *best[count][1], count)
    return tuple(range(first, end) for first, end in pairwise(borders))


@dataclass(frozen=True)
class _Parts:
    """Modules outside the blocks that hold parameters or buffers of their own, by where they go."""

    before: tuple[nn.Module, ...]
    behind: tuple[nn.Module, ...]


def _parts(model: nn.Module) -> _Parts:
    prefix, blocks = decoder_blocks(model)
    before: list[nn.Module] = []
    behind: list[nn.Module] = []
    passed = False
    for name, module in model.named_modules():
        passed = passed or module is blocks
        if name == prefix or name.startswith(f"{prefix}."):
            continue
        own = [*module.parameters(recurse=False)]
        known = {id(parameter) for other in before for parameter in other.parameters(recurse=False)}
        if passed and own and not known & {id(parameter) for parameter in own}:
            behind.append(module)
        elif own or [*module.buffers(recurse=False)]:
            before.append(module)
    return _Parts(tuple(before), tuple(behind))


def sizes_of(model: nn.Module, targets: Sequence[TargetSpec], store: FactorStore) -> Sizes:
    """What has to be held of a model and of its targets, a second weight of each for trials included."""
    parts, seen = _parts(model), set[int]()

    def new(tensors: Iterator[Tensor]) -> int:
        found = {id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in seen}
        seen.update(found)
        return sum(found.values())

    before = sum(new(module.parameters(recurse=False)) for module in parts.before)
    blocks = [new(block.parameters()) for block in decoder_blocks(model)[1]]
    behind = sum(new(module.parameters(recurse=False)) for module in parts.behind)
    for target in targets:
        product = weight_of(model.get_submodule(target.name)).nbytes
        blocks[target.block] += product + store.bytes_of(target.name)
    return Sizes(tuple(blocks), before, behind)


def spread(
    model: nn.Module,
    targets: Sequence[TargetSpec],
    store: FactorStore,
    devices: Sequence[str],
    busy: Busy,
) -> tuple[range, ...]:
    """Put the blocks of a model, and their factors, on `devices`, in order; returns the span of each.

    Passes of the model then go from device to device, and `actors.relay.passes` has several under way and
    counts in `busy` what each device works.
    Inputs are those of the first device, where the first parameter is; logits are where the head is.

    Raises:
        RankfrontError: there are more devices than blocks.
    """
    spans = split(sizes_of(model, targets, store), len(devices))
    parts, blocks = _parts(model), decoder_blocks(model)[1]
    relay = Relay(busy)
    conduct(model, relay)
    hooks = _Hooks(relay)
    model.register_forward_pre_hook(hooks.begin)
    model.register_forward_hook(hooks.end, always_call=True)
    placed: set[int] = set()
    for place, (device, span) in enumerate(zip(devices, spans, strict=True)):
        for index in span:
            if id(blocks[index]) not in placed:  # some models run one block at several depths
                placed.add(id(blocks[index]))
                blocks[index].to(device)
                blocks[index].register_forward_pre_hook(hooks.onto(place, device), with_kwargs=True)
    for module in parts.behind:
        module.to(devices[-1])
        module.register_forward_pre_hook(hooks.onto(len(devices) - 1, devices[-1]), with_kwargs=True)
    for module in parts.before:
        _move_own(module, devices[0])
        if not any(module is outer for outer in _around(model, blocks)):
            module.register_forward_pre_hook(hooks.onto(0, devices[0]), with_kwargs=True)
    place_of = {index: device for device, span in zip(devices, spans, strict=True) for index in span}
    store.place({target.name: place_of[target.block] for target in targets})
    return spans


def _around(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules that the blocks are in: a pass is inside them all the way."""
    return [module for module in model.modules() if any(inner is blocks for inner in module.modules())]


def _move_own(module: nn.Module, device: str) -> None:
    """Move what a module holds itself, and nothing of the modules in it; what is tied stays tied."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


class _Hooks:
    """Brings tensors along as a pass goes from device to device; of each pass in the pass's own thread.

    What a span's first block is given (a mask, rotary embeddings) its others are given as well: it is brought
    once, as every copy between two devices has each wait for the other.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay, self._here = relay, threading.local()

    def begin(self, model: nn.Module, args: Any) -> None:
        """A pass begins, on the first device."""
        self._here.place = 0
        self._here.brought = {}

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A pass has ended, or failed."""
        self._here.brought = {}

    def onto(self, place: int, device: str) -> Callable[..., Any]:
        """The hook of a module on the device at `place`."""

        def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if self._here.place == place:
                return self._bring(args, device), self._bring(keywords, device)
            self._here.brought = {}
            self._relay.leave()
            self._here.place = place
            brought = self._bring(args, device), self._bring(keywords, device)
            self._relay.arrive(place)
            return brought

        return hook

    def _bring(self, given: Any, device: str) -> Any:
        if isinstance(given, Tensor):
            if given.device == torch.device(device):
                return given
            brought = self._here.brought
            if id(given) not in brought:
                brought[id(given)] = given, given.to(device)  # held, so that no other takes over its id
            return brought[id(given)][1]
        if isinstance(given, dict):
            return {key: self._bring(value, device) for key, value in given.items()}
        if isinstance(given, tuple | list):
            return type(given)(self._bring(value, device) for value in given)
        if isinstance(given, UserDict):  # K/V that blocks share: those behind read what these write into it
            for key, value in given.items():
                given[key] = self._bring(value, device)
        return given
