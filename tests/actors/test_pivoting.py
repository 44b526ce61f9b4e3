"""Pivoted layers are the product they were made of, with small coefficients, in every precision."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors import pivoting
from actors.decompose import decompose
from actors.export import low_rank_layer
from actors.modeling_rankfront import FORMS, PivotedLinear
from actors.pivoting import COEFFICIENT_BOUND, pivot

SHAPES = [(1, 1, 1), (1, 6, 1), (6, 1, 1), (9, 9, 9), (40, 24, 24), (24, 40, 24), (96, 64, 24), (64, 160, 40)]
# Column scales of A and row scales of B: level, graded over six decades, and graded with zeros at the end.
GRADES = ["level", "graded", "vanishing"]


class OneTarget:
    """A factor store of one target, in the precision factors are kept in."""

    def __init__(self, left: np.ndarray, right: np.ndarray, bias: np.ndarray | None = None) -> None:
        self.parts = [None if part is None else torch.from_numpy(part) for part in (left.T, right, bias)]

    def rank(self, name: str, rank: int, method: str | None = None) -> tuple[torch.Tensor | None, ...]:
        left, right, bias = self.parts
        assert left is not None
        assert right is not None
        return left[:rank], right[:rank], bias


def factors(m: int, n: int, r: int, grade: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A (m, r), B (r, n) in float64: orthonormal directions, balanced, each side at the grade's scales."""
    chance = np.random.default_rng(seed)
    scale = np.ones(r) if grade == "level" else np.logspace(0, -6, r)
    if grade == "vanishing":
        scale[r // 2 + 1 :] = 0
    left, right = (np.linalg.qr(chance.normal(size=(size, r)))[0] * scale for size in (m, n))
    return left, right.T


def rebuilt(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """W_r put together again in float64, and the three tensors as arrays."""
    found = pivot(torch.from_numpy(left.T), torch.from_numpy(right))
    pivots, coefficients, order = (tensor.numpy() for tensor in found)
    assert [tensor.dtype for tensor in found] == [torch.float64, torch.float64, torch.int32]
    rows, (rank, cols) = len(left), right.shape
    assert pivots.shape == (rank, cols)
    assert coefficients.shape == (rows - rank, rank)
    assert sorted(order.tolist()) == [*range(rows)]
    return np.concatenate((pivots, coefficients @ pivots))[order], pivots, coefficients, order


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative error in the Frobenius norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 2**16), st.integers(0, 8), st.data())
def test_nothing_is_lost_and_coefficients_are_small(
    m: int, n: int, seed: int, decades: int, data: st.DataObject
) -> None:
    """At every rank up to full, whatever the shape and however unequal the columns."""
    rank = data.draw(st.integers(1, min(m, n)))
    chance = np.random.default_rng(seed)
    left = chance.normal(size=(m, rank)) * np.logspace(0, -decades, rank)
    right = chance.normal(size=(rank, n))
    found, pivots, coefficients, order = rebuilt(left, right)
    product = left @ right
    assert distance(found, product) < 1e-11
    kept = [place for place in range(m) if order[place] < rank]
    for place in kept:  # the pivot rows are rows of the product itself
        np.testing.assert_allclose(pivots[order[place]], product[place], rtol=0, atol=1e-12 * m)
    assert np.abs(coefficients).max(initial=0) <= COEFFICIENT_BOUND + 1e-9


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**16), st.data())
def test_ranks_that_carry_nothing(m: int, n: int, seed: int, data: st.DataObject) -> None:
    """Columns of A that are zero or depend on others leave no r independent rows; the product comes back."""
    rank = data.draw(st.integers(1, min(m, n)))
    true = data.draw(st.integers(0, rank))
    chance = np.random.default_rng(seed)
    left = chance.normal(size=(m, true)) @ chance.normal(size=(true, rank))
    left[:, chance.random(rank) < 0.3] = 0
    right = chance.normal(size=(rank, n))
    found, _, coefficients, _ = rebuilt(left, right)
    size = np.linalg.norm(left) * np.linalg.norm(right)
    assert np.linalg.norm(found - left @ right) <= 1e-11 * size
    assert np.abs(coefficients).max(initial=0) <= COEFFICIENT_BOUND + 1e-9


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 2**16))
def test_factors_of_a_weight_of_deficient_rank(rows: int, cols: int, seed: int) -> None:
    """Factors of a rank that carries no energy are tiny or nothing; the product still comes back."""
    chance = np.random.default_rng(seed)
    weight = np.outer(chance.normal(size=rows), chance.normal(size=cols))
    weight[0] = 0
    made = decompose("t", torch.from_numpy(weight), None, "weight", "none")
    found, _, coefficients, _ = rebuilt(made.left.numpy(), made.right.numpy())
    np.testing.assert_allclose(found, weight, rtol=0, atol=1e-10 * np.abs(weight).max())
    assert np.abs(coefficients).max(initial=0) <= COEFFICIENT_BOUND + 1e-9


def hard(rank: int) -> np.ndarray:
    """A (m, r) whose column-pivoted QR takes rows that write others by large coefficients.

    Kahan's matrix in the order QR leaves it, its last column left to be written, in three sizes. Turned by
    a Hadamard matrix (`rank` is a power of two), with the first column grown until it holds the largest
    entry of every row, it is as hard whatever is done to scale the columns of A.
    """
    sine, cosine = np.sin(1.2), np.cos(1.2)
    size = rank + 1
    kahan = np.diag(sine ** np.arange(size)) @ (np.eye(size) - cosine * np.triu(np.ones((size, size)), 1))
    kahan *= 1 - 1e-10 * np.arange(
        size
    )  # the columns left are of equal norm at every step: earlier ones first
    kahan[:, 0] *= 10
    last = kahan[:rank, -1:]
    wide = np.concatenate((kahan[:rank, :-1], last, 0.9 * last, 0.8 * last), axis=1)
    return (scipy.linalg.hadamard(rank) / np.sqrt(rank) @ wide).T


