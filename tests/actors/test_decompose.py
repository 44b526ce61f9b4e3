"""Factors against numpy in float64: optimality, exactness, biases, predicted losses, bad values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decompositions import (
    BIASES,
    METHOD_NAMES,
    SHAPES,
    Case,
    Floats,
    at_rank,
    best_errors,
    cases,
    damped,
    numpy_root,
    product_in_single_precision,
    random_case,
    relative_difference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.decompose import damped_roots, damping, decompose
from actors.moments import Moments, Spread
from actors.types import RankfrontError


@given(cases(), st.sampled_from(METHOD_NAMES), st.sampled_from(BIASES))
@settings(max_examples=100, deadline=None)
def test_full_rank_gives_the_weight_back(case: Case, method: str, bias: str) -> None:
    for side in case.sides:
        factors = case.decompose(method, bias, side)
        rows, cols = case.weight.shape
        assert factors.left.shape == (rows, case.full_rank)
        assert factors.right.shape == (case.full_rank, cols)
        for tensor in vars(factors).values():
            assert tensor is None or torch.isfinite(tensor).all()
        assert relative_difference(product_in_single_precision(factors), case.weight) < 1e-5


@st.composite
def conditioned(draw: st.DrawFn, size: int, chance: np.random.Generator) -> Floats:
    """A moment (size, size) of condition up to 1e12 in a basis of its own; some are singular."""
    basis = np.linalg.qr(chance.normal(size=(size, size)))[0]
    values = np.logspace(0, -draw(st.sampled_from([0, 6, 9, 12])), size)
    kind = draw(st.sampled_from(["graded", "one massive", "singular", "huge", "tiny"]))
    if kind == "one massive":
        values[1:] = values[-1]
    elif kind == "singular":
        values[size // 2 :] = 0
    scale = {"huge": 1e12, "tiny": 1e-18}.get(kind, 1.0)
    return (basis * values * scale) @ basis.T


@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16), st.sampled_from(METHOD_NAMES))
@settings(max_examples=100, deadline=None)
def test_full_rank_survives_badly_conditioned_moments(
    data: Any, rows: int, cols: int, seed: int, method: str
) -> None:
    chance = np.random.default_rng(seed)
    weight = chance.normal(size=(rows, cols))
    covariance = data.draw(conditioned(cols, chance))
    gradient = data.draw(conditioned(rows, chance))
    if cols < rows:
        gradient = weight.T @ gradient @ weight
    mean = torch.from_numpy(chance.normal(size=cols))
    alike = Spread(mean, torch.from_numpy(covariance), 100)
    moments = Moments(mean, 100, "input", alike, gradient=torch.from_numpy(gradient))
    factors = decompose("t", torch.from_numpy(weight), moments, method, "mean")
    assert relative_difference(product_in_single_precision(factors), weight) < 1e-5


@given(cases(), st.sampled_from(BIASES))
@settings(max_examples=100, deadline=None)
def test_every_rank_of_feature_has_the_least_output_error(case: Case, bias: str) -> None:
    """Slices of one decomposition reach the optimum of every rank: nested, and none the worse for it."""
    for side in case.sides:
        factors = case.decompose("feature", bias, side)
        least = best_errors(case.reading(bias) @ case.weight.T, case.full_rank) / len(case.inputs)
        found = [case.error(at_rank(factors, rank), bias) for rank in range(len(least))]
        scale = max(((case.weight @ case.inputs.T) ** 2).sum() / len(case.inputs), 1e-300)
        np.testing.assert_allclose(found, least, rtol=0, atol=1e-10 * scale)
        energy = factors.energy.numpy()
        np.testing.assert_allclose(energy, -np.diff(least), rtol=0, atol=1e-10 * scale)
        assert (energy >= 0).all()
        assert (np.diff(energy) <= 0).all()


def alternating(inputs: Floats, outputs: Floats, left: Floats, sweeps: int) -> float:
    """Mean squared error of the affine map of rank r that alternating least squares reaches from `left`."""
    augmented = np.hstack((inputs, np.ones((len(inputs), 1))))
    offset = outputs.mean(0)
    for _ in range(sweeps):
        codes = np.linalg.lstsq(left, (outputs - offset).T, rcond=None)[0].T
        right = np.linalg.lstsq(augmented, codes, rcond=None)[0]
        hidden = np.hstack((augmented @ right, np.ones((len(inputs), 1))))
        solved = np.linalg.lstsq(hidden, outputs, rcond=None)[0]
        left, offset = solved[:-1].T, solved[-1]
    return float(((outputs - hidden @ solved) ** 2).sum() / len(inputs))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_no_affine_map_that_alternating_least_squares_finds_is_better(rows: int, cols: int) -> None:
    case = random_case(3, rows, cols, tokens=200)
    factors = case.decompose()
    assert factors.offset is not None
    assert factors.shift is not None
    outputs = case.inputs @ case.weight.T
    chance = np.random.default_rng(4)
    for rank in range(1, case.full_rank + 1):
        bias = factors.offset - factors.left[:, :rank] @ factors.shift[:rank]
        made = case.inputs @ at_rank(factors, rank).T + bias.numpy()
        found = ((outputs - made) ** 2).sum() / len(outputs)
        starts = [chance.normal(size=(rows, rank)) for _ in range(4)]
        reached = [alternating(case.inputs, outputs, start, sweeps=100) for start in starts]
        assert found <= min(reached) + 1e-9
        # the comparison is worth something: the rival does get there
        there = alternating(case.inputs, outputs, factors.left[:, :rank].numpy(), sweeps=3)
        assert there == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("bias", BIASES)
def test_curvature_is_the_truncated_two_sided_whitened_weight(rows: int, cols: int, bias: str) -> None:
    """G^-1/2 [G^1/2 W S^1/2]_r S^-1/2 with numpy's SVD, roots of both sides and nothing shared."""
    case = random_case(5, rows, cols, tokens=400)
    left, right = case.gradients, case.weighted(bias)
    both = left.T @ left / len(left), right.T @ right
    gradient, second = (damped(both[0]), both[1]) if rows <= cols else (both[0], damped(both[1]))
    left_root, right_root = numpy_root(gradient), numpy_root(second)
    basis, values, across = np.linalg.svd(left_root @ case.weight @ right_root, full_matrices=False)
    for side in case.sides:
        factors = case.decompose("curvature", bias, side)
        for rank in range(1, case.full_rank + 1):
            truncated = (basis[:, :rank] * values[:rank]) @ across[:rank]
            expected = np.linalg.solve(left_root, truncated) @ np.linalg.inv(right_root)
            assert relative_difference(at_rank(factors, rank), expected) < 1e-8


