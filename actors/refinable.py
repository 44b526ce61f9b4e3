"""What every refinement shares: targets whose factors may move, and points told apart by held-out text.

The teacher is what `actors.divergence` keeps of the dense model. What is kept of a run is the point with the
lowest divergence on the held-out windows, and the start is one of the points: refining never makes it larger.
These windows are of the search split. Windows of the calibration text, even those that no step reads, would
tell wrong: the factors a run begins with were made from them, so the start looks better there than it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.divergence import DenseTop
from actors.linears import bias_of, weight_of
from actors.low_rank import Ranks, TrialLinear, factored_is_cheaper
from actors.perplexity import window_losses
from actors.refined import BIAS, LEFT, RIGHT, write
from actors.refinement import RefinementSpec, RefinementStep, windows_of
from actors.text import ScoredText
from actors.types import Allocation, RankfrontError

Tensor = torch.Tensor

CALIBRATION_TEXT = "calibration text"


@dataclass(frozen=True)
class Texts:
    """`training` (windows, window) is what factors are moved on; `held` tells a run's points apart."""

    training: Tensor
    held: ScoredText


def first_windows(text: ScoredText, tokens: int) -> ScoredText:
    """The first windows of a text, as many as `tokens` fill; one at least."""
    return replace(text, windows=text.windows[: windows_of(tokens, text.windows.shape[1])])


class RefinableLinear(nn.Module):
    """A target at a rank whose factors and bias move; all else is the dense layer's.

    Parameters are float32; products are made in the precision of what comes in, as a trial makes them.
    While `bypassed`, the dense layer runs in its place.
    """

    def __init__(
        self, dense: nn.Module, left: Tensor, right: Tensor, bias: Tensor | None, tokens: int
    ) -> None:
        """`left` (r, m), `right` (r, n) and `bias` (m,) as a factor store has them, on any device.

        `tokens` are those of a batch.
        Where the layer has a bias of its own and the factors bring none, it moves from zero.
        """
        super().__init__()
        weight, own = weight_of(dense), bias_of(dense)
        if bias is None and own is not None:
            bias = torch.zeros_like(own)
        self._dense = [dense]  # in a list: its parameters are not ours
        self.bypassed = False
        left, right = left.to(weight.device), right.to(weight.device)
        self.left = nn.Parameter(left.T.float().contiguous().clone())
        self.right = nn.Parameter(right.float().contiguous().clone())
        self.bias = None if bias is None else nn.Parameter(bias.to(weight.device).float().clone())
        self._factored = factored_is_cheaper(len(left), weight.shape[0], weight.shape[1], tokens)

    @property
    def dense(self) -> nn.Module:
        return self._dense[0]

    @property
    def weight(self) -> Tensor:
        """The dense parameter: some model code reads dtype or device from it."""
        return self.dense.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.bypassed:
            return self.dense(x)  # type: ignore[no-any-return]
        left, right, bias = self.left.to(x.dtype), self.right.to(x.dtype), bias_of(self.dense)
        if self.bias is not None:
            moved = self.bias.to(x.dtype)
            bias = moved if bias is None else bias + moved
        if self._factored:
            return nn.functional.linear(nn.functional.linear(x, right), left, bias)
        return nn.functional.linear(x, left @ right, bias)


@contextlib.contextmanager
def refinable(
    model: nn.Module, allocation: Allocation, store: Ranks, tokens: int
) -> Iterator[dict[str, nn.Parameter]]:
    """While open, every target with a rank is a `RefinableLinear`; yields what moves, by target and part.

    Raises:
        RankfrontError: the allocation is dense.
    """
    before = {name: model.get_submodule(name) for name, rank in allocation if rank is not None}
    if not before:
        raise RankfrontError("refine: every target is dense; there are no factors to refine")
    moving: dict[str, nn.Parameter] = {}
    try:
        for name, rank in allocation:
            if rank is None:
                continue
            dense = before[name].dense if isinstance(before[name], TrialLinear) else before[name]
            factors = store.rank(name, rank, allocation.method_of(name))
            layer = RefinableLinear(dense, *factors, tokens)  # type: ignore[arg-type]
            model.set_submodule(name, layer)
            parts = {LEFT: layer.left, RIGHT: layer.right, BIAS: layer.bias}
            moving |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
        yield moving
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@contextlib.contextmanager
def bypassed(layers: Sequence[RefinableLinear]) -> Iterator[None]:
    """While open, these targets are dense."""
    for layer in layers:
        layer.bypassed = True
    try:
        yield
    finally:
        for layer in layers:
            layer.bypassed = False


class HeldOut:
    """The points of a run by their divergence on the held-out windows, and the best of them.

    `scores` are of a step and in nats/token; `best` is what moved, as it stood at the best point, on the CPU:
    a device has as much to hold without it.
    """

    def __init__(
        self,
        model: nn.Module,
        moving: Mapping[str, Tensor],
        text: ScoredText,
        top: DenseTop,
        batch_tokens: int,
    ) -> None:
        """`top` is what is kept of the dense model on the windows of `text`."""
        self._model, self._moving = model, moving
        self._text, self._top, self._batch_tokens = text, top, batch_tokens
        self.scores: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    @property
    def best_score(self) -> tuple[int, float]:
        """Step and nats/token of the best point; of equal ones the first."""
        return min(self.scores, key=lambda score: score[1])

    def score(self, step: int) -> None:
        """Score the windows as a trial would be, and keep the point where it is the best.

        Raises:
            ScoringError: no finite divergence.
        """
        text = self._text
        name = f"held-out text {text.name}"
        found = window_losses(self._model, text.windows, self._batch_tokens, name, self._top, text.scored)
        assert found.kl is not None
        kl = (found.kl.sum() / text.scored.sum()).item()
        if not self.scores or kl < self.best_score[1]:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self._moving.items()}
        self.scores.append((step, kl))

    def keep(
        self,
        path: Path,
        allocation: Allocation,
        spec: RefinementSpec,
        ended: str,
        facts: Mapping[str, Any],
    ) -> None:
        """Leave the best point at `path`; its manifest says how the run went, and `facts`.

        Raises:
            RankfrontError: the disk is full or refuses.
        """
        step, kl = self.best_score
        manifest = {
            **facts,
            "ranks": allocation.to_dict(),
            "methods": dict(allocation.methods),
            "spec": spec.to_dict(),
            "ended": ended,
            "step": step,
            "held_out": {"before": self.scores[0][1], "after": kl},
            "scores": self.scores,
        }
        write(path, self.best, manifest)

    def told(
        self,
        step: int,
        steps: int,
        training: float | None = None,
        ended: str | None = None,
        workers: int = 1,
    ) -> RefinementStep:
        """How far the run is."""
        best_step, best = self.best_score
        return RefinementStep(step, steps, training, self.scores[-1][1], best, best_step, ended, workers)