def test_swaps_mend_what_qr_leaves() -> None:
    left = hard(32)
    right = np.random.default_rng(0).normal(size=(32, 50))
    order = scipy.linalg.qr(left.T, mode="r", pivoting=True)[1]
    alone = np.linalg.solve(left[order[:32]].T, left[order[32:]].T)
    assert np.abs(alone).max() > 10
    found, _, coefficients, _ = rebuilt(left, right)
    assert distance(found, left @ right) < 1e-11
    assert np.abs(coefficients).max() <= COEFFICIENT_BOUND + 1e-9


def test_without_swaps_it_is_still_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of swaps is bounded: whatever is left then is correct."""
    monkeypatch.setattr(pivoting, "MAX_SWAPS", 0)
    left, right = hard(32), np.random.default_rng(0).normal(size=(32, 50))
    found, _, coefficients, _ = rebuilt(left, right)
    assert distance(found, left @ right) < 1e-11
    assert np.abs(coefficients).max() > COEFFICIENT_BOUND


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**16), st.data())
def test_a_swap_is_a_change_of_basis(rank: int, others: int, seed: int, data: st.DataObject) -> None:
    chance = np.random.default_rng(seed)
    basis, rest = chance.normal(size=(rank, rank)) + 2 * np.eye(rank), chance.normal(size=(others, rank))
    row, column = data.draw(st.integers(0, others - 1)), data.draw(st.integers(0, rank - 1))
    coefficients = torch.from_numpy(np.linalg.solve(basis.T, rest.T).T.copy())
    if abs(coefficients[row, column].item()) < 0.1:
        coefficients[row, column] = 1.0
        rest = coefficients.numpy() @ basis
    pivoting._swap(coefficients, row, column)
    basis[column], rest[row] = rest[row].copy(), basis[column].copy()
    np.testing.assert_allclose(coefficients.numpy() @ basis, rest, rtol=0, atol=1e-8 * np.abs(rest).max())


def matrix(form: str, left: np.ndarray, right: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """W_r as a layer of that form and precision applies it, in exact arithmetic on what it stores."""
    rank = right.shape[0]
    dense = torch.nn.Linear(right.shape[1], left.shape[0], bias=False, dtype=dtype)
    layer, entry = low_rank_layer(dense, OneTarget(left, right), "t", rank, form)  # type: ignore[arg-type]
    assert entry["form"] == form
    assert {tensor.dtype for tensor in layer.parameters()} == {dtype}
    with torch.no_grad():
        return layer.double()(torch.eye(right.shape[1], dtype=torch.float64)).T.numpy()


@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_float32_stores_the_product(m: int, n: int, r: int, grade: str) -> None:
    left, right = factors(m, n, r, grade)
    for form in FORMS:
        assert distance(matrix(form, left, right, torch.float32), left @ right) < 1e-5, form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grade", GRADES)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_half_precision_is_near_the_factored_product(
    m: int, n: int, r: int, grade: str, dtype: torch.dtype
) -> None:
    """Within a small multiple of what the same factors lose as factors in that precision."""
    worst = 0.0
    for seed in range(3):
        left, right = factors(m, n, r, grade, seed)
        errors = {form: distance(matrix(form, left, right, dtype), left @ right) for form in FORMS}
        rounding = torch.finfo(dtype).eps / 2
        assert errors["factored"] <= 2 * rounding
        worst = max(worst, errors["pivoted"] / max(errors["factored"], rounding / 2))
    assert worst <= 3


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_layers_of_both_kinds_with_their_biases(form: str, own: bool, mean: bool, kind: str) -> None:
    """y = A_r B_r x + b: b the layer's own and the factors', each where there is one."""
    from transformers.pytorch_utils import Conv1D

    m, n, r = 12, 10, 4
    chance = np.random.default_rng(3)
    left, right = chance.normal(size=(m, r)), chance.normal(size=(r, n))
    given_bias = chance.normal(size=m) if mean else None
    dense = Conv1D(m, n) if kind == "Conv1D" else torch.nn.Linear(n, m, bias=own)
    if kind == "Conv1D" and not own:
        dense.bias = None
    if own:
        torch.nn.init.normal_(dense.bias)
    layer, entry = low_rank_layer(dense, OneTarget(left, right, given_bias), "t", r, form)  # type: ignore[arg-type]
    bias = (dense.bias.detach().numpy() if own else 0) + (given_bias if given_bias is not None else 0)
    x = chance.normal(size=(7, n))
    with torch.no_grad():
        found = layer(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found, x @ (left @ right).T + bias, rtol=0, atol=1e-4)
    assert entry == {"form": form, "rank": r, "bias": own or mean, "in": n, "out": m}


def test_every_row_of_a_pivoted_layer_has_its_place() -> None:
    """A permutation that were its own inverse would hide an order applied backwards."""
    left, right = factors(9, 9, 3, "level")
    found = pivot(torch.from_numpy(left.T), torch.from_numpy(right))
    order = found[2].long()
    assert not torch.equal(order[order], torch.arange(9))
    layer = PivotedLinear(9, 9, 3, False).double()
    layer.load_state_dict(dict(zip(("pivots", "coefficients", "order"), found, strict=True)))
    x = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 9)))
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), x.numpy() @ (left @ right).T, rtol=0, atol=1e-12)
