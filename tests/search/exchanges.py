"""Studies that our sampler proposes in, of losses that are known."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from fakes import cost_model, landscape, space_of
from optuna.trial import FrozenTrial, create_trial

from search import exchange
from search.exchange import MOVES, ExchangeSampler
from search.landscape import Landscape
from search.samplers import reseed

COST = cost_model()
DENSE = COST.linear_parameters
LAND = landscape(space_of(COST, group="target", levels=20), COST)
# What a parameter truly loses over what is predicted for it.
TRUE = np.exp(np.random.default_rng(5).normal(0, 0.6, len(LAND.names)))


def study_of(sampler: ExchangeSampler, land: Landscape = LAND, directions: int = 2) -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * directions, sampler=sampler)


def sampler_of(land: Landscape = LAND) -> ExchangeSampler:
    return ExchangeSampler(lambda: land, seed=0)


def levels_of(params: dict[str, int], land: Landscape = LAND) -> np.ndarray:
    return np.array([params[name] for name in land.names])


def values_of(levels: np.ndarray, multipliers: np.ndarray = TRUE, land: Landscape = LAND) -> list[float]:
    losses, size = land.of_levels(levels)
    return [size / DENSE, 2.0 + float(multipliers @ losses)]


def add(study: optuna.Study, levels: np.ndarray, land: Landscape = LAND, **changes: object) -> None:
    usual = {
        "params": dict(zip(land.names, levels.tolist(), strict=True)),
        "distributions": dict(list(study.sampler.infer_relative_search_space(study, None).items())),  # type: ignore[arg-type]
        "values": values_of(levels, land=land),
    }
    study.add_trial(create_trial(**{**usual, **changes}))  # type: ignore[arg-type]


def warm(sampler: ExchangeSampler, budgets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)) -> optuna.Study:
    """Dense, and what the predictions alone make of some budgets."""
    study = study_of(sampler)
    add(study, np.full(len(LAND.names), 20))
    for budget in budgets:
        add(study, sampler._steps.fill(np.ones(len(LAND.names)), budget * DENSE))
    return study


def ask(study: optuna.Study, sampler: ExchangeSampler, tell: bool = True) -> FrozenTrial:
    reseed(sampler, 0, len(study.get_trials(deepcopy=False)))
    trial = study.ask(sampler.infer_relative_search_space(study, None))  # type: ignore[arg-type]
    if tell:
        study.tell(trial, values_of(levels_of(trial.params)))
    return study.get_trials(deepcopy=False)[trial.number]


def only(monkeypatch: pytest.MonkeyPatch, move: str) -> None:
    monkeypatch.setattr(exchange, "FIRST", {each: float(each == move) for each in MOVES})
