"""The closed form against least squares on the rows themselves, and against what it is known to reduce to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from regressions import error, reduced_rank

from actors import regression
from actors.decompose import damping, decompose
from actors.moments import Moments
from actors.regression import Joint, JointScatter, best_bias, correction, excess, regressed
from actors.types import RankfrontError

TOKENS = 600
SHAPES = [(6, 10), (10, 6)]


def rows(n: int, drift: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """x and x' (tokens, n): correlated, of uneven scales, with means far from zero."""
    draw = torch.Generator().manual_seed(n)
    mixed = torch.randn(TOKENS, n, generator=draw) @ torch.randn(n, n, generator=draw)
    dense = mixed * torch.logspace(0, -1, n) + 20 * torch.randn(n, generator=draw)
    noise = torch.randn(TOKENS, n, generator=draw) @ torch.randn(n, n, generator=draw)
    return dense, dense + drift * (noise + 0.3 * mixed.roll(1, 1)) + drift


def joint_of(dense: torch.Tensor, compressed: torch.Tensor) -> Joint:
    scatter = JointScatter()
    for each, other in zip(dense.split(250), compressed.split(250), strict=True):
        scatter.add(each.view(1, *each.shape), other.view(1, *other.shape))
    return scatter.take()


def matrix_of(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def solved(matrix: torch.Tensor, joint: Joint, rank: int, bias: str) -> torch.Tensor:
    """W_r (m, n)."""
    left, right = regressed("t", matrix, joint, correction("t", joint, bias), rank, bias)
    assert (left.shape[1], right.shape[0]) == (rank, rank)
    return left @ right


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("bias", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_regression_of_reduced_rank(
    shape: tuple[int, int], bias: str, damped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dense, compressed), matrix = rows(shape[1]), matrix_of(*shape)
    joint, centred = joint_of(dense, compressed), bias == "mean"
    if not damped:
        monkeypatch.setattr(regression, "damping", lambda values: 0.0)
    x, behind, weight = dense.double().numpy(), compressed.double().numpy(), matrix.numpy()
    outputs, ridge = x @ weight.T, 0.0
    if damped:
        second = np.cov(behind.T, bias=True) if centred else behind.T @ behind / TOKENS
        ridge = damping(torch.from_numpy(np.linalg.eigvalsh(second)))
    for rank in (1, 4):
        expected = reduced_rank(outputs, behind, rank, centred, ridge, weight)
        found = solved(matrix, joint, rank, bias)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
        offset = best_bias(matrix, found, joint).numpy()
        mean = outputs.mean(0) - behind.mean(0) @ found.numpy().T
        np.testing.assert_allclose(offset, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["mean", "none"])
def test_the_excess_is_the_error_up_to_what_no_weights_change(bias: str) -> None:
    (dense, compressed), matrix = rows(10), matrix_of(6, 10)
    joint, centred = joint_of(dense, compressed), bias == "mean"
    outputs, behind = dense.double().numpy() @ matrix.numpy().T, compressed.double().numpy()
    lost = (dense - compressed).double().numpy() @ matrix.numpy().T
    fixed = np.square(lost - (lost.mean(0) if centred else 0)).sum(1).mean()
    for product in (matrix, torch.zeros_like(matrix), solved(matrix, joint, 2, bias)):
        expected = error(outputs, behind, product.numpy(), centred) - fixed
        assert excess(matrix, product, joint, bias) == pytest.approx(expected, rel=1e-4, abs=1e-4 * fixed)


@pytest.mark.parametrize("bias", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_behind_a_dense_prefix_it_is_the_feature_factors(shape: tuple[int, int], bias: str) -> None:
    (dense, _), matrix = rows(shape[1]), matrix_of(*shape)
    joint = joint_of(dense, dense)
    known = decompose("t", matrix, Moments(joint.spread.mean, TOKENS, "input", joint.spread), "feature", bias)
    left, right = regressed("t", matrix, joint, correction("t", joint, bias), 3, bias)
    assert torch.equal(left, known.left[:, :3])
    assert torch.equal(right, known.right[:3])
    if bias == "mean":
        assert known.offset is not None
        assert known.shift is not None
        expected = known.offset - left @ known.shift[:3]
        assert torch.allclose(best_bias(matrix, left @ right, joint), expected, atol=1e-9)


def test_what_is_not_finite_is_named() -> None:
    dense, compressed = rows(6)
    compressed[5, 2] = torch.inf
    with pytest.raises(RankfrontError, match=r"block\.q: .* second moment behind compressed targets"):
        correction("block.q", joint_of(dense, compressed), "mean")
