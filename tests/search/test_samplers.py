"""Samplers by name; every ask a function of (study seed, trial number) and the trials before it."""

from __future__ import annotations

import warnings

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler

from search.exchange import ExchangeSampler
from search.rules import GP_PARAMETERS, sampler_problem
from search.samplers import RestartedGPSampler, make_sampler, reseed
from search.sections import SamplerSection

NAMES = ("exchange", "nsga2", "nsga3", "tpe", "random")
LEVELS = {f"x{index}": IntDistribution(0, 1000) for index in range(6)}
METHODS = {
    f"method/x{index}": CategoricalDistribution(("weight", "feature", "curvature")) for index in range(2)
}
SPACE: dict[str, BaseDistribution] = {**LEVELS, **METHODS}
every_sampler = pytest.mark.parametrize("name", NAMES)


def history(count: int) -> optuna.Study:
    """A study of `count` finished trials: past every sampler's start-up, with a whole generation."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=RandomSampler(seed=9))
    for number in range(count):
        trial = study.ask(SPACE)
        frozen = study._storage.get_trial(trial._trial_id)
        for key in ("NSGAIISampler:generation", "NSGAIIISampler:generation"):
            study._storage.set_trial_system_attr(frozen._trial_id, key, number // 8)
        x = [trial.params[name] for name in LEVELS]
        study.tell(trial, [sum(x), -min(x)])
    return study


def ask(sampler: BaseSampler, seed: int, number: int, trials: int = 24) -> dict[str, int | str]:
    study = history(trials)
    study.sampler = sampler
    reseed(sampler, seed, number)
    return study.ask(SPACE).params


def make(name: str, seed: int = 0) -> BaseSampler:
    return make_sampler(SamplerSection(name=name, seed=seed, population=8))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("exchange", ExchangeSampler),
        ("nsga2", NSGAIISampler),
        ("nsga3", NSGAIIISampler),
        ("tpe", TPESampler),
        ("gp", RestartedGPSampler),
        ("random", RandomSampler),
    ],
)
def test_a_name_makes_its_sampler(name: str, kind: type[BaseSampler]) -> None:
    assert type(make(name)) is kind


def test_gp_is_refused_where_it_would_not_finish() -> None:
    assert sampler_problem("gp", GP_PARAMETERS) is None
    assert sampler_problem("exchange", 224) is None
    problem = sampler_problem("gp", GP_PARAMETERS + 1)
    assert problem is not None
    assert all(word in problem for word in ("'gp'", "at most 20", "has 21", "exchange"))


@every_sampler
def test_a_user_sees_no_warning_about_a_sampler_that_the_config_offers(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(name)


@every_sampler
@pytest.mark.parametrize("trials", [0, 24])
def test_a_draw_is_a_function_of_seed_and_number(name: str, trials: int) -> None:
    used = make(name, seed=5)
    for number in range(3):
        ask(used, 5, number, trials)
    assert ask(used, 1, 7, trials) == ask(make(name, seed=2), 1, 7, trials), "whatever was drawn before"


@every_sampler
@pytest.mark.parametrize("trials", [0, 24])
def test_draws_differ_between_numbers_and_seeds(name: str, trials: int) -> None:
    drawn = [ask(make(name), seed, number, trials) for seed in (0, 1) for number in range(6)]
    assert len({tuple(sorted(params.items())) for params in drawn}) > 9


@every_sampler
@pytest.mark.parametrize("trials", [0, 24])
def test_a_method_is_drawn_as_levels_are(name: str, trials: int) -> None:
    """Each of its choices at the start of a sampler, more than one when it has learned."""
    drawn = [ask(make(name), seed, 7, trials) for seed in range(16)]
    assert all(set(params) == set(SPACE) for params in drawn)
    for parameter, distribution in METHODS.items():
        found = {params[parameter] for params in drawn}
        assert found <= set(distribution.choices)
        assert len(found) == len(distribution.choices) if trials == 0 else len(found) > 1


@every_sampler
def test_two_generators_of_one_sampler_get_different_seeds(name: str) -> None:
    """Equal seeds would tie crossover to mutation, and the independent sampler to the relative one."""
    from optuna.samplers._lazy_random_state import LazyRandomState

    def generators(owner: object) -> list[LazyRandomState]:
        found = []
        for value in vars(owner).values():
            if isinstance(value, LazyRandomState):
                found.append(value)
            elif isinstance(value, BaseSampler) or type(value).__name__.endswith("Strategy"):
                found += generators(value)
        return found

    sampler = make(name)
    reseed(sampler, 0, 0)
    unique = {id(generator): generator for generator in generators(sampler)}.values()
    first = [generator.rng.random_sample() for generator in unique]
    assert first
    assert len(set(first)) == len(first)
    reseed(sampler, 0, 0)
    assert [generator.rng.random_sample() for generator in unique] == first, "every generator is reseeded"