@given(cases(), st.sampled_from(BIASES))
@settings(max_examples=100, deadline=None)
def test_every_rank_of_curvature_is_optimal_in_its_metric(case: Case, bias: str) -> None:
    for side in case.sides:
        factors = case.decompose("curvature", bias, side)
        left, right = case.roots(bias)
        least = best_errors(left @ case.weight @ right.T, case.full_rank)
        found = [case.metric(at_rank(factors, rank), bias) for rank in range(len(least))]
        # what is left beside constant features is the rounding of their covariance
        scale = (np.linalg.norm(left) * np.linalg.norm(case.weight) * np.linalg.norm(case.inputs)) ** 2
        tolerance = 1e-9 * max(least[0], 1e-6 * scale / len(case.inputs), 1e-300)
        np.testing.assert_allclose(found, least, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("bias", BIASES)
def test_curvature_is_feature_where_all_gradients_weigh_the_same(rows: int, cols: int, bias: str) -> None:
    """With G = I; a tall weight's inputs are damped, so `feature` is given the damped ones there."""
    case = random_case(6, rows, cols)
    weight = torch.from_numpy(case.weight)
    flat = torch.eye(rows, dtype=torch.float64) if rows <= cols else weight.T @ weight
    moments = replace(case.moments(), gradient=flat, weighted=None)
    curved = decompose("t", weight, moments, "curvature", bias)
    if cols < rows:
        second = torch.from_numpy(damped(moments.second(weight, bias).numpy()))
        moments = replace(moments, spread=Spread(torch.zeros(cols).double(), second, 60), gradient=None)
    plain = decompose("t", weight, moments, "feature", bias)
    for rank in range(1, case.full_rank + 1):
        assert relative_difference(at_rank(curved, rank), at_rank(plain, rank)) < 1e-8


@pytest.mark.parametrize(
    "values", [[0.0, 0, 0], [1.0, 0, 0], [1.0, 1e-20, 1e-20], [1e-18, 1e-9, 1e3], [2.0], [0.0]], ids=str
)
def test_damped_roots_are_roots_of_the_damped_moment_and_each_others_inverse(values: list[float]) -> None:
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(len(values), len(values))))[0]
    moment = (basis * values) @ basis.T
    root, inverse = (tensor.numpy() for tensor in damped_roots(torch.from_numpy(moment)))
    amount = damping(torch.tensor(values, dtype=torch.float64))
    assert amount > 0
    expected = moment + amount * np.eye(len(values))
    np.testing.assert_allclose(root @ root, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    reach = np.linalg.norm(root) * np.linalg.norm(inverse)
    np.testing.assert_allclose(root @ inverse, np.eye(len(values)), rtol=0, atol=1e-13 * reach)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("bias", BIASES)
def test_more_rank_is_never_worse_in_the_methods_own_metric(rows: int, cols: int, bias: str) -> None:
    case = random_case(7, rows, cols)
    metrics = {
        "weight": lambda found: float(((case.weight - found) ** 2).sum()),
        "feature": lambda found: case.error(found, bias),
        "curvature": lambda found: case.metric(found, bias),
    }
    for method, metric in metrics.items():
        factors = case.decompose(method, bias)
        errors = np.array([metric(at_rank(factors, rank)) for rank in range(case.full_rank + 1)])
        assert (np.diff(errors) < 0).all()
        assert errors[-1] < 1e-12 * errors[0]


@given(cases(), st.sampled_from(METHOD_NAMES), st.sampled_from(BIASES))
@settings(max_examples=100, deadline=None)
def test_predicted_losses_are_those_of_every_rank(case: Case, method: str, bias: str) -> None:
    """Suffix sums against 1/2 tr(G D S_g D^T) from every gradient and every input, undamped."""
    for side in case.sides:
        factors = case.decompose(method, bias, side)
        assert factors.loss is not None
        expected = [case.loss(at_rank(factors, rank), bias) for rank in range(case.full_rank + 1)]
        found = [factors.loss[rank:].sum().item() for rank in range(case.full_rank + 1)]
        # centred inputs are what rounding left of the raw ones where features are constant
        norms = [np.linalg.norm(each) for each in (case.gradients, case.weight, case.inputs)]
        rounding = 1e-16 * np.prod(norms) ** 2 / len(case.inputs) ** 2
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 * max(expected) + rounding + 1e-300)
        if method == "curvature":
            np.testing.assert_allclose(
                factors.energy.numpy() / 2,
                factors.loss.numpy(),
                rtol=1e-6,
                atol=max(rounding, 1e-300) + 1e-8 * max(expected),
            )


