"""From a weight and its moments to nested factors and a spectrum. Pure maths, float64 inside.

Notation: y = W x + b, W of shape (m, n), x with mean mu and covariance S, k = min(m, n).
Every method returns A (m, k) and B (k, n) with A B = W; rank r keeps the first r columns and rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actors.types import RankfrontError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of a target over the calibration text, float64.

    `side` says of what: of the inputs x (n) or of the outputs W x without bias (m).
    `covariance` is (d, d) about `mean` (d,); `input_mean` is mu (n,) whatever the side.
    """

    side: str
    covariance: Tensor
    mean: Tensor
    input_mean: Tensor
    tokens: int

    def second(self, bias: str) -> Tensor:
        """The covariance where a mean bias absorbs the mean, E[x x^T] where there is none."""
        if bias == "mean":
            return self.covariance
        return self.covariance + torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Factors:
    """A (m, k), B (k, n) with A B = W, and the energy (k,) that each rank adds, non-increasing.

    `offset` = W mu (m,) and `shift` = B mu (k,) give the mean bias of every rank
    (b_r = b + offset - A_r shift_r); both are None for `bias: none`.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    offset: Tensor | None
    shift: Tensor | None


def weight(matrix: Tensor, moments: Moments | None, bias: str) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of W: the best rank-r approximation in Frobenius norm (Eckart-Young). Energies are s_i^2."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values[:, None] * right, values.square()


def feature(matrix: Tensor, moments: Moments | None, bias: str) -> tuple[Tensor, Tensor, Tensor]:
    """W_r = V_r V_r^T W with V the eigenvectors of cov(W x): least output error of rank r on the text.

    Source: arXiv 2405.13039, section 3; the optimum of SVD-LLM (2403.07378) with the mean handled.
    Energies are the eigenvalues, in squared output units per token. Where W is tall (m > n) the
    eigenvectors are sought inside range(W), W = Q R: cov(W x) = Q (R S R^T) Q^T. That needs neither
    a square root nor an inverse of S, so full rank gives W back even where S is singular.
    """
    assert moments is not None
    rows, cols = matrix.shape
    second = moments.second(bias)
    if moments.side == "output":
        values, vectors = torch.linalg.eigh(second)
        left = vectors.flip(1)
    elif rows <= cols:
        values, vectors = torch.linalg.eigh(matrix @ second @ matrix.T)
        left = vectors.flip(1)
    else:
        basis, triangle = torch.linalg.qr(matrix)
        values, vectors = torch.linalg.eigh(triangle @ second @ triangle.T)
        left = basis @ vectors.flip(1)
    return left, left.T @ matrix, values.flip(0).clamp_min(0)


Method = Callable[[Tensor, Moments | None, str], tuple[Tensor, Tensor, Tensor]]
METHODS: dict[str, Method] = {"weight": weight, "feature": feature}


def decompose(name: str, matrix: Tensor, moments: Moments | None, method: str, bias: str) -> Factors:
    """Factors of one target by `method`, with what its mean bias needs.

    Raises:
        RankfrontError: NaN or inf in the weight or the moments, naming the target.
    """
    matrix = matrix.double()
    _require_finite(name, "weight", matrix)
    if moments is not None:
        for what, tensor in (("moments", moments.covariance), ("input mean", moments.input_mean)):
            _require_finite(name, what, tensor)
    left, right, energy = METHODS[method](matrix, moments, bias)
    # Equal norms on both sides of every rank: neither factor leaves the range of a 16-bit type.
    scale = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt()
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    left, right = left * scale, right / scale[:, None]
    if bias == "none" or moments is None:
        return Factors(left, right, energy, None, None)
    mean = moments.input_mean
    return Factors(left, right, energy, offset=matrix @ mean, shift=right @ mean)


def _require_finite(name: str, what: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise RankfrontError(f"{name}: {count} non-finite values in its {what} {tuple(tensor.shape)}")
