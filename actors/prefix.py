"""Prefix reuse: a trial starts at its first changed block, from hidden states kept of earlier passes.

What enters block b depends on the input and on the blocks below b alone. A trial whose targets below b are
those of the base allocation finds there, to the bit, what any other such trial left there. So states are
kept as trials come by: one that changes block c first leaves the boundaries up to c, at no pass of its own.

Skipped blocks hand on what they are given and the restart block reads the kept state in its place: masks,
positions and rotary embeddings stay the work of the model's own code, whatever its family.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from actors.models import decoder_blocks
from actors.nonfinite import all_finite
from actors.passes import left_in
from actors.types import Allocation, TargetSpec

Tensor = torch.Tensor

# What a block hands on: a tensor, a tuple of so many that holds nothing beside it, or more than a state.
BARE, OPAQUE = 0, -1


class PrefixCache:
    """Hidden states that enter decoder blocks under `base`, of every batch of one split.

    Invariants: a state is used only by a trial that agrees with `base` in every target below its block, and
    only for the very input it came from (ids, positions, mask, by digest); only finite states are kept;
    `bytes` never exceeds the memory. A block that hands on more than a hidden state, be it in a mapping that
    it is called with, ends what can be skipped. A model that runs a block again, or an earlier one after it,
    skips none: of a block's inputs one is kept, and what enters a block a second time depends on blocks
    behind it.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: tuple[TargetSpec, ...],
        base: Allocation,
        tokens: int,
        memory_mb: float,
        stride: int,
    ) -> None:
        """`tokens` are those of one pass over the split; `memory_mb` is in 10^6 bytes."""
        self._model, self._blocks = model, decoder_blocks(model)[1]
        self._targets, self._base = targets, base
        self._tokens, self._memory, self._stride = tokens, memory_mb * 1e6, stride
        one_each = len({id(block) for block in self._blocks}) == len(self._blocks)
        self._boundaries: tuple[int, ...] | None = None if one_each else ()
        self._forms = [OPAQUE] * len(self._blocks)  # until a block has been seen to run
        self._states: dict[bytes, dict[int, Tensor]] = {}  # by input, then by block
        self._pass = threading.local()  # of each pass under way: its states, and the block it starts at

    @property
    def bytes(self) -> int:
        return sum(state.nbytes for batch in self._states.values() for state in batch.values())

    def first_changed(self, allocation: Allocation) -> int:
        """The first block with a target that is not as in the base; the number of blocks where none is."""
        return min(
            (
                target.block
                for target, (name, rank), (_, based) in zip(
                    self._targets, allocation, self._base, strict=True
                )
                if (rank, allocation.method_of(name)) != (based, self._base.method_of(name))
            ),
            default=len(self._blocks),
        )

    @contextmanager
    def reused(self, allocation: Allocation) -> Iterator[None]:
        """While open, passes of the model, which has `allocation` installed, skip what is known of it."""
        changed = self.first_changed(allocation)
        with ExitStack() as stack:
            begin = self._model.register_forward_pre_hook(self._begin(changed), with_kwargs=True)
            stack.callback(begin.remove)
            for index, block in enumerate(self._blocks[: changed + 1]):
                stack.callback(set_forward, block, vars(block).get("forward"))
                set_forward(block, self._wrapped(index, block.forward))
            yield

    def _begin(self, changed: int) -> Callable[..., None]:
        """Looks up the input of a pass, and the block it starts at: 0 where nothing is known of it."""

        def hook(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            batch = self._states.setdefault(_digest(args, keywords), {})
            self._pass.batch = batch
            self._pass.restart = max((block for block in batch if block <= changed), default=0)
            self._pass.last = -1

        return hook

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that hands on, restarts, or runs and keeps."""

        def run(hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
            restart = self._pass.restart
            if index <= self._pass.last:  # seen in the first pass there is, which starts at block 0
                self._boundaries = ()
                self._states.clear()
            self._pass.last = index
            if index < restart:
                form = self._forms[index]
                return hidden_states if form == BARE else (hidden_states, *[None] * (form - 1))
            if index and index == restart:
                hidden_states = self._pass.batch[index].clone()  # some blocks work in place
            elif index:
                self._keep(index, hidden_states)
            left = left_in(args, keywords)
            output = forward(hidden_states, *args, **keywords)
            self._forms[index] = OPAQUE if left() else form_of(output)
            return output

        return run

    def _keep(self, index: int, state: Tensor) -> None:
        if self._boundaries is None:
            each = self._tokens * state.shape[-1] * state.element_size()
            self._boundaries = boundaries(len(self._blocks), self._stride, int(self._memory // each))
        if index not in self._boundaries or OPAQUE in self._forms[:index]:
            return
        if self.bytes + state.nbytes <= self._memory and all_finite(state):
            self._pass.batch[index] = state.clone()


def boundaries(blocks: int, stride: int, most: int) -> tuple[int, ...]:
    """Every `stride`-th block after the first, or where those are more than `most`, so many spread evenly.

    Even distances lose least: a walk over all blocks restarts on average half a distance too early, while
    the last `most` blocks would save nothing of a trial that changes an earlier one.
    """
    wanted = range(stride, blocks, stride)
    chosen = min(most, len(wanted))
    return tuple(wanted[place * (len(wanted) + 1) // (chosen + 1) - 1] for place in range(1, chosen + 1))


def form_of(output: Any) -> int:
    """What a block handed on: `BARE`, how long a tuple that holds nothing beside the state, or `OPAQUE`."""
    if isinstance(output, Tensor):
        return BARE
    alone = isinstance(output, tuple) and all(part is None for part in output[1:])
    return len(output) if alone else OPAQUE


def set_forward(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a block a forward of its own; None gives it that of its class again."""
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward


def _digest(args: tuple[Any, ...], keywords: dict[str, Any]) -> bytes:
    """Of every tensor a model is called with, by its place, type, shape and content; of a mapping (masks by
    type of layer) those in it."""
    found = hashlib.blake2b(digest_size=16)
    given: dict[str, Any] = {str(place): value for place, value in enumerate(args)} | keywords
    for name, value in list(given.items()):
        if isinstance(value, Mapping):
            given |= {f"{name}.{key}": each for key, each in value.items()}
    for place, value in sorted(given.items()):
        if isinstance(value, Tensor):
            found.update(f"{place} {value.dtype} {tuple(value.shape)} ".encode())
            found.update(value.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.digest()
