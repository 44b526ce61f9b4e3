"""From a weight and its moments to nested factors and a spectrum. Pure maths, float64 inside.

Notation: y = W x + b, W of shape (m, n), x with mean mu and covariance S (E[x x^T] for `bias: none`),
g the gradient of the summed loss in y, k = min(m, n). For `curvature`, G is the moment of g and S_g that of
x with every token weighted by its gradient, large gradients held down as `Moments` says. Every method
returns A (m, k) and B (k, n) with A B = W; rank r keeps the first r columns and rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actors.moments import Moments
from actors.types import RankfrontError

Tensor = torch.Tensor

# What is added to a second moment before its inverse square root is taken, in units of its median
# eigenvalue. The moments are of a finite text and nearly singular: undamped, directions the text hardly
# excites look free and are cut first. The mean eigenvalue is owned by a few massive activations and moves
# by orders of magnitude between layers; the median does not. benchmarks/results/decomposition.md.
DAMPING = 0.1
# Eigenvalues below this share of the largest are rounding: what divides by them is set to zero instead.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Factors:
    """A (m, k), B (k, n) with A B = W, the energy (k,) and the predicted loss (k,) of each rank.

    Energies are in the method's own units, without damping. The sum of `loss` beyond r is the predicted
    loss increase of keeping rank r, in nats/token: 1/2 tr(G D S_g D^T), D = W - W_r (second order, one
    target at a time, tokens independent); None without gradient moments. `offset` = W mu (m,) and
    `shift` = B mu (k,) give the mean bias of every rank (b_r = b + offset - A_r shift_r); both are None
    for `bias: none`.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    loss: Tensor | None
    offset: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class Basis:
    """A method's answer: A, B, energies, and the map T (k, m) with B = T W where m <= n, (n, k) with
    A = W T where n < m. T carries moments of the smaller side over to the factors."""

    left: Tensor
    right: Tensor
    energy: Tensor
    map: Tensor


def weight(matrix: Tensor, moments: Moments | None, bias: str) -> Basis:
    """SVD of W: the best rank-r approximation in Frobenius norm (Eckart-Young). Energies are s_i^2."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    across = left.T if matrix.shape[0] <= matrix.shape[1] else right.T
    if matrix.shape[0] <= matrix.shape[1]:
        return Basis(left, values[:, None] * right, values.square(), across)
    return Basis(left * values, right, values.square(), across)


def feature(matrix: Tensor, moments: Moments | None, bias: str) -> Basis:
    """W_r = V_r V_r^T W with V the eigenvectors of cov(W x): least output error of rank r on the text.

    Source: arXiv 2405.13039, section 3; the optimum of SVD-LLM (2403.07378) with the mean handled.
    Energies are the eigenvalues, in squared output units per token. Where W is tall (m > n) the
    eigenvectors are sought inside range(W), W = Q R: cov(W x) = Q (R S R^T) Q^T. That needs neither
    a square root nor an inverse of S, so full rank gives W back even where S is singular.
    """
    assert moments is not None
    rows, cols = matrix.shape
    small = moments.second(matrix, bias)
    if rows <= cols:
        values, vectors = _eigh(small)
        return Basis(vectors, vectors.T @ matrix, values, vectors.T)
    basis, triangle = torch.linalg.qr(matrix)
    values, vectors = _eigh(triangle @ small @ triangle.T)
    left = basis @ vectors
    across = (small @ (matrix.T @ left)) * _inverse(values)
    return Basis(left, left.T @ matrix, values, across)


def curvature(matrix: Tensor, moments: Moments | None, bias: str) -> Basis:
    """Minimise tr(G D S_g D^T), D = W - W_r: the loss increase under a Kronecker-factored Hessian.

    Source: GFWSVD (arXiv 2505.17974) and the K-FAC view, in the form that needs one root, of the smaller
    side. m <= n: U the eigenvectors of G^1/2 (W S_g W^T) G^1/2, W_r = G^-1/2 U_r U_r^T G^1/2 W. n < m: V the
    eigenvectors of S_g^1/2 (W^T G W) S_g^1/2, W_r = W S_g^1/2 V_r V_r^T S_g^-1/2. Only the moment whose root
    is taken is damped. Energies are what each rank adds to tr(G W S_g W^T), in squared nats per token.

    K-FAC takes x and g for independent. They are not: attention sinks have inputs of their own and
    gradients unlike the others'. Weighted by |g|^2, S_g would be the partial trace of E[g g^T (x) x x^T] over
    g, the first half-step to the nearest Kronecker product (Van Loan and Pitsianis, 1993). Both are taken of
    gradients whose norms are held down, |g|^(p/2-1) g: see actors.calibration.GRADIENT_POWER.
    """
    assert moments is not None
    assert moments.gradient is not None
    second, gradient = moments.weighted_second(matrix, bias), moments.gradient
    if matrix.shape[0] <= matrix.shape[1]:
        root, inverse = damped_roots(gradient)
        values, vectors = _untangled(*_eigh(root @ second @ root), root)
        left, across = inverse @ vectors, vectors.T @ root
        energy = values * torch.einsum("ik,ik->k", left, gradient @ left)
        return Basis(left, across @ matrix, energy, across)
    root, inverse = damped_roots(second)
    values, vectors = _untangled(*_eigh(root @ gradient @ root), root)
    right, across = vectors.T @ inverse, root @ vectors
    energy = values * torch.einsum("ki,ki->k", right, right @ second)
    return Basis(matrix @ across, right, energy, across)


def damping(values: Tensor) -> float:
    """What is added to a moment with eigenvalues `values` (d,): DAMPING times their median.

    Where the median itself is zero or rounding, the least that keeps the inverse root finite.
    """
    largest = values.max().item()
    return max(DAMPING * values.median().item(), ROUNDING * largest) if largest > 0 else 1.0


def damped_roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and inverse square root of `moment` (d, d) plus its `damping` on the diagonal."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values = values.clamp_min(0)
    values = values + damping(values)
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and not below zero, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _untangled(values: Tensor, vectors: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenpairs, those of zero energy turned among themselves to follow the damped moment, root^2.

    Any turn has the same energies. One that mixes large and small directions of the moment gives factors
    whose product cancels, and no longer gives W back in the precision of the store.
    """
    free = values <= ROUNDING * values[0]
    if free.sum() > 1:
        rooted = root @ vectors[:, free]
        _, turn = _eigh(rooted.T @ rooted)
        vectors[:, free] = vectors[:, free] @ turn
    return values, vectors


