"""The adapter of a model that no family is for: every linear layer inside its decoder blocks."""

from __future__ import annotations

from torch import nn

from actors.families.family import Family
from actors.linears import is_linear
from actors.types import RankfrontError


def largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of what are taken for the decoder blocks: the module list with most parameters.

    Raises:
        RankfrontError: the model has no list of modules.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise RankfrontError(f"{type(model).__name__} has no list of decoder blocks, so no targets")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def generic(model: nn.Module, model_type: str) -> Family:
    """A family made for `model` alone. Its blocks may differ, so each may lack what another has."""
    prefix, blocks = largest_list(model)
    names = (name for block in blocks for name, module in block.named_modules() if is_linear(module))
    modules = tuple(dict.fromkeys(names))
    note = f"no family of its own for {model_type!r}: every linear layer inside {prefix} is a target"
    return Family("generic", (model_type,), prefix, modules, optional=modules, note=note)
