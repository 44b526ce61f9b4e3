"""A target's factors in closed form, for the input it has behind targets that were compressed before it.

Notation: y = W x + b is the dense target, W of shape (m, n), and x what it reads in the dense model; x' is
what reaches it through the compressed prefix, d = x - x'. Of rank r, W_r and b_r minimise

    E |W x + b - W_r x' - b_r|^2

over the tokens of a text: a reduced-rank regression of y on x' (Izenman, "Reduced-rank regression for the
multivariate linear model", Journal of Multivariate Analysis 5, 1975). With S' = Cov(x', x'):

    A   = W Cov(x, x') S'^-1 = W + W Cov(d, x') S'^-1    the answer without a bound on its rank
    W_r = U_r U_r^T A                                    U_r the top eigenvectors of A S' A^T = Cov(A x')
    b_r = b + W E[x] - W_r E[x']

W_r is the SVD of A S'^1/2, truncated, times S'^-1/2: a bound on the rank adds |(A - W_r) S'^1/2|^2 to the
error. It is also what `feature` makes of A on x' (actors.decompose); behind a dense prefix d = 0 and A = W,
so these are W's own `feature` factors. For `bias: none` moments about zero take the place of covariances.
Closed-form updates of compressed layers, one after the other, are also in SVD-LLM (arXiv 2403.07378, v1).

S'^-1 is the inverse of S' + lambda, lambda its `damping`: A is then W and the ridge regression of W d on x'.
In directions that the text hardly excites it falls back to W, not to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.decompose import damping, decompose, require_finite
from actors.moments import Moments, Scatter, Spread

Tensor = torch.Tensor


@dataclass(frozen=True)
class Joint:
    """Of a target's input, all tokens alike, float64: the spread of x', E[d] (n,) and Cov(d, x') (n, n)."""

    spread: Spread
    drift: Tensor
    cross: Tensor

    def about(self, bias: str) -> tuple[Tensor, Tensor]:
        """The moments (n, n) of x' with itself and of d with x', about zero for `none`, else the means."""
        second = self.spread.second(bias)
        if bias == "mean":
            return second, self.cross
        return second, self.cross + torch.outer(self.drift, self.spread.mean)


class JointScatter:
    """Sums that make a `Joint`; products in float32, sums in float64, about the first batch's means.

    d is summed, not x: what little the prefix changed would vanish in the rounding of x.
    """

    def __init__(self) -> None:
        self._own, self._gap = Scatter(full=True), Scatter(full=False)
        self._anchors: tuple[Tensor, Tensor] | None = None
        self._cross: Tensor | None = None

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """x and x' (..., n) of the same tokens."""
        rows = compressed.reshape(-1, compressed.shape[-1]).float()
        gaps = dense.reshape(-1, dense.shape[-1]).float() - rows
        self._own.add(rows)
        self._gap.add(gaps)
        if self._anchors is None:
            width = rows.shape[1]
            self._anchors = gaps.mean(0), rows.mean(0)
            self._cross = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
        assert self._cross is not None
        self._cross += (gaps - self._anchors[0]).T @ (rows - self._anchors[1])

    def take(self) -> Joint:
        """The averages of everything seen; the sums are used up."""
        assert self._anchors is not None
        assert self._cross is not None
        cross, tokens = self._cross, self._own.tokens
        spread, drift = self._own.take_spread(), self._gap.mean()
        rests = drift - self._anchors[0].double(), spread.mean - self._anchors[1].double()
        cross /= tokens
        cross.addmm_(rests[0][:, None], rests[1][None, :], alpha=-1)
        self._cross = None
        return Joint(spread, drift, cross)


def correction(name: str, joint: Joint, bias: str) -> Tensor:
    """Cov(d, x') (S' + lambda)^-1 (n, n): A = W + W times this, for every target that reads this input.

    Raises:
        RankfrontError: NaN or inf in the moments, naming the target.
    """
    second, cross = joint.about(bias)
    require_finite(name, "second moment behind compressed targets", second)
    require_finite(name, "moment of what compressed targets before it change", cross)
    values, vectors = torch.linalg.eigh((second + second.T) / 2)
    values = values.clamp_min(0)
    found: Tensor = ((cross @ vectors) / (values + damping(values))) @ vectors.T
    return found


def regressed(
    name: str, matrix: Tensor, joint: Joint, corrected: Tensor, rank: int, bias: str
) -> tuple[Tensor, Tensor]:
    """Factors (m, r) and (r, n) of W_r for a target of weight `matrix` (m, n), float64.

    `corrected` is the `correction` of its input.
    """
    best = matrix + matrix @ corrected
    moments = Moments(joint.spread.mean, int(joint.spread.weight), "input", joint.spread)
    factors = decompose(name, best, moments, "feature", bias)
    return factors.left[:, :rank], factors.right[:rank]


def excess(matrix: Tensor, product: Tensor, joint: Joint, bias: str) -> float:
    """The error of W_r = `product` (m, n) with its best bias, or for `none` with none, less E |W d|^2.

    E |W x - W_r x'|^2 = E |D x' + W d|^2 with D = W - W_r; the last part is the same for every W_r.
    """
    second, cross = joint.about(bias)
    gap = matrix - product
    return ((gap @ second + 2 * (matrix @ cross)) * gap).sum().item()


def best_bias(matrix: Tensor, product: Tensor, joint: Joint) -> Tensor:
    """b_r - b (m,) for W_r = `product` (m, n)."""
    return matrix @ joint.drift + (matrix - product) @ joint.spread.mean
