"""Factors against numpy in float64: full rank, optimality on the text, biases, energies, bad values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.decompose import Factors, Moments, decompose
from actors.types import RankfrontError

Floats = NDArray[np.float64]
SHAPES = [(7, 7), (12, 5), (5, 12), (1, 6), (6, 1)]


@dataclass(frozen=True)
class Case:
    """A weight (m, n) and the inputs (tokens, n) it is calibrated on."""

    weight: Floats
    inputs: Floats

    def moments(self, side: str) -> Moments:
        rows = self.inputs if side == "input" else self.inputs @ self.weight.T
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean) / len(rows)
        tensors = map(torch.from_numpy, (covariance, mean, self.inputs.mean(0)))
        return Moments(side, *tensors, tokens=len(rows))

    def decompose(self, method: str = "feature", bias: str = "mean", side: str | None = None) -> Factors:
        side = side or self.sides[0]
        moments = None if method == "weight" else self.moments(side)
        return decompose("target", torch.from_numpy(self.weight), moments, method, bias)

    @property
    def sides(self) -> list[str]:
        """The sides calibration may keep: the outputs only where they are the smaller side."""
        rows, cols = self.weight.shape
        return ["input"] if cols <= rows else ["input", "output"]

    def reading(self, bias: str) -> Floats:
        """Inputs as the method weighs them: centred where a mean bias takes the mean."""
        return self.inputs - self.inputs.mean(0) if bias == "mean" else self.inputs

    def least_errors(self, bias: str) -> Floats:
        """Least mean squared output error of every rank 0..k: the discarded squares of W X^T / sqrt(N)."""
        values = np.linalg.svd(self.reading(bias) @ self.weight.T, compute_uv=False)[: min(self.weight.shape)]
        squares = values**2 / len(self.inputs)
        squares = np.concatenate((squares, np.zeros(min(self.weight.shape) - len(squares))))
        return np.concatenate((squares[::-1].cumsum()[::-1], [0]))

    def error(self, approximation: Floats, bias: str) -> float:
        """Mean over the tokens of |(W - W_r) x|^2."""
        return float((((self.weight - approximation) @ self.reading(bias).T) ** 2).sum() / len(self.inputs))


def random_case(seed: int, rows: int, cols: int, tokens: int = 60) -> Case:
    chance = np.random.default_rng(seed)
    mixing = chance.normal(size=(cols, cols)) * np.logspace(0, -1.5, cols)
    inputs = chance.normal(size=(tokens, cols)) @ mixing + 2 * chance.normal(size=cols)
    return Case(chance.normal(size=(rows, cols)), inputs)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape; inputs of deficient rank, constant or zero features, one token; weights with zeros."""
    rows, cols, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 30))
    case = random_case(draw(st.integers(0, 2**16)), rows, cols, tokens)
    weight, inputs = case.weight.copy(), case.inputs.copy()
    kind = draw(st.sampled_from(["plain", "low rank", "constant", "zero", "repeated"]))
    if kind == "low rank":
        inputs = inputs[:, :1] * np.ones(cols)
    elif kind == "constant":
        inputs[:, :: draw(st.integers(1, 3))] = draw(st.sampled_from([0.0, 1.0, -100.0]))
    elif kind == "zero":
        weight[:: draw(st.integers(1, 3))] = 0
    elif kind == "repeated":
        weight[-1] = weight[0]
    return Case(weight * draw(st.sampled_from([1e-6, 1.0, 1e4])), inputs)


def at_rank(factors: Factors, rank: int) -> Floats:
    return (factors.left[:, :rank] @ factors.right[:rank]).numpy()


@given(cases(), st.sampled_from(["weight", "feature"]), st.sampled_from(["mean", "none"]))
def test_full_rank_gives_the_weight_back(case: Case, method: str, bias: str) -> None:
    for side in case.sides:
        factors = case.decompose(method, bias, side)
        rank = min(case.weight.shape)
        assert factors.left.shape == (case.weight.shape[0], rank)
        assert factors.right.shape == (rank, case.weight.shape[1])
        scale = max(np.abs(case.weight).max(), 1e-300)
        np.testing.assert_allclose(at_rank(factors, rank), case.weight, rtol=0, atol=1e-10 * scale)


@given(cases(), st.sampled_from(["mean", "none"]))
@settings(max_examples=200)
def test_every_rank_has_the_least_output_error_and_its_energies_say_so(case: Case, bias: str) -> None:
    """Slices of one decomposition reach the optimum of every rank: nested, and none the worse for it."""
    for side in case.sides:
        factors = case.decompose("feature", bias, side)
        least = case.least_errors(bias)
        found = [case.error(at_rank(factors, rank), bias) for rank in range(len(least))]
        scale = max(((case.weight @ case.inputs.T) ** 2).sum() / len(case.inputs), 1e-300)
        np.testing.assert_allclose(found, least, rtol=0, atol=1e-10 * scale)
        energy = factors.energy.numpy()
        np.testing.assert_allclose(energy, -np.diff(least), rtol=0, atol=1e-10 * scale)
        assert (energy >= 0).all()
        assert (np.diff(energy) <= 0).all()