def _inverse(values: Tensor) -> Tensor:
    """1 / value, zero for values that are rounding."""
    real = values > ROUNDING * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.where(real, 1 / values.where(real, torch.ones_like(values)), torch.zeros_like(values))


Method = Callable[[Tensor, Moments | None, str], Basis]
METHODS: dict[str, Method] = {"weight": weight, "feature": feature, "curvature": curvature}


def decompose(name: str, matrix: Tensor, moments: Moments | None, method: str, bias: str) -> Factors:
    """Factors of one target by `method`, with its predicted losses and what its mean bias needs.

    Raises:
        RankfrontError: NaN or inf in the weight or the moments, naming the target.
    """
    matrix = matrix.double()
    require_finite(name, "weight", matrix)
    if moments is not None:
        require_finite(name, "input mean", moments.input_mean)
        for what, spread in (("second moment", moments.spread), ("weighted moment", moments.weighted)):
            if spread is not None:
                require_finite(name, what, spread.covariance)
                require_finite(name, f"{what}'s mean", spread.mean)
        if moments.gradient is not None:
            require_finite(name, "gradient moment", moments.gradient)
    basis = METHODS[method](matrix, moments, bias)
    loss = None
    if moments is not None and moments.gradient is not None:
        loss = _predicted_losses(basis, matrix, moments, bias)
    left, right = _balanced(basis.left, basis.right)
    if bias == "none" or moments is None:
        return Factors(left, right, basis.energy, loss, None, None)
    mean = moments.input_mean
    return Factors(left, right, basis.energy, loss, offset=matrix @ mean, shift=right @ mean)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Equal norms on both sides of every rank: neither factor leaves the range of a 16-bit type.

    Where one side is zero the other becomes so too.
    """
    norms = left.norm(dim=0), right.norm(dim=1)
    zero = (norms[0] == 0) | (norms[1] == 0)
    scale = (norms[1] / norms[0]).sqrt().masked_fill(zero, 1.0)
    keep = (~zero).to(left.dtype)
    return left * (scale * keep), right * (keep / scale)[:, None]


def _predicted_losses(basis: Basis, matrix: Tensor, moments: Moments, bias: str) -> Tensor:
    """What each rank adds to 1/2 tr(G D S_g D^T) = 1/2 sum over i, j > r of (A^T G A)_ij (B S_g B^T)_ij."""
    assert moments.gradient is not None
    second = moments.weighted_second(matrix, bias)
    if matrix.shape[0] <= matrix.shape[1]:
        product = (basis.left.T @ moments.gradient @ basis.left) * (basis.map @ second @ basis.map.T)
    else:
        product = (basis.map.T @ moments.gradient @ basis.map) * (basis.right @ second @ basis.right.T)
    return product.diagonal() / 2 + product.triu(1).sum(1)


def require_finite(name: str, what: str, tensor: Tensor) -> None:
    """Raise RankfrontError naming the target and the tensor that holds NaN or inf."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise RankfrontError(f"{name}: {count} non-finite values in its {what} {tuple(tensor.shape)}")
