"""Trial installation: each target runs dense or at a rank, whichever product is cheaper."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from actors.linears import bias_of, weight_of
from actors.types import Allocation, TargetSpec

Tensor = torch.Tensor


class Ranks(Protocol):
    """Where the factors of a rank come from: a factor store, or refined factors."""

    def rank(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A_r^T (r, m), B_r (r, n) and what is added to the layer's bias (m,), None where nothing is."""
        ...


def factored_is_cheaper(rank: int, rows: int, cols: int, tokens: int) -> bool:
    """Whether A_r (B_r x) takes no more operations than (A_r B_r) x, its product made once for `tokens`."""
    return rank * (rows + cols) * tokens <= rows * cols * (tokens + rank)


class TrialLinear(nn.Module):
    """A target of the resident model: the dense weight stays, a rank is laid over it and taken off.

    `install` picks the cheaper of two equal products for the number of tokens a trial scores:
    y = (A_r B_r) x, at mn a token plus r mn once, or y = A_r (B_r x), at r (m + n) a token.
    `rank` is None while the dense layer runs; `method` is None where it is the configured one.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.rank: int | None = None
        self.method: str | None = None
        self._product: Tensor | None = None
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The dense parameter as it is stored: some model code reads dtype or device from it."""
        return self.dense.weight  # type: ignore[return-value]

    def restore(self) -> None:
        """Back to the dense layer."""
        self.rank = self.method = None
        self._left = self._right = self._bias = None

    def install(self, rank: int, store: Ranks, name: str, tokens: int, method: str | None = None) -> None:
        """Run at `rank` from now on, cut from the factors of `method` (None: the configured one).

        `tokens` is how many tokens the trial will send through.
        """
        weight, own = weight_of(self.dense), bias_of(self.dense)
        left, right, bias = store.rank(name, rank, method)  # (r, m), (r, n), (m,) or None
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        rows, cols = weight.shape
        self.rank, self.method = rank, method
        self._bias = bias if own is None else own if bias is None else own + bias
        if factored_is_cheaper(rank, rows, cols, tokens):
            self._left, self._right = left.T, right
        else:
            if self._product is None:
                self._product = weight.new_empty(rows, cols)
            torch.mm(left.T, right, out=self._product)
            self._left = self._right = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rank is None:
            return self.dense(x)  # type: ignore[no-any-return]
        if self._left is None or self._right is None:
            assert self._product is not None
            return nn.functional.linear(x, self._product, self._bias)
        return nn.functional.linear(nn.functional.linear(x, self._right), self._left, self._bias)


class TrialModel:
    """A resident model whose targets can be set to any allocation; only changed ones are touched."""

    def __init__(self, model: nn.Module, targets: tuple[TargetSpec, ...], store: Ranks) -> None:
        self.model = model
        self._store = store
        self._layers: dict[str, TrialLinear] = {}
        for target in targets:
            layer = TrialLinear(model.get_submodule(target.name))
            model.set_submodule(target.name, layer)
            self._layers[target.name] = layer

    @torch.inference_mode()
    def install(self, allocation: Allocation, tokens: int) -> int:
        """Set every target to the allocation's rank and method; returns how many targets changed."""
        methods = dict(allocation.methods)
        changed = 0
        for name, rank in allocation:
            layer = self._layers[name]
            method = methods.get(name) if rank is not None else None
            if (layer.rank, layer.method) == (rank, method):
                continue
            changed += 1
            if rank is None:
                layer.restore()
            else:
                layer.install(rank, self._store, name, tokens, method)
        return changed

    def use(self, store: Ranks) -> None:
        """Cut ranks from `store` from now on; every target is dense until the next `install`."""
        self._store = store
        for layer in self._layers.values():
            layer.restore()

    def layer(self, name: str) -> TrialLinear:
        return self._layers[name]
