"""Mixtures of experts, told by the config or by the structure: no family is for them yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from actors.linears import is_linear, weight_of

NO_ADAPTER = "mixes experts, which has no adapter yet"

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def experts_of_config(config: Any) -> int:
    """Experts of a block as far as a config says under the names known here; one is no mixture."""
    parts = (config, config.get_text_config(decoder=True))
    counts = (getattr(part, key, None) for part in parts for key in _EXPERT_KEYS)
    return max(count for count in (*counts, 1) if isinstance(count, int))


def find_experts(blocks: nn.ModuleList) -> str | None:
    """What in a list of decoder blocks looks like experts, in words; None where nothing does."""
    for index, block in enumerate(blocks):
        for what in (*_listed(block), *_stacked(block)):
            return f"block {index}, {what}"
    return None


def _listed(block: nn.Module) -> Iterator[str]:
    """Lists of MLPs of one shape. Runs of layers are lists as well, but those hold more than an MLP."""
    for name, group in block.named_modules():
        if isinstance(group, nn.ModuleList | nn.ModuleDict) and len(group) > 1:
            entries = list(group.children())
            shapes = {tuple(tuple(parameter.shape) for parameter in one.parameters()) for one in entries}
            if len(shapes) == 1 and all(_is_mlp(entry) for entry in entries):
                yield f"{name}: {len(entries)} MLPs of one shape"


def _is_mlp(module: nn.Module) -> bool:
    """Linear layers and nothing else with parameters, which lead back to the width they read."""
    linears = [layer for layer in module.modules() if is_linear(layer)]
    own = sum(1 for layer in linears for _ in layer.parameters())
    if len(linears) < 2 or own != sum(1 for _ in module.parameters()):
        return False
    width = weight_of(linears[0]).shape[1]
    return any(weight_of(layer).shape[0] == width for layer in linears[1:])


def _stacked(block: nn.Module) -> Iterator[str]:
    """Parameters (experts, m, n) that are called experts, or that are an MLP's layers up and down.

    Not all that is three-dimensional is a mixture: kernels of convolutions are not, nor projections
    and gates per head (XLNet, RecurrentGemma, Zamba).
    """
    shapes: dict[int, set[tuple[int, int]]] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 3 or min(parameter.shape) == 1:
                continue
            count, rows, cols = parameter.shape
            others = shapes.setdefault(count, set())
            full_name = f"{path}.{name}".removeprefix(".")
            called = "expert" in f"{full_name} {type(module).__name__}".lower()
            if called or any(_up_and_down((rows, cols), other) for other in others):
                yield f"{full_name}: {count} matrices {(rows, cols)} in one parameter"
            others.add((rows, cols))


def _up_and_down(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two shapes are an MLP's: unlike, of one size, or one twice the other (gate and up in one)."""
    small, large = sorted(rows * cols for rows, cols in (one, other))
    return one != other and large in (small, 2 * small)
