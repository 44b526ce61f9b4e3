"""First and second moments of one target over the calibration text, and how they are summed.

Notation: y = W x + b, W of shape (m, n), d = min(m, n); g is the gradient of the summed token loss in y. The
smaller side has the vectors W x and g where m <= n, and x and W^T g where n < m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Spread:
    """Mean (d,) and covariance (d, d) of some vectors, and the sum of their weights."""

    mean: Tensor
    covariance: Tensor
    weight: float

    def second(self, bias: str) -> Tensor:
        """The covariance where a mean bias absorbs the mean, the moment about zero where there is none."""
        if bias == "mean":
            return self.covariance
        return self.covariance + torch.outer(self.mean, self.mean)

    def to(self, device: str) -> Spread:
        return Spread(self.mean.to(device), self.covariance.to(device), self.weight)

    def joined(self, other: Spread) -> Spread:
        """Of the vectors of both: Chan, Golub, LeVeque (1983), equation 2.1b."""
        weight = self.weight + other.weight
        share = other.weight / weight if weight > 0 else 0.0
        step = other.mean - self.mean
        covariance = self.covariance.lerp(other.covariance, share)
        covariance.addmm_(step[:, None], step[None, :], alpha=share * (1 - share))
        return Spread(self.mean + share * step, covariance, weight)


@dataclass(frozen=True)
class Moments:
    """What the methods need to know of a target's inputs and gradients, float64.

    `input_mean` (n,) is mu. `spread` is over all tokens alike, of the inputs x (n) or the outputs W x without
    bias (m), as `side` says; None where no method of the target asks for it. For `curvature` there are two
    of the smaller side, with z = g where m <= n, z = W^T g where n < m, and p the power that calibration
    takes of its norm: `weighted`, the spread of x or W x with every token weighted by |z|^p; and `gradient`
    (d, d), E[|z|^(p-2) z z^T], brought to the trace E[|z|^2]. With p = 2 that is E[z z^T].
    """

    input_mean: Tensor
    tokens: int
    side: str
    spread: Spread | None
    gradient: Tensor | None = None
    weighted: Spread | None = None

    def second(self, matrix: Tensor, bias: str) -> Tensor:
        """The second moment (d, d) of the smaller side: of W x where m <= n, of x where n < m."""
        assert self.spread is not None
        second = self.spread.second(bias)
        rows, cols = matrix.shape
        return matrix @ second @ matrix.T if rows <= cols and self.side == "input" else second

    def weighted_second(self, matrix: Tensor, bias: str) -> Tensor:
        """The same with tokens weighted by their gradients; without `weighted`, all tokens alike."""
        return self.second(matrix, bias) if self.weighted is None else self.weighted.second(bias)

    def to(self, device: str) -> Moments:
        """The same moments on another device."""
        spread = None if self.spread is None else self.spread.to(device)
        gradient = None if self.gradient is None else self.gradient.to(device)
        weighted = None if self.weighted is None else self.weighted.to(device)
        return Moments(self.input_mean.to(device), self.tokens, self.side, spread, gradient, weighted)


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of the texts of `parts` together, as one pass over all of it gives them."""
    first, *rest = parts
    for part in rest:
        first = _merged(first, part)
    return first


def _merged(one: Moments, other: Moments) -> Moments:
    tokens = one.tokens + other.tokens
    share = other.tokens / tokens
    spread = gradient = weighted = None
    if one.spread is not None and other.spread is not None:
        spread = one.spread.joined(other.spread)
    if one.gradient is not None and other.gradient is not None:
        gradient = one.gradient.lerp(other.gradient, share)
        if one.weighted is not None and other.weighted is not None:
            weighted = one.weighted.joined(other.weighted)
            # Weights and gradients are of the same |z|^p; the trace is of |z|^2.
            shapes = (unit_trace(one.gradient), unit_trace(other.gradient))
            mixed = shapes[0] * one.weighted.weight + shapes[1] * other.weighted.weight
            gradient = unit_trace(mixed) * gradient.trace()
    mean = one.input_mean.lerp(other.input_mean, share)
    return Moments(mean, tokens, one.side, spread, gradient, weighted)


def unit_trace(moment: Tensor) -> Tensor:
    """A moment (d, d) up to its scale; zero stays zero."""
    trace = moment.trace()
    return moment / trace if trace > 0 else moment


class Scatter:
    """Sums of d-vectors and, where `full`, of their outer products; products in float32, sums in float64.

    Centred sums are taken about a fixed shift (the first batch's mean), so that subtracting the mean at
    the end does not cancel: some activations have means hundreds of times their deviation.
    """

    def __init__(self, full: bool, centred: bool = True) -> None:
        self.tokens = 0
        self.full, self._centred = full, centred
        self._weight: Tensor | None = None
        self._shift: Tensor | None = None
        self._total: Tensor | None = None
        self._outer: Tensor | None = None

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """`values` (..., d), one row per token; `weights` (...) not below zero, all alike without them."""
        rows = values.detach().reshape(-1, values.shape[-1]).float()
        if self._total is None:
            width = rows.shape[1]
            self._weight = torch.zeros((), dtype=torch.float64, device=rows.device)
            self._total = torch.zeros(width, dtype=torch.float64, device=rows.device)
            self._shift = rows.mean(0) if self._centred else torch.zeros_like(rows[0])
            if self.full:
                self._outer = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        assert self._shift is not None
        assert self._weight is not None
        if self._centred:
            rows = rows - self._shift
        weighted = rows if weights is None else rows * weights.reshape(-1, 1).float()
        self.tokens += rows.shape[0]
        self._weight += rows.shape[0] if weights is None else weights.sum(dtype=torch.float64)
        self._total += weighted.sum(0, dtype=torch.float64)
        if self._outer is not None:
            self._outer += weighted.T @ rows

    def mean(self) -> Tensor:
        assert self._shift is not None
        return self._shift.double() + self._residue()

    def _residue(self) -> Tensor:
        assert self._total is not None
        assert self._weight is not None
        return self._total / self._weight if self._weight > 0 else self._total

    def take_second(self) -> Tensor:
        """The covariance, or the moment about zero of uncentred sums; made in place, so asked for once."""
        assert self._outer is not None
        assert self._weight is not None
        outer, self._outer = self._outer, None
        if self._weight > 0:
            outer /= self._weight
        if self._centred:
            residue = self._residue()
            outer.addmm_(residue[:, None], residue[None, :], alpha=-1)
        return outer

    def take_spread(self) -> Spread:
        """Mean, covariance and weight; asked for once."""
        assert self._weight is not None
        return Spread(self.mean(), self.take_second(), float(self._weight))
