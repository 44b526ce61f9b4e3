"""First and second moments of one target over the calibration text, and how they are summed.

Notation: y = W x + b, W of shape (m, n), d = min(m, n); g is the gradient of the summed token loss in y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Moments:
    """What the methods need to know of a target's inputs and gradients, float64, per-token averages.

    `side` says what `covariance` (about `mean`) is of: the inputs x (n) or the outputs W x without
    bias (m). `input_mean` is mu (n,) whatever the side. `gradient` (d, d), where there is one, is about
    zero and always of the smaller side: E[g g^T] where m <= n, E[W^T g g^T W] where n < m.
    """

    side: str
    covariance: Tensor
    mean: Tensor
    input_mean: Tensor
    tokens: int
    gradient: Tensor | None = None

    def second(self, bias: str) -> Tensor:
        """The covariance where a mean bias absorbs the mean, E[x x^T] (or of W x) where there is none."""
        if bias == "mean":
            return self.covariance
        return self.covariance + torch.outer(self.mean, self.mean)

    def small(self, matrix: Tensor, bias: str) -> Tensor:
        """The second moment (d, d) of the smaller side: of W x where m <= n, of x where n < m."""
        rows, cols = matrix.shape
        second = self.second(bias)
        return matrix @ second @ matrix.T if rows <= cols and self.side == "input" else second

    def to(self, device: str) -> Moments:
        """The same moments on another device."""
        gradient = None if self.gradient is None else self.gradient.to(device)
        covariance, mean = self.covariance.to(device), self.mean.to(device)
        return Moments(self.side, covariance, mean, self.input_mean.to(device), self.tokens, gradient)


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of the texts of `parts` together, as one pass over all of it gives them.

    The covariances are combined about the common mean: Chan, Golub, LeVeque (1983), equation 2.1b.
    """
    first, *rest = parts
    for part in rest:
        tokens = first.tokens + part.tokens
        share = part.tokens / tokens
        step = part.mean - first.mean
        covariance = first.covariance.lerp(part.covariance, share)
        covariance.addmm_(step[:, None], step[None, :], alpha=share * (1 - share))
        gradient = None
        if first.gradient is not None and part.gradient is not None:
            gradient = first.gradient.lerp(part.gradient, share)
        first = Moments(
            first.side,
            covariance,
            first.mean + share * step,
            first.input_mean.lerp(part.input_mean, share),
            tokens,
            gradient,
        )
    return first


class Scatter:
    """Sums of d-vectors and, where `full`, of their outer products; products in float32, sums in float64.

    Centred sums are taken about a fixed shift (the first batch's mean), so that subtracting the mean at
    the end does not cancel: some activations have means hundreds of times their deviation.
    """

    def __init__(self, full: bool, centred: bool = True) -> None:
        self.tokens = 0
        self._full, self._centred = full, centred
        self._shift: Tensor | None = None
        self._total: Tensor | None = None
        self._outer: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """`values`: (..., d), one row per token."""
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        if self._total is None:
            width = rows.shape[1]
            self._total = torch.zeros(width, dtype=torch.float64, device=rows.device)
            self._shift = rows.mean(0) if self._centred else torch.zeros_like(rows[0])
            if self._full:
                self._outer = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        assert self._shift is not None
        if self._centred:
            rows = rows - self._shift
        self.tokens += rows.shape[0]
        self._total += rows.sum(0, dtype=torch.float64)
        if self._outer is not None:
            self._outer += rows.T @ rows

    def mean(self) -> Tensor:
        assert self._shift is not None
        assert self._total is not None
        return self._shift.double() + self._total / self.tokens

    def take_second(self) -> Tensor:
        """The covariance, or the moment about zero of uncentred sums; made in place, so asked for once."""
        assert self._outer is not None
        assert self._total is not None
        outer, self._outer = self._outer, None
        outer /= self.tokens
        if self._centred:
            residue = self._total / self.tokens
            outer.addmm_(residue[:, None], residue[None, :], alpha=-1)
        return outer