@pytest.mark.parametrize(("rows", "cols"), [(rows, cols) for rows, cols in SHAPES if rows < cols])
@pytest.mark.parametrize("method", ["feature", "curvature"])
@pytest.mark.parametrize("bias", BIASES)
def test_input_and_output_moments_agree(rows: int, cols: int, method: str, bias: str) -> None:
    """Where the outputs are the smaller side, their covariance is as good as that of the inputs."""
    case = random_case(5, rows, cols)
    one, other = (case.decompose(method, bias, side) for side in ("input", "output"))
    for rank in range(1, case.full_rank + 1):
        np.testing.assert_allclose(at_rank(one, rank), at_rank(other, rank), atol=1e-8)


@given(cases(), st.sampled_from(METHOD_NAMES))
@settings(deadline=None)
def test_mean_bias_leaves_no_mean_error_at_any_rank(case: Case, method: str) -> None:
    """The moments hold the mean whatever the method: weight factors take their bias from them too."""
    for side in case.sides:
        factors = case.decompose(method, "mean", side)
        assert factors.offset is not None
        assert factors.shift is not None
        outputs = case.inputs @ case.weight.T
        for rank in range(1, case.full_rank + 1):
            parts = factors.left[:, :rank], factors.right[:rank]
            bias = factors.offset - parts[0] @ factors.shift[:rank]
            error = outputs - (case.inputs @ at_rank(factors, rank).T + bias.numpy())
            reach = (parts[0].norm() * parts[1].norm()).item() + np.linalg.norm(case.weight)
            assert np.abs(error.mean(0)).max() <= 1e-12 * reach * np.linalg.norm(case.inputs) + 1e-300


