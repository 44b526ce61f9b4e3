"""Optuna samplers by name, and a seed for every ask that survives a restart."""

from __future__ import annotations

import hashlib
import warnings

import optuna
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.samplers._lazy_random_state import LazyRandomState

from search.sections import SamplerSection


def make_sampler(section: SamplerSection) -> BaseSampler:
    """The sampler a config names.

    `tpe` is multivariate: with the default, independent one an ask costs over half a second at
    200 parameters, and interactions between layers go unseen.
    """
    seed = section.seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if section.name == "nsga2":
            return NSGAIISampler(population_size=section.population, seed=seed)
        if section.name == "nsga3":
            return NSGAIIISampler(population_size=section.population, seed=seed)
        if section.name == "random":
            return RandomSampler(seed=seed)
        return TPESampler(multivariate=True, constant_liar=True, seed=seed)


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
