"""What a token costs to compute beside its targets, read off a model: the driver has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from actors.families import FAMILIES, family_of
from actors.linears import is_linear, weight_of
from actors.types import Operations, TargetSpec

FULL, SLIDING = "full_attention", "sliding_attention"


def operations(model: nn.Module, targets: Iterable[TargetSpec]) -> Operations | None:
    """Multiply-accumulates of a token in everything but the targets.

    None where they are not known: a family without a file of its own may attend in any way, blocks may do
    other things than attend, and a linear layer under several names runs an unknown number of times.
    """
    names = {target.name for target in targets}
    modules = list(model.named_modules(remove_duplicate=False))
    linears = [(name, module) for name, module in modules if is_linear(module)]
    repeated = max(Counter(id(module) for _, module in linears).values(), default=1) > 1
    attention = _attention(model)
    if repeated or attention is None:
        return None
    other = sum(weight_of(module).numel() for name, module in linears if name not in names)
    return Operations(other, attention)


def _attention(model: nn.Module) -> tuple[tuple[int, int | None], ...] | None:
    """Of each block: multiply-accumulates for one position attended to, and the most positions."""
    if family_of(model) not in FAMILIES:
        return None
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    usual = FULL if window is None else SLIDING
    kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    if not set(kinds) <= {FULL, SLIDING}:
        return None
    return tuple((2 * heads * size, window if kind == SLIDING else None) for kind in kinds)