def test_without_a_bias_there_is_nothing_to_make_one_of() -> None:
    factors = random_case(6, 4, 6).decompose(bias="none")
    assert factors.offset is None
    assert factors.shift is None


def test_without_gradients_there_is_no_predicted_loss() -> None:
    case = random_case(6, 4, 6)
    moments = replace(case.moments(), gradient=None)
    for given_moments, method in ((moments, "feature"), (moments, "weight"), (None, "weight")):
        factors = decompose("t", torch.from_numpy(case.weight), given_moments, method, "none")
        assert factors.loss is None


def test_no_bias_weighs_the_mean_and_mean_bias_does_not() -> None:
    """Along a large mean the raw second moment keeps what the covariance throws away."""
    chance = np.random.default_rng(7)
    inputs = chance.normal(size=(100, 4)) * [0.1, 1, 1, 1] + [50, 0, 0, 0]
    case = Case(np.eye(4), inputs, chance.normal(size=(100, 4)))
    kept_raw = at_rank(case.decompose(bias="none"), 1)
    kept_centred = at_rank(case.decompose(bias="mean"), 1)
    assert kept_raw[0, 0] > 0.99
    assert abs(kept_centred[0, 0]) < 0.05


@given(cases())
@settings(deadline=None)
def test_weight_method_is_numpys_truncated_svd(case: Case) -> None:
    factors = case.decompose("weight", "none")
    left, values, right = np.linalg.svd(case.weight, full_matrices=False)
    scale = max(values[0], 1e-300)
    np.testing.assert_allclose(factors.energy.numpy(), values**2, rtol=0, atol=1e-12 * scale**2)
    for rank in range(1, len(values) + 1):
        if rank < len(values) and values[rank - 1] - values[rank] < 1e-6 * scale:
            continue  # a tie: the truncation is not unique
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(at_rank(factors, rank), expected, rtol=0, atol=1e-9 * scale)


@given(cases(), st.sampled_from(METHOD_NAMES))
@settings(deadline=None)
def test_both_factors_of_a_rank_have_equal_norms(case: Case, method: str) -> None:
    factors = case.decompose(method)
    left, right = factors.left.norm(dim=0).numpy(), factors.right.norm(dim=1).numpy()
    np.testing.assert_allclose(left, right, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision_is_worked_in_float64(dtype: torch.dtype) -> None:
    case = random_case(8, 6, 9)
    weight = torch.from_numpy(case.weight).to(dtype)
    factors = decompose("t", weight, case.moments(), "curvature", "mean")
    assert factors.left.dtype == factors.right.dtype == factors.energy.dtype == torch.float64
    torch.testing.assert_close(factors.left @ factors.right, weight.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_values_are_counted_and_their_target_named(value: float) -> None:
    case = random_case(9, 4, 6)
    sound = case.moments()
    bad = torch.from_numpy(case.weight.copy())
    bad[0, :2] = value
    for moments, method in ((sound, "curvature"), (sound, "feature"), (None, "weight")):
        with pytest.raises(RankfrontError, match=r"block\.3\.up: 2 non-finite values in its weight \(4, 6\)"):
            decompose("block.3.up", bad, moments, method, "none")
    weight = torch.from_numpy(case.weight)

    def spoiled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_fill(0, torch.tensor([1]), value)

    for what, moments in {
        r"6 non-finite values in its second moment \(6, 6\)": replace(
            sound, spread=replace(sound.spread, covariance=spoiled(sound.spread.covariance))
        ),
        r"1 non-finite values in its second moment's mean \(6,\)": replace(
            sound, spread=replace(sound.spread, mean=spoiled(sound.spread.mean))
        ),
        r"4 non-finite values in its weighted moment \(4, 4\)": replace(
            sound, weighted=replace(sound.weighted, covariance=spoiled(sound.weighted.covariance))
        ),
        r"1 non-finite values in its input mean \(6,\)": replace(sound, input_mean=spoiled(sound.input_mean)),
        r"4 non-finite values in its gradient moment \(4, 4\)": replace(
            sound, gradient=spoiled(sound.gradient)
        ),
    }.items():
        with pytest.raises(RankfrontError, match=rf"block\.3\.up: {what}"):
            decompose("block.3.up", weight, moments, "curvature", "none")
