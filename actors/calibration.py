"""Input moments of every target, streamed over the calibration text in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from actors.decompose import Moments
from actors.types import TargetSpec

Tensor = torch.Tensor


@dataclass
class _Accumulator:
    """Sums of d-vectors and of their outer products about a fixed `shift`, in float64.

    The shift (the first batch's mean) keeps the subtraction of the mean at the end from cancelling:
    some activations have means hundreds of times their deviation.
    """

    full: bool
    tokens: int = 0
    shift: Tensor | None = None
    total: Tensor | None = None
    outer: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """`values`: (..., d), one row per token."""
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        if self.shift is None:
            self.shift = rows.mean(0)
            self.total = torch.zeros_like(self.shift, dtype=torch.float64)
            if self.full:
                width = rows.shape[1]
                self.outer = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        assert self.total is not None
        centred = rows - self.shift
        self.tokens += rows.shape[0]
        self.total += centred.sum(0, dtype=torch.float64)
        if self.outer is not None:
            self.outer += centred.T @ centred

    def mean(self) -> Tensor:
        assert self.shift is not None
        assert self.total is not None
        return self.shift.double() + self.total / self.tokens

    def covariance(self) -> Tensor:
        assert self.outer is not None
        assert self.total is not None
        residue = self.total / self.tokens
        covariance = self.outer / self.tokens - torch.outer(residue, residue)
        return (covariance + covariance.T) / 2


class _Tap:
    """Finds which targets read the same tensor (q/k/v, gate/up): the first of a run leads the others.

    The last tensor is held, so its identity cannot be taken over by another meanwhile.
    """

    def __init__(self) -> None:
        self.leaders: dict[str, str] = {}
        self._tensor: Tensor | None = None
        self._leader = ""

    def note(self, name: str, inputs: Tensor) -> None:
        if inputs is not self._tensor:
            self._tensor, self._leader = inputs, name
        self.leaders[name] = self._leader


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


def _run_hooked(model: nn.Module, hooks: dict[str, Hook], batches: Sequence[Tensor]) -> None:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        with torch.inference_mode():
            for batch in batches:
                model(batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(model: nn.Module, targets: Sequence[TargetSpec], tokens: Tensor) -> dict[str, str]:
    """For every target the first target that reads the same input; `tokens` is a (1, few) probe."""
    tap = _Tap()

    def hook_of(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tap.note(name, args[0])

        return hook

    _run_hooked(model, {target.name: hook_of(target.name) for target in targets}, [tokens])
    return tap.leaders


def collect_moments(
    model: nn.Module,
    targets: Sequence[TargetSpec],
    windows: Tensor,
    batch_tokens: int = 2048,
) -> dict[str, Moments]:
    """Moments of every target over `windows` (windows, window), each forward pass in small batches.

    A target keeps the moment of its smaller side, min(m, n) wide; one whose input is accumulated
    for another target anyway uses that. Equal to a single batch up to float32 rounding.
    """
    device = next(model.parameters()).device
    leaders = shared_inputs(model, targets, windows[:1, :4].to(device))
    needed = {leaders[t.name] for t in targets if t.cols <= t.rows}
    inputs = {name: _Accumulator(full=name in needed) for name in set(leaders.values())}
    outputs = {t.name: _Accumulator(full=True) for t in targets if leaders[t.name] not in needed}

    def hook_of(name: str) -> Hook:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if leaders[name] == name:
                inputs[name].add(args[0])
            if name in outputs:
                bias = module.bias
                outputs[name].add(output if not isinstance(bias, Tensor) else output - bias)

        return hook

    rows = max(1, batch_tokens // windows.shape[1])
    batches = [windows[start : start + rows].to(device) for start in range(0, len(windows), rows)]
    _run_hooked(model, {target.name: hook_of(target.name) for target in targets}, batches)

    means = {name: accumulator.mean() for name, accumulator in inputs.items()}
    covariances = {name: inputs[name].covariance() for name in needed}

    def moments_of(target: TargetSpec) -> Moments:
        leader = leaders[target.name]
        mean, tokens = means[leader], inputs[leader].tokens
        if leader in needed:
            return Moments("input", covariances[leader], mean, mean, tokens)
        output = outputs[target.name]
        return Moments("output", output.covariance(), output.mean(), mean, tokens)

    return {target.name: moments_of(target) for target in targets}
