"""Multipliers learned from trials, held against the primal closed form of Bayesian linear regression."""

from __future__ import annotations

import numpy as np
import pytest

from search import multipliers
from search.multipliers import TAUS, learn

RNG = np.random.default_rng(3)
TRIALS, WIDTH = 40, 6
PREDICTED = RNG.uniform(0.1, 1.0, (TRIALS, WIDTH))
TOTALS = PREDICTED.sum(axis=1)
SHARES = PREDICTED / TOTALS[:, None]
TRUE = np.array([0.6, -0.4, 0.3, -0.2, 0.1, -0.4])
SPREAD = np.linspace(1, 2, TRIALS)


def test_the_mean_is_that_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """(F^T N^-1 F + I / tau^2)^-1 F^T N^-1 r, where only one tau and one noise can be chosen."""
    monkeypatch.setattr(multipliers, "TAUS", (0.3, 0.3))
    monkeypatch.setattr(multipliers, "NOISES", (0.05,))
    y = 2.5 * TOTALS * (1 + SHARES @ TRUE + 0.05 * RNG.standard_normal(TRIALS))
    learned = learn(SHARES, TOTALS, y, SPREAD, np.random.RandomState(0))
    residual = y / (learned.scale * TOTALS) - 1
    precision = np.diag(1 / (0.05 * SPREAD) ** 2)
    covariance = np.linalg.inv(SHARES.T @ precision @ SHARES + np.eye(WIDTH) / 0.3**2)
    np.testing.assert_allclose(learned.mean, covariance @ SHARES.T @ precision @ residual, rtol=1e-8)


def test_draws_scatter_as_the_posterior_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipliers, "TAUS", (0.3,))
    monkeypatch.setattr(multipliers, "NOISES", (0.05,))
    y = 2.5 * TOTALS * (1 + SHARES @ TRUE)
    learned = [learn(SHARES, TOTALS, y, SPREAD, np.random.RandomState(seed)) for seed in range(800)]
    draws = np.array([each.draw for each in learned])
    precision = np.diag(1 / (0.05 * SPREAD) ** 2)
    covariance = np.linalg.inv(SHARES.T @ precision @ SHARES + np.eye(WIDTH) / 0.3**2)
    np.testing.assert_allclose(draws.mean(axis=0), learned[0].mean, atol=0.04)
    np.testing.assert_allclose(draws.std(axis=0), np.sqrt(np.diag(covariance)), rtol=0.15)


def test_multipliers_of_exact_losses_are_recovered() -> None:
    """A multiple of all is the scale's; what is left are the deviations from it."""
    true = 1 + TRUE
    learned = learn(SHARES, TOTALS, 2.5 * PREDICTED @ true, SPREAD, np.random.RandomState(0))
    np.testing.assert_allclose(learned.scale * (1 + learned.mean), 2.5 * true, rtol=0.1)


def test_nothing_is_learned_of_losses_that_do_not_rise() -> None:
    for y in (-TOTALS, 0 * TOTALS):
        learned = learn(SHARES, TOTALS, y, SPREAD, np.random.RandomState(0))
        assert learned.scale == 0
        assert not learned.mean.any()
        assert 0 < np.abs(learned.draw).max() < 5 * TAUS[1]


def test_no_trials_are_the_prior() -> None:
    learned = learn(SHARES[:0], TOTALS[:0], TOTALS[:0], SPREAD[:0], np.random.RandomState(0))
    assert learned.scale == 0
    assert not learned.mean.any()
