"""Whether a pass is of numbers only; and where it first leaves them, looked for once a score has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from actors.low_rank import TrialLinear


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Whether every logit is a number, on their device: their sum is one only then, and reads them once."""
    return torch.isfinite(logits.sum(dtype=torch.float32))


def all_finite(logits: torch.Tensor) -> bool:
    """The same as a value, which waits for the device."""
    return bool(finite(logits))


@torch.inference_mode()
def culprit(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The first layer of `model` whose output is not finite while `forward` runs, as the end of a reason.

    A layer is a target, or a module without modules of its own (a norm, the head): what goes wrong between
    layers, in attention say, shows in the layer that reads it.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in _layers(model)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"first in {found[0]}" if found else "though the output of every layer is finite"


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Targets and modules without children, by name; not the whole model itself."""
    children = list(module.named_children())
    if name and (not children or isinstance(module, TrialLinear)):
        yield name, module
        return
    for own, child in children:
        yield from _layers(child, f"{name}.{own}" if name else own)