def alternating(case: Case, left: Floats, sweeps: int) -> float:
    """Error of the best L R that alternating least squares reaches from `left`, by numpy's lstsq."""
    outputs, inputs = case.reading("mean") @ case.weight.T, case.reading("mean")
    for _ in range(sweeps):
        hidden = np.linalg.lstsq(left, outputs.T, rcond=None)[0]  # free codes of every token
        right = np.linalg.lstsq(inputs, hidden.T, rcond=None)[0].T
        left = np.linalg.lstsq(inputs @ right.T, outputs, rcond=None)[0].T
    return case.error(left @ right, "mean")


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_no_projection_and_no_alternating_least_squares_is_better(rows: int, cols: int) -> None:
    case = random_case(3, rows, cols, tokens=200)
    factors = case.decompose()
    chance = np.random.default_rng(4)
    for rank in range(1, min(rows, cols) + 1):
        found = case.error(at_rank(factors, rank), "mean")
        for _ in range(20):
            basis = np.linalg.qr(chance.normal(size=(rows, rank)))[0]
            assert found <= case.error(basis @ basis.T @ case.weight, "mean") + 1e-9
        started_apart = alternating(case, chance.normal(size=(rows, rank)), sweeps=300)
        started_there = alternating(case, factors.left[:, :rank].numpy(), sweeps=5)
        assert found <= min(started_apart, started_there) + 1e-9
        assert started_there == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize(("rows", "cols"), [(rows, cols) for rows, cols in SHAPES if rows < cols])
def test_input_and_output_moments_agree(rows: int, cols: int) -> None:
    """Where the outputs are the smaller side, their covariance is as good as that of the inputs."""
    case = random_case(5, rows, cols)
    for bias in ("mean", "none"):
        one, other = case.decompose(bias=bias, side="input"), case.decompose(bias=bias, side="output")
        for rank in range(1, min(rows, cols) + 1):
            np.testing.assert_allclose(at_rank(one, rank), at_rank(other, rank), atol=1e-8)


@given(cases(), st.sampled_from(["weight", "feature"]))
def test_mean_bias_leaves_no_mean_error_at_any_rank(case: Case, method: str) -> None:
    """The moments hold the mean whatever the method: weight factors take their bias from them too."""
    for side in case.sides:
        factors = decompose("t", torch.from_numpy(case.weight), case.moments(side), method, "mean")
        assert factors.offset is not None
        assert factors.shift is not None
        outputs = case.inputs @ case.weight.T
        scale = max(np.abs(outputs).max(), 1e-300)
        for rank in range(1, min(case.weight.shape) + 1):
            bias = factors.offset - factors.left[:, :rank] @ factors.shift[:rank]
            error = outputs - (case.inputs @ at_rank(factors, rank).T + bias.numpy())
            assert np.abs(error.mean(0)).max() <= 1e-10 * scale


def test_without_a_bias_there_is_nothing_to_make_one_of() -> None:
    factors = random_case(6, 4, 6).decompose(bias="none")
    assert factors.offset is None
    assert factors.shift is None


def test_no_bias_weighs_the_mean_and_mean_bias_does_not() -> None:
    """Along a large mean the raw second moment keeps what the covariance throws away."""
    chance = np.random.default_rng(7)
    inputs = chance.normal(size=(100, 4)) * [0.1, 1, 1, 1] + [50, 0, 0, 0]
    case = Case(np.eye(4), inputs)
    kept_raw = at_rank(case.decompose(bias="none"), 1)
    kept_centred = at_rank(case.decompose(bias="mean"), 1)
    assert kept_raw[0, 0] > 0.99
    assert abs(kept_centred[0, 0]) < 0.05


@given(cases())
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


@given(cases(), st.sampled_from(["weight", "feature"]))
def test_both_factors_of_a_rank_have_equal_norms(case: Case, method: str) -> None:
    factors = case.decompose(method)
    left, right = factors.left.norm(dim=0).numpy(), factors.right.norm(dim=1).numpy()
    kept = right > 1e-6 * right.max()
    np.testing.assert_allclose(left[kept], right[kept], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision_is_worked_in_float64(dtype: torch.dtype) -> None:
    case = random_case(8, 6, 9)
    weight = torch.from_numpy(case.weight).to(dtype)
    factors = decompose("t", weight, case.moments("input"), "feature", "mean")
    assert factors.left.dtype == factors.right.dtype == factors.energy.dtype == torch.float64
    torch.testing.assert_close(factors.left @ factors.right, weight.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_values_are_counted_and_their_target_named(value: float) -> None:
    case = random_case(9, 4, 6)
    bad = case.weight.copy()
    bad[0, :2] = value
    sound = case.moments("input")
    with pytest.raises(RankfrontError, match=r"block\.3\.up: 2 non-finite values in its weight \(4, 6\)"):
        decompose("block.3.up", torch.from_numpy(bad), sound, "feature", "mean")
    with pytest.raises(RankfrontError, match=r"block\.3\.up: 2 non-finite values in its weight"):
        decompose("block.3.up", torch.from_numpy(bad), None, "weight", "none")
    covariance, mean = sound.covariance.clone(), sound.input_mean.clone()
    covariance[1, 1] = mean[2] = value
    weight = torch.from_numpy(case.weight)
    with pytest.raises(RankfrontError, match=r"block\.3\.up: 1 non-finite values in its moments \(6, 6\)"):
        decompose("block.3.up", weight, replace(sound, covariance=covariance), "feature", "mean")
    with pytest.raises(RankfrontError, match=r"block\.3\.up: 1 non-finite values in its input mean \(6,\)"):
        decompose("block.3.up", weight, replace(sound, input_mean=mean), "feature", "mean")
