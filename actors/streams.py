"""A text on its way through a model, block by block: one block's hidden states are held, not the model's.

Blocks that were passed hand on what they are given and the next one reads the held state in its place:
masks, positions and rotary embeddings stay the work of the model's own code, whatever its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from actors.errors import OpaqueModelError
from actors.models import decoder_blocks
from actors.passes import counted, leaving
from actors.planning import PROBE_TOKENS
from actors.prefix import BARE, OPAQUE, form_of, set_forward

Tensor = torch.Tensor


class _Through(Exception):  # noqa: N818 (no error: the block has run, nothing behind it needs to)
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Stream:
    """The hidden states of `windows` (windows, window) as they enter one decoder block, batch by batch.

    They take windows x window x hidden size values of the model's precision, on its device. Blocks that
    were passed may change meanwhile: what they made is held.
    """

    def __init__(self, model: nn.Module, windows: Tensor, rows: int, layers: Iterable[str] = ()) -> None:
        """`rows` are the windows of a batch; `layers` are those that the blocks are asked for.

        Raises:
            OpaqueModelError: the model runs a block, or one of the layers, more than once in a pass, or a
                block leaves something for later ones in a mapping that it is called with.
        """
        prefix, self._blocks = decoder_blocks(model)
        self._model = model
        self._batches = windows.split(rows)
        blocks = {f"{prefix}.{index}": block for index, block in enumerate(self._blocks)}
        self._refuse_opaque(blocks, blocks | {name: model.get_submodule(name) for name in layers})
        # None: block 0 reads what the model gives it.
        self._states: list[Tensor | None] = [None] * len(self._batches)
        self._forms: list[int] = []  # what each passed block handed on

    @torch.no_grad()
    def _refuse_opaque(self, blocks: Mapping[str, nn.Module], watched: Mapping[str, nn.Module]) -> None:
        """Before any work is done; what a block returns is seen as the text comes to it."""
        with counted(watched) as calls, leaving(blocks) as left:
            self._model(self._there(self._batches[0][:1, :PROBE_TOKENS]), use_cache=False)
        again = next((name for name in watched if calls[name] > 1), None)
        if again is not None:
            raise OpaqueModelError(
                f"{type(self._model).__name__} runs {again} more than once in a pass, so no text can be "
                "taken through it block by block; use refine.method: gradient"
            )
        first = next((name for name in blocks if name in left), None)
        if first is not None:
            raise OpaqueModelError(
                f"{type(self._model).__name__}: {first} leaves something for later blocks (as shared K/V) in "
                "a mapping that it is called with, so no text can be taken through block by block; use "
                "refine.method: gradient"
            )

    def _there(self, ids: Tensor) -> Tensor:
        return ids.to(next(self._model.parameters()).device)

    @property
    def block(self) -> int:
        """The block that the states enter."""
        return len(self._forms)

    @property
    def batches(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def run(self, number: int) -> Any:
        """Send a batch into the block; returns what that hands on. What a hook raises ends it before."""
        batch = self._there(self._batches[number])
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks[: self.block + 1]):
                stack.callback(set_forward, block, vars(block).get("forward"))
                passed = index < self.block
                run = _handing_on(self._forms[index]) if passed else self._entered(number, block.forward)
                set_forward(block, run)
            try:
                self._model(batch, use_cache=False)
            except _Through as end:
                return end.output
        raise OpaqueModelError(f"{type(self._model).__name__} never ran its decoder block {self.block}")

    def advance(self) -> None:
        """Take every batch through the block.

        Raises:
            OpaqueModelError: it hands on more than hidden states.
        """
        form = OPAQUE
        for number in range(self.batches):
            output = self.run(number)
            form = form_of(output)
            if form == OPAQUE:
                raise OpaqueModelError(
                    f"{type(self._model).__name__}: decoder block {self.block} hands on more than hidden "
                    "states, so no text can be taken through block by block; use refine.method: gradient"
                )
            self._states[number] = output if form == BARE else output[0]
        self._forms.append(form)

    def _entered(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that begins with the held state and ends the pass."""

        def run(hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
            state = self._states[number]
            if state is not None:
                hidden_states = state.clone()  # some blocks work in place
            raise _Through(forward(hidden_states, *args, **keywords))

        return run


def _handing_on(form: int) -> Callable[..., Any]:
    """The forward of a passed block, which hands on what it is given, in the form it used."""

    def run(hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        return hidden_states if form == BARE else (hidden_states, *[None] * (form - 1))

    return run
