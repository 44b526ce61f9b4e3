"""An allocation as ordinary weights: the product of each target's factors in the dense layer's place.

Such a folder opens in any tool that opens the base model, and is no smaller than that.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from actors.families import family_of
from actors.linears import bias_of, is_linear, weight_of
from actors.low_rank import Ranks
from actors.types import Allocation, RankfrontError


@torch.no_grad()
def dense_model(dense: Any, store: Ranks, allocation: Allocation) -> Any:
    """`dense` with W_r = A_r B_r (m, n) for the weight of every target that has a rank, changed in place.

    Its config says `rankfront: {format: dense, smaller: false}`.

    Raises:
        RankfrontError: a target needs a bias that its architecture has no place for.
    """
    cut = {
        name: store.rank(name, rank, allocation.method_of(name))
        for name, rank in allocation
        if rank is not None
    }
    needed = [name for name, (*_, bias) in cut.items() if bias is not None]
    _make_room(dense, [name for name in needed if bias_of(dense.get_submodule(name)) is None])
    for name, (left, right, bias) in cut.items():
        layer = dense.get_submodule(name)
        weight_of(layer).copy_(left.T.double() @ right.double())
        if bias is not None:
            layer.bias.add_(bias)
    dense.config.rankfront = {"format": "dense", "smaller": False}
    return dense


def _make_room(dense: Any, names: list[str]) -> None:
    """Give the targets `names` a bias of zeros, and all others that the same switch of the config gives one.

    Raises:
        RankfrontError: the architecture has no switch for one of them.
    """
    if not names:
        return
    switches = [switch for switch in family_of(dense).bias_switches if hasattr(dense.config, switch)]
    config = copy.deepcopy(dense.config)
    for switch in switches:
        setattr(config, switch, True)
    with torch.device("meta"):
        roomy = type(dense)(config) if switches else dense
    without = [name for name in names if bias_of(roomy.get_submodule(name)) is None]
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise RankfrontError(
            f"no dense form: {without[0]}{more} need a bias, for which {dense.config.model_type!r} has no "
            "place; leave out --format dense, or search with factors.bias: none"
        )
    for name, layer in roomy.named_modules():
        own = dense.get_submodule(name)
        if is_linear(layer) and bias_of(layer) is not None and bias_of(own) is None:
            zeros = torch.zeros(len(weight_of(own)), dtype=own.weight.dtype, device=own.weight.device)
            own.bias = nn.Parameter(zeros, requires_grad=False)
    for switch in switches:
        setattr(dense.config, switch, True)
