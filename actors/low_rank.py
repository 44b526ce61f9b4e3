"""Trial installation: each target runs dense or at a rank, whichever product is cheaper."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Nested(Ranks, Protocol):
    """Whose full-rank factors multiply to the dense weight, W = A B."""

    def rest(self, name: str, rank: int, method: str | None = None) -> tuple[Tensor, Tensor]:
        """What rank r leaves out: the other rows of A^T (k - r, m) and of B (k - r, n)."""
        ...


def factored_is_cheaper(rank: int, rows: int, cols: int, tokens: int, cut: int | None = None) -> bool:
    """Whether A_r (B_r x) takes no more operations than W_r x, with W_r made once for `tokens`.

    W_r = A_r B_r takes r products of a row and a column; `cut` says how many where it is made otherwise.
    """
    return rank * (rows + cols) * tokens <= rows * cols * (tokens + (rank if cut is None else cut))


class TrialLinear(nn.Module):
    """A target of the resident model: the dense weight stays, a rank is laid over it and taken off.

    `install` picks the cheaper of two equal products for the number of tokens a trial scores: y = W_r x, at
    mn a token plus the making of W_r, or y = A_r (B_r x), at r (m + n) a token. W_r is A_r B_r, or what is
    left of W without the other k - r ranks where those are fewer, in float32: min(r, k - r) mn, once.
    `rank` is None while the dense layer runs, and so is `tokens`, the number that the product was picked for;
    `method` is None where it is the configured one.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.rank: int | None = None
        self.tokens: int | None = None
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
        self.rank = self.tokens = self.method = None
        self._left = self._right = self._bias = None

    def release(self) -> None:
        """The same, and what the product took is free."""
        self.restore()
        self._product = None

    def install(self, rank: int, store: Ranks, name: str, tokens: int, method: str | None = None) -> None:
        """Run at `rank` from now on, cut from the factors of `method` (None: the configured one).

        `tokens` is how many tokens the trial will send through. A layer whose installation is cut short, out
        of memory, is dense and says so: the next trial does not take it for what it was to become.
        """
        self.rank = self.tokens = self.method = None
        self._lay(rank, store, name, tokens, method)
        self.rank, self.tokens, self.method = rank, tokens, method

    def _lay(self, rank: int, store: Ranks, name: str, tokens: int, method: str | None) -> None:
        """Make what `forward` reads at a rank."""
        weight, own = weight_of(self.dense), bias_of(self.dense)
        left, right, bias = store.rank(name, rank, method)  # (r, m), (r, n), (m,) or None
        bias = None if bias is None else bias.to(weight)
        rows, cols = weight.shape
        self._bias = bias if own is None else own if bias is None else own + bias
        without = min(rows, cols) - rank
        # Rounded factors do not make up W: what they leave out tells nothing of what an export has.
        exact = left.dtype == weight.dtype == torch.float32
        nested = store if exact and without < rank and isinstance(store, Nested) else None
        if factored_is_cheaper(rank, rows, cols, tokens, rank if nested is None else without):
            self._left, self._right = left.to(weight).T, right.to(weight)
            return
        self._left = self._right = None
        if self._product is None:
            self._product = weight.new_empty(rows, cols)
        if nested is not None:
            left, right = nested.rest(name, rank, method)  # (k - r, m), (k - r, n)
        left, right = left.to(weight), right.to(weight)
        if nested is None:
            torch.mm(left.T, right, out=self._product)
        else:
            torch.addmm(weight, left.T, right, alpha=-1, out=self._product)

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
        """Set every target to the allocation's rank and method; returns how many targets changed.

        What it computes is the same to the bit whatever was installed before, for any number of tokens.
        """
        methods = dict(allocation.methods)
        changed = 0
        for name, rank in allocation:
            layer = self._layers[name]
            method, count = (None, None) if rank is None else (methods.get(name), tokens)
            if (layer.rank, layer.method, layer.tokens) == (rank, method, count):
                continue
            changed += 1
            if rank is None:
                layer.restore()
            else:
                layer.install(rank, self._store, name, tokens, method)
        return changed

    def use(self, store: Ranks) -> None:
        """Cut ranks from `store` from now on; every target is dense until the next `install`, and takes no
        more memory than the dense layer."""
        self._store = store
        for layer in self._layers.values():
            layer.release()

    def layer(self, name: str) -> TrialLinear:
        return self._layers[name]
