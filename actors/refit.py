"""Refit the factors of one allocation in closed form, each target against the compressed ones before it.

Targets go in the order they run. With x the dense model's input of a target and x' the one it has where all
targets before it are refitted, its factors and its bias become those of least squared error of its output
over the training windows (`actors.regression`). No steps, no learning rate, nothing of the loss.

Two streams of the text go through the model block by block (`actors.streams`), so one block's hidden states
and one input's moments are held at a time. Held-out windows are scored as blocks are done, and decide which
point is kept (`actors.refinable`): of block b, the targets up to it are refitted and the others are not.

A run takes as long as a few passes over the text and its decompositions; one that was killed begins anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.divergence import dense_top
from actors.errors import OpaqueModelError
from actors.linears import weight_of
from actors.low_rank import Ranks
from actors.models import decoder_blocks
from actors.planning import Tap
from actors.refinable import HeldOut, RefinableLinear, Texts, bypassed, refinable
from actors.refinement import RefinementSpec, RefinementStep
from actors.regression import Joint, JointScatter, best_bias, correction, excess, regressed
from actors.streams import Stream
from actors.types import Allocation, RankfrontError

Tensor = torch.Tensor


class _Read(Exception):  # noqa: N818 (no error: what the pass is for has been seen)
    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class Refit:
    """One run: the dense and the compressed model's hidden states, and the targets behind them."""

    def __init__(self, model: nn.Module, allocation: Allocation, windows: Tensor, batch_tokens: int) -> None:
        """Every target with a rank is a `RefinableLinear` of `model`; `windows` (windows, window) to fit to.

        Raises:
            RankfrontError: the model cannot be taken through block by block.
        """
        self._model = model
        prefix, blocks = decoder_blocks(model)
        ranked = [name for name, rank in allocation if rank is not None]
        self._targets = [
            [name for name in ranked if name.startswith(f"{prefix}.{index}.")] for index in range(len(blocks))
        ]
        rows = max(1, batch_tokens // windows.shape[1])
        self._dense, self._compressed = (Stream(model, windows, rows, ranked) for _ in range(2))

    @property
    def blocks(self) -> int:
        """How many blocks there are up to the last that has a target with a rank."""
        return 1 + max(index for index, names in enumerate(self._targets) if names)

    @torch.no_grad()
    def advance(self) -> None:
        """Refit the targets of the next block in the order they run, and take both streams through it.

        Raises:
            RankfrontError: moments that are not finite, naming the target; a block that hands on more than
                hidden states.
        """
        names = self._targets[self._compressed.block]
        for group in self._groups(names) if names else []:
            joint = self._measured(group[0], names)
            corrections: dict[str, Tensor] = {}
            for name in group:
                self._refit(name, joint, corrections)
        with self._bypassed(names):
            self._dense.advance()
        self._compressed.advance()

    def _layer(self, name: str) -> RefinableLinear:
        layer = self._model.get_submodule(name)
        assert isinstance(layer, RefinableLinear)
        return layer

    def _bypassed(self, names: list[str]) -> contextlib.AbstractContextManager[None]:
        """While open, these targets are dense."""
        return bypassed([self._layer(name) for name in names])

    def _groups(self, names: list[str]) -> list[list[str]]:
        """A block's targets in the order they run, those that read one input (q/k/v, gate/up) together."""
        tap = Tap()

        def hook_of(name: str) -> Callable[..., None]:
            return lambda module, args: tap.note(name, args[0])

        with contextlib.ExitStack() as stack:
            for name in names:
                stack.callback(self._layer(name).register_forward_pre_hook(hook_of(name)).remove)
            self._compressed.run(0)
        groups: dict[str, list[str]] = {}
        for name, leader in tap.leaders.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def _measured(self, name: str, names: list[str]) -> Joint:
        """Moments of a target's input in both streams; `names` are the targets of its block."""
        scatter = JointScatter()
        for number in range(self._dense.batches):
            with self._bypassed(names):
                dense = self._inputs(self._dense, number, name)
            scatter.add(dense, self._inputs(self._compressed, number, name))
        return scatter.take()

    def _inputs(self, stream: Stream, number: int, name: str) -> Tensor:
        """What a target of the block reads of a batch (windows, window, n)."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Read(args[0])

        handle = self._layer(name).register_forward_pre_hook(hook)
        try:
            stream.run(number)
        except _Read as seen:
            return seen.inputs
        finally:
            handle.remove()
        raise AssertionError(f"{name} ran before and does not run now")

    def _refit(self, name: str, joint: Joint, corrections: dict[str, Tensor]) -> None:
        """Move a target to its refitted factors; to its best bias alone where damping made them no better.

        `corrections` are those of its input by bias, made at their first use.
        """
        layer = self._layer(name)
        matrix, bias = weight_of(layer.dense).double(), "none" if layer.bias is None else "mean"
        if bias not in corrections:
            corrections[bias] = correction(name, joint, bias)
        rank = layer.right.shape[0]
        left, right = regressed(name, matrix, joint, corrections[bias], rank, bias)
        product, before = left @ right, layer.left.double() @ layer.right.double()
        if excess(matrix, product, joint, bias) < excess(matrix, before, joint, bias):
            layer.left.copy_(left)
            layer.right.copy_(right)
        else:
            product = before
        if layer.bias is not None:
            layer.bias.copy_(best_bias(matrix, product, joint))


def refit(
    model: nn.Module,
    store: Ranks,
    allocation: Allocation,
    texts: Texts,
    spec: RefinementSpec,
    path: Path,
    facts: Mapping[str, Any],
) -> Iterator[RefinementStep]:
    """Refit `allocation` on `texts.training` and leave the best point at `path`, with `facts` in its
    manifest. A step is a block. `model` is dense when this starts, and as it was when it ends.

    Raises:
        RankfrontError: nothing to refine, a model that cannot be taken through block by block.
        ScoringError: the start has no finite divergence.
    """
    held = texts.held
    top = dense_top(model, held.windows, spec.batch_tokens, spec.top_k, held.name)
    with refinable(model, allocation, store, spec.batch_tokens) as moving:
        points = HeldOut(model, moving, held, top, spec.batch_tokens)
        run = Refit(model, allocation, texts.training, spec.batch_tokens)
        points.score(0)
        steps, ended = run.blocks, f"{run.blocks} blocks"
        for step in range(1, steps + 1):
            yield points.told(step - 1, steps)
            try:
                run.advance()
                if step % spec.evaluate_every == 0 or step == steps:
                    points.score(step)
            except OpaqueModelError:
                raise
            except RankfrontError as error:  # what compressed targets give is not finite any more
                ended = str(error)
                break
        points.keep(path, allocation, spec, ended, facts)
    # Only now: who hears of an end finds its file.
    yield points.told(step, steps, ended=ended)
