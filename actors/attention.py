"""Attention masks of packed trees, in the form in which a model gives them to its layers.

transformers takes a mask (B, 1, L, L) as it is, for layers with a sliding window too
(`masking_utils._preprocess_mask_arguments`), so the window has to be in it. Models whose config has
`layer_types` take a mapping with the mask of each type; the others have one kind of layer and take its mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from actors.operations import SLIDING

Tensor = torch.Tensor


def attention_mask(
    model: nn.Module, allowed: Tensor, positions: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What a pass of `model` is given for `allowed` (B, L, L), True where attention is, and the `positions`
    (B, L) of its tokens: (B, 1, L, L) additive, or one for each type of layer where a window is exceeded.

    A layer with a sliding window w sees what is fewer than w positions back in its own choice, as
    `masking_utils.sliding_window_overlay` has it for a text: key > query - w.
    """
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    full = _additive(allowed, device, dtype)
    if window is None or int(positions.max()) < window:
        return full
    near = positions[:, :, None] - positions[:, None, :] < window
    windowed = _additive(allowed & near, device, dtype)
    types = getattr(config, "layer_types", None)
    if not types:
        return windowed
    return {kind: windowed if kind == SLIDING else full for kind in set(types)}


def _additive(allowed: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where `allowed` (B, L, L), else the least number of the precision: (B, 1, L, L)."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    mask.masked_fill_(~allowed.to(device, non_blocking=True), torch.finfo(dtype).min)
    return mask[:, None]
