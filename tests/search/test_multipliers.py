"""Multipliers learned from trials, held against the primal closed form of Bayesian linear regression."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from search import multipliers
from search.multipliers import FLOOR, TAUS, WIDTH, learn, of_size

RNG = np.random.default_rng(3)
TRIALS, COUNT = 40, 6
PREDICTED = RNG.uniform(0.1, 1.0, (TRIALS, COUNT))
TOTALS = PREDICTED.sum(axis=1)
SHARES = PREDICTED / TOTALS[:, None]
TRUE = np.array([0.6, -0.4, 0.3, -0.2, 0.1, -0.4])
SPREAD = np.linspace(1, 2, TRIALS)
SIZES = RNG.uniform(0.4, 1.0, TRIALS)
NEAR = np.exp(-0.5 * ((SIZES[:, None] - SIZES) / WIDTH) ** 2)
NEAR /= NEAR.sum(axis=1, keepdims=True)
UNIT = TOTALS + FLOOR * np.median(TOTALS)


def centred(values: np.ndarray) -> np.ndarray:
    """What trials differ by from those of about their size, in errors' units."""
    return (values - NEAR @ values) / (UNIT if values.ndim == 1 else UNIT[:, None])


def test_the_mean_is_that_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """(F^T N^-1 F + I / tau^2)^-1 F^T N^-1 r, where only one tau and one noise can be chosen."""
    monkeypatch.setattr(multipliers, "TAUS", (0.3, 0.3))
    monkeypatch.setattr(multipliers, "NOISES", (0.05,))
    y = 2.5 * TOTALS * (1 + SHARES @ TRUE + 0.05 * RNG.standard_normal(TRIALS))
    learned = learn(SHARES, TOTALS, y, SPREAD, SIZES, np.random.RandomState(0))
    residual, parts = centred(y / learned.scale - TOTALS), centred(PREDICTED)
    precision = np.diag(1 / (0.05 * SPREAD) ** 2)
    covariance = np.linalg.inv(parts.T @ precision @ parts + np.eye(COUNT) / 0.3**2)
    np.testing.assert_allclose(learned.mean, covariance @ parts.T @ precision @ residual, rtol=1e-8)


def test_draws_scatter_as_the_posterior_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipliers, "TAUS", (0.3,))
    monkeypatch.setattr(multipliers, "NOISES", (0.05,))
    y = 2.5 * TOTALS * (1 + SHARES @ TRUE)
    learned = [learn(SHARES, TOTALS, y, SPREAD, SIZES, np.random.RandomState(seed)) for seed in range(800)]
    draws = np.array([each.draw for each in learned])
    precision = np.diag(1 / (0.05 * SPREAD) ** 2)
    parts = centred(PREDICTED)
    covariance = np.linalg.inv(parts.T @ precision @ parts + np.eye(COUNT) / 0.3**2)
    np.testing.assert_allclose(draws.mean(axis=0), learned[0].mean, atol=0.04)
    np.testing.assert_allclose(draws.std(axis=0), np.sqrt(np.diag(covariance)), rtol=0.15)


def test_multipliers_of_exact_losses_are_recovered() -> None:
    """A multiple of all is the scale's; what is left are the deviations from it."""
    true = 1 + TRUE
    learned = learn(SHARES, TOTALS, 2.5 * PREDICTED @ true, SPREAD, SIZES, np.random.RandomState(0))
    np.testing.assert_allclose(learned.scale * (1 + learned.mean), 2.5 * true, rtol=0.1)


def test_what_all_of_a_size_have_in_common_bends_no_multiplier() -> None:
    """A smooth function of size on top changes hardly anything of what is learned, a constant nothing."""
    true, common = 1 + TRUE, np.sin(4 * SIZES)
    losses = 2.5 * PREDICTED @ true
    clean, bent = (
        learn(SHARES, TOTALS, y, SPREAD, SIZES, np.random.RandomState(0)) for y in (losses, losses + common)
    )
    found, expected = bent.scale * (1 + bent.mean), clean.scale * (1 + clean.mean)
    np.testing.assert_allclose(found, expected, atol=0.25)
    assert np.corrcoef(found, true)[0, 1] > 0.98
    raised = learn(SHARES, TOTALS, losses - 0.7, SPREAD, SIZES, np.random.RandomState(0))
    assert raised.scale == pytest.approx(clean.scale)
    np.testing.assert_allclose(raised.mean, clean.mean, atol=1e-9)


def test_weights_of_about_a_size_are_those_of_a_gaussian_and_of_the_nearest_far_away() -> None:
    sizes = np.array([0.5, 0.5 + WIDTH, 0.9])
    weights = of_size(np.array([0.5, 20.0]), sizes)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights[0, 1] / weights[0, 0], np.exp(-0.5))
    np.testing.assert_allclose(weights[1], [0, 0, 1], atol=1e-12)


def test_nothing_is_learned_of_losses_that_do_not_rise() -> None:
    for y in (-TOTALS, 0 * TOTALS):
        learned = learn(SHARES, TOTALS, y, SPREAD, SIZES, np.random.RandomState(0))
        assert learned.scale == 0
        assert not learned.mean.any()
        assert 0 < np.abs(learned.draw).max() < 5 * TAUS[1]


def test_no_trials_are_the_prior() -> None:
    learned = learn(SHARES[:0], TOTALS[:0], TOTALS[:0], SPREAD[:0], SIZES[:0], np.random.RandomState(0))
    assert learned.scale == 0
    assert not learned.mean.any()


def test_the_most_evident_spreads_are_those_of_the_gaussian_likelihood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multipliers, "TAUS", (0.1, 0.3, 0.9, 2.0))
    monkeypatch.setattr(multipliers, "NOISES", (0.01, 0.05, 0.2))
    found = set()
    for seed in range(12):
        chance = np.random.default_rng(seed)
        features, spread = chance.standard_normal((30, COUNT)), chance.uniform(1, 3, 30)
        residual = features @ chance.normal(0, chance.choice([0.1, 1.0]), COUNT)
        residual = residual + chance.choice([0.01, 0.2]) * spread * chance.standard_normal(30)
        pairs = [(tau, noise) for tau in multipliers.TAUS for noise in multipliers.NOISES]
        likelihoods = [
            multivariate_normal(cov=tau**2 * features @ features.T + np.diag((noise * spread) ** 2)).logpdf(
                residual
            )
            for tau, noise in pairs
        ]
        best = multipliers._most_evident(features @ features.T, residual, spread)
        assert best == pairs[int(np.argmax(likelihoods))]
        found.add(best)
    assert len(found) > 2
