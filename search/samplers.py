"""Optuna samplers by name, and a seed for every ask that survives a restart."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.study import Study
from optuna.trial import FrozenTrial

from search.exchange import ExchangeSampler
from search.landscape import Landscape
from search.sections import SamplerSection


def make_sampler(section: SamplerSection, landscape: Callable[[], Landscape] | None = None) -> BaseSampler:
    """The sampler a config names; `exchange` works on a landscape, asked for at its first proposal.

    `tpe` is multivariate: with the default, independent one an ask costs over half a second at
    200 parameters, and interactions between layers go unseen.
    """
    seed = section.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if section.name == "exchange":
            return ExchangeSampler(landscape, seed)
        if section.name == "nsga2":
            return NSGAIISampler(population_size=section.population, seed=seed)
        if section.name == "nsga3":
            return NSGAIIISampler(population_size=section.population, seed=seed)
        if section.name == "random":
            return RandomSampler(seed=seed)
        if section.name == "gp":
            return RestartedGPSampler(seed=seed)
        return TPESampler(multivariate=True, constant_liar=True, seed=seed)


class RestartedGPSampler(GPSampler):
    """Fits each proposal anew: Optuna's own begins at the kernel of the one before, which a restart lacks.

    It imports torch at its first fit, after ten finished trials.
    """

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._gprs_cache_list = self._constraints_gprs_cache_list = None
        return super().sample_relative(study, trial, search_space)


def reseed(sampler: BaseSampler, seed: int, number: int) -> None:
    """Make the sampler's next draws a function of (study seed, trial number).

    A seeded sampler would otherwise repeat its first proposals after every restart.
    """
    _reseed(sampler, f"{seed}/{number}")


def _reseed(owner: object, path: str) -> None:
    for name, value in vars(owner).items():
        if isinstance(value, LazyRandomState):
            value.rng.seed(int.from_bytes(hashlib.sha256(f"{path}/{name}".encode()).digest()[:4], "big"))
        elif isinstance(value, BaseSampler):
            _reseed(value, f"{path}/{name}")
