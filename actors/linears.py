"""What counts as a linear layer, and its weight as W (m, n) with y = W x + b whatever the class stores."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# GPT-2's Conv1D is a linear layer that stores W^T.
LINEARS = (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEARS)


def weight_of(module: nn.Module) -> torch.Tensor:
    """W (m, n) of a linear layer, a view of its parameter.

    Raises:
        TypeError: `module` is no linear layer.
    """
    if isinstance(module, Conv1D):
        return module.weight.T  # type: ignore[no-any-return]
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{type(module).__name__} is no linear layer")


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """b (m,) of a linear layer, None where it has none."""
    bias = module.bias
    return bias if isinstance(bias, torch.Tensor) else None
