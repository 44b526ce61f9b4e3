"""Sums of moments against numpy in float64, however the text is cut."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.moments import Moments, Scatter, Spread, merge

Floats = NDArray[np.float64]


def rows_of(seed: int, tokens: int, width: int, mean: float = 0.0, deviation: float = 1.0) -> torch.Tensor:
    """Rows (tokens, width) in float32, their features not independent."""
    chance = np.random.default_rng(seed)
    mixed = chance.normal(size=(tokens, width)) @ (np.eye(width) + 0.3 * chance.normal(size=(width, width)))
    return torch.tensor(mixed * deviation + mean, dtype=torch.float32)


def scattered(batches: list[torch.Tensor], centred: bool = True) -> Scatter:
    scatter = Scatter(full=True, centred=centred)
    for batch in batches:
        scatter.add(batch)
    return scatter


def measured(batches: list[torch.Tensor]) -> Moments:
    """Moments of a target that read these inputs; their gradients stand for its gradients too."""
    scatter, weighted = scattered(batches), Scatter(full=True)
    for batch in batches:
        weighted.add(batch, batch.square().sum(-1))
    gradient = scattered(batches, centred=False).take_second()
    spread = scatter.take_spread()
    return Moments(spread.mean, scatter.tokens, "input", spread, gradient, weighted.take_spread())


def weighted_spread(rows: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Mean and covariance by numpy's own weights."""
    return np.average(rows, axis=0, weights=weights), np.cov(rows.T, bias=True, aweights=weights)


def close(found: torch.Tensor, expected: Floats, tolerance: float) -> None:
    """Equal relative to the largest entry."""
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1e3, 1.0), (-1e3, 1.0), (3.0, 1e-4)])
def test_scatter_is_numpys_covariance(mean: float, deviation: float) -> None:
    rows = rows_of(0, 500, 6, mean, deviation)
    scatter = scattered([*rows.split(64)])
    reference = rows.double().numpy()
    # rounded in float32 after a shift: to a share of the deviation, not of the mean
    np.testing.assert_allclose(scatter.mean().numpy(), reference.mean(0), rtol=0, atol=1e-6 * deviation)
    close(scatter.take_second(), np.cov(reference.T, bias=True), 1e-6)
    assert scatter.tokens == 500


def test_one_massive_feature_does_not_drown_the_others() -> None:
    """A few activations of real models are hundreds of times their deviation."""
    chance = np.random.default_rng(0)
    table = chance.normal(size=(512, 6)) * [1e-2, 1, 1, 1, 1, 5] + [3e3, -2e3, 500, 0, 0, 0]
    rows = torch.tensor(table, dtype=torch.float32)
    expected = np.cov(rows.double().numpy().T, bias=True)
    found = scattered([*rows.split(64)]).take_second().numpy()
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    # float32 leaves 3000 in steps of 2.4e-4 and the mean is taken off in float32: a step, squared away
    assert (np.abs(found - expected) / scale).max() < 1e-4


def test_gradients_are_summed_about_zero() -> None:
    rows = rows_of(1, 300, 5, mean=2.0)
    reference = rows.double().numpy()
    close(scattered([rows], centred=False).take_second(), reference.T @ reference / 300, 1e-6)


def test_leading_dimensions_are_tokens() -> None:
    rows = rows_of(2, 60, 4)
    whole, shaped = scattered([rows]), scattered([rows.view(5, 12, 4)])
    assert shaped.tokens == whole.tokens == 60
    assert torch.equal(shaped.take_second(), whole.take_second())


def test_a_mean_alone_keeps_no_square() -> None:
    rows = rows_of(3, 50, 4, mean=5.0)
    scatter = Scatter(full=False)
    for batch in rows.split(7):
        scatter.add(batch)
    close(scatter.mean(), rows.double().numpy().mean(0), 1e-7)
    assert not any(isinstance(value, torch.Tensor) and value.dim() == 2 for value in vars(scatter).values())


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("size", [1, 7, 200, 10_000])
def test_the_batches_do_not_show(mean: float, size: int) -> None:
    rows = rows_of(4, 1000, 5, mean)
    reference = rows.double().numpy()
    scatter = scattered([*rows.split(size)])
    np.testing.assert_allclose(scatter.mean().numpy(), reference.mean(0), rtol=0, atol=1e-6)
    close(scatter.take_second(), np.cov(reference.T, bias=True), 1e-6)
    uncentred = scattered([*rows.split(size)], centred=False).take_second()
    close(uncentred, reference.T @ reference / 1000, 1e-6)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.sampled_from([0.0, 1.0, 100.0]))
