"""Optuna samplers by name, and a seed for every ask that survives a restart."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable
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

from search.constraints import ATTRIBUTE, Constraint
from search.exchange import ExchangeSampler
from search.landscape import Landscape
from search.sections import SamplerSection


def make_sampler(
    section: SamplerSection,
    landscape: Callable[[], Landscape] | None = None,
    constraints: Iterable[Constraint] = (),
) -> BaseSampler:
    """The sampler a config names; `exchange` works on a landscape, asked for at its first proposal.

    Samplers read what a trial violates from the trial; `gp` must know `constraints`, the study's, as well.
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
            return RestartedGPSampler(seed, [constraint.metric for constraint in constraints])
        return TPESampler(multivariate=True, constant_liar=True, seed=seed)


class RestartedGPSampler(GPSampler):
    """Fits each proposal anew: Optuna's own begins at the kernel of the one before, which a restart lacks.

    Optuna's own also refuses a history whose trials differ in how many constraints they carry, and takes them
    by their order. Another program may complete a trial without them, and nothing says what it violates. So
    this one fits the trials that carry all of the study's, and of each trial those alone, in one order.

    It imports torch at its first fit, after ten such trials.
    """

    def __init__(self, seed: int, constraints: Iterable[str] = ()) -> None:
        """`constraints` are the metrics that the study bounds."""
        super().__init__(seed=seed)
        self._bounded = tuple(constraints)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._gprs_cache_list = self._constraints_gprs_cache_list = None
        return super().sample_relative(study, trial, search_space)

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        known = [found for trial in completed_trials if (found := self._bounded_alone(trial)) is not None]
        if len(known) < self._n_startup_trials:
            return {}
        return super()._sample_relative_impl(study, known, running_trials, search_space)

    def _bounded_alone(self, trial: FrozenTrial) -> FrozenTrial | None:
        """A completed trial with the study's constraints and no other; None where it lacks one."""
        carried = trial.constraints
        if not all(name in carried for name in self._bounded):
            return None
        alone = copy.copy(trial)
        alone.system_attrs = {f"{ATTRIBUTE}{name}": carried[name] for name in self._bounded}
        return alone


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
