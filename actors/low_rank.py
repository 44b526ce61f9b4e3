"""Trial installation: each target runs dense or at a rank, whichever product is cheaper."""

from __future__ import annotations

import torch
from torch import nn

from actors.factors import FactorStore
from actors.types import Allocation, TargetSpec

Tensor = torch.Tensor


class TrialLinear(nn.Module):
    """A target of the resident model: the dense weight stays, a rank is laid over it and taken off.

    `install` picks the cheaper of two equal products for the number of tokens a trial scores:
    y = (A_r B_r) x, at mn a token plus r mn once, or y = A_r (B_r x), at r (m + n) a token.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense = dense
        self.rank: int | None = None
        self._product: Tensor | None = None
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Some model code reads dtype or device from a layer's weight."""
        return self.dense.weight

    def restore(self) -> None:
        """Back to the dense layer."""
        self.rank = None
        self._left = self._right = self._bias = None

    def install(self, rank: int, store: FactorStore, name: str, tokens: int) -> None:
        """Run at `rank` from now on; `tokens` is how many tokens the trial will send through."""
        dtype = self.dense.weight.dtype
        left, right, bias = store.rank(name, rank)  # (r, m), (r, n), (m,) or None
        left, right = left.to(dtype), right.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        rows, cols = self.dense.weight.shape
        self.rank, self._bias = rank, bias if self.dense.bias is None else self._with_own(bias)
        if rank * (rows + cols) * tokens <= rows * cols * (tokens + rank):
            self._left, self._right = left.T, right
        else:
            if self._product is None:
                self._product = torch.empty_like(self.dense.weight)
            torch.mm(left.T, right, out=self._product)
            self._left = self._right = None

    def _with_own(self, bias: Tensor | None) -> Tensor:
        own = self.dense.bias
        return own if bias is None else own + bias

    def forward(self, x: Tensor) -> Tensor:
        if self.rank is None:
            return self.dense(x)  # type: ignore[no-any-return]
        if self._left is None or self._right is None:
            assert self._product is not None
            return nn.functional.linear(x, self._product, self._bias)
        return nn.functional.linear(nn.functional.linear(x, self._right), self._left, self._bias)


class TrialModel:
    """A resident model whose targets can be set to any allocation; only changed ranks are touched."""

    def __init__(self, model: nn.Module, targets: tuple[TargetSpec, ...], store: FactorStore) -> None:
        self.model = model
        self._store = store
        self._layers: dict[str, TrialLinear] = {}
        for target in targets:
            layer = TrialLinear(model.get_submodule(target.name))  # type: ignore[arg-type]
            model.set_submodule(target.name, layer)
            self._layers[target.name] = layer

    @torch.inference_mode()
    def install(self, allocation: Allocation, tokens: int) -> int:
        """Set every target to the allocation's rank; returns how many targets changed."""
        changed = 0
        for name, rank in allocation:
            layer = self._layers[name]
            if layer.rank == rank:
                continue
            changed += 1
            if rank is None:
                layer.restore()
            else:
                layer.install(rank, self._store, name, tokens)
        return changed

    def layer(self, name: str) -> TrialLinear:
        return self._layers[name]