@settings(deadline=None, max_examples=50)
def test_merged_shards_are_one_pass_over_all(sizes: list[int], step: float) -> None:
    """Shards of any sizes, their means apart."""
    shards = [rows_of(index, size, 4, mean=step * index) for index, size in enumerate(sizes)]
    found = merge([measured([shard]) for shard in shards])
    reference = torch.cat(shards).double().numpy()
    assert found.tokens == sum(sizes)
    close(found.input_mean, reference.mean(0), 1e-6)
    for spread, weights in ((found.spread, np.ones(len(reference))), (found.weighted, (reference**2).sum(1))):
        assert spread is not None
        if sum(sizes) > 1:
            mean, covariance = weighted_spread(reference, weights)
            close(spread.mean, mean, 1e-6)
            tolerance = 1e-6 * max(np.abs(covariance).max(), 1e-3)
            np.testing.assert_allclose(spread.covariance.numpy(), covariance, rtol=0, atol=tolerance)
    assert found.gradient is not None
    close(found.gradient, reference.T @ reference / len(reference), 1e-6)


def test_merging_outputs_keeps_their_mean_apart_from_the_inputs() -> None:
    inputs = rows_of(5, 90, 6, mean=3.0)
    weight = torch.from_numpy(np.random.default_rng(6).normal(size=(2, 6)))
    parts = []
    for shard in inputs.double().split([10, 50, 30]):
        outputs = shard @ weight.T
        covariance = torch.from_numpy(np.cov(outputs.numpy().T, bias=True))
        spread = Spread(outputs.mean(0), covariance, len(shard))
        parts.append(Moments(shard.mean(0), len(shard), "output", spread))
    found = merge(parts)
    outputs = (inputs.double() @ weight.T).numpy()
    assert found.side == "output"
    assert found.gradient is None
    assert found.weighted is None
    assert found.spread is not None
    close(found.spread.mean, outputs.mean(0), 1e-12)
    close(found.input_mean, inputs.double().numpy().mean(0), 1e-12)
    close(found.spread.covariance, np.cov(outputs.T, bias=True), 1e-12)


def test_merging_leaves_its_parts_alone() -> None:
    """Targets that read one input share its tensors: merging one must not change the others."""
    parts = [measured([rows_of(seed, 20, 3, mean=seed)]) for seed in range(3)]
    before = copy.deepcopy(parts)
    merge(parts)
    for part, kept in zip(parts, before, strict=True):
        assert torch.equal(part.spread.covariance, kept.spread.covariance)
        assert torch.equal(part.weighted.covariance, kept.weighted.covariance)
        assert torch.equal(part.gradient, kept.gradient)


def test_texts_without_gradients_have_no_weight() -> None:
    """Neither alone nor beside a text that has some; two of them are as good as any average."""
    rows = [rows_of(seed, 20, 3, mean=seed) for seed in range(2)]
    silent = Scatter(full=True)
    silent.add(rows[0], torch.zeros(20))
    nothing = replace(measured(rows[:1]), gradient=torch.zeros(3, 3).double(), weighted=silent.take_spread())
    loud = measured(rows[1:])
    for parts in ([nothing, loud], [loud, nothing]):
        found = merge(parts)
        torch.testing.assert_close(found.weighted.covariance, loud.weighted.covariance)
        torch.testing.assert_close(found.gradient, loud.gradient / 2)
    assert torch.equal(merge([nothing, nothing]).weighted.covariance, torch.zeros(3, 3).double())


@pytest.mark.parametrize("size", [1, 7, 200])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_weights_are_those_of_numpy(mean: float, size: int) -> None:
    """Weights over six orders of magnitude, some of them zero."""
    rows = rows_of(9, 200, 5, mean)
    chance = np.random.default_rng(10)
    weights = torch.from_numpy(10 ** chance.uniform(-6, 0, size=200) * (chance.random(200) > 0.1))
    scatter = Scatter(full=True)
    for batch, share in zip(rows.split(size), weights.split(size), strict=True):
        scatter.add(batch, share)
    found = scatter.take_spread()
    average, covariance = weighted_spread(rows.double().numpy(), weights.numpy())
    np.testing.assert_allclose(found.mean.numpy(), average, rtol=0, atol=1e-5)
    close(found.covariance, covariance, 1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("bias", ["mean", "none"])
def test_the_small_side_is_that_of_the_fewer_dimensions(rows: int, cols: int, bias: str) -> None:
    inputs = rows_of(7, 80, cols, mean=2.0)
    weight = np.random.default_rng(8).normal(size=(rows, cols))
    reading = inputs.double().numpy()
    small = reading @ weight.T if rows <= cols else reading
    if bias == "mean":
        small = small - small.mean(0)
    moments = measured([inputs])
    close(moments.second(torch.from_numpy(weight), bias), small.T @ small / 80, 1e-5)
    alone = replace(moments, weighted=None)
    close(alone.weighted_second(torch.from_numpy(weight), bias), small.T @ small / 80, 1e-5)
