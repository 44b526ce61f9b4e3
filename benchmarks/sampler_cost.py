"""Milliseconds for one proposal of every sampler by name: 224 parameters, more and more finished trials.

    python benchmarks/sampler_cost.py [--trials 100 500 2000] [--rounds 9] [--segments 1 3 6]

Finished trials are random allocations with made-up losses (`_made_up.py`). `gp` is measured apart, at few
parameters: groups of a module type and a part of the depth.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import optuna
from _common import machine, table
from _made_up import MadeUp
from optuna.trial import TrialState, create_trial

from search.samplers import make_sampler, reseed
from search.sections import SamplerSection
from search.space import Space

NAMES = ("random", "nsga2", "nsga3", "tpe", "exchange")
GENERATION = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 500, 2000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 3, 6], help="of gp: 7 parameters each")
    parser.add_argument("--gp-trials", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--samplers", nargs="+", default=NAMES)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model = MadeUp(0)
    space = model.space()
    rows = []
    for name in arguments.samplers:
        times = [milliseconds(name, model, space, count, arguments.rounds) for count in arguments.trials]
        rows.append([name, *(f"{each:.1f}" for each in times)])
    print(table(["sampler", *(f"{count:,} trials" for count in arguments.trials)], rows))
    print(f"\nMedian of {arguments.rounds} proposals, {len(space.distributions)} parameters; {machine()}\n")
    spaces = [model.space("module", segments) for segments in arguments.segments]
    rows = [
        [count, *(f"{milliseconds('gp', model, each, count, 3):.0f}" for each in spaces)]
        for count in arguments.gp_trials
    ]
    print(table(["gp: trials", *(f"{len(each.distributions)} parameters" for each in spaces)], rows))
    print("\nMedian of 3 proposals.")


def milliseconds(name: str, model: MadeUp, space: Space, trials: int, rounds: int) -> float:
    """Median time of a proposal after `trials` finished ones; the first, which reads them all, apart."""
    sampler = make_sampler(SamplerSection(name=name), lambda: model.landscape(space))
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    rng = np.random.default_rng(0)
    for number in range(trials):
        params = {
            parameter: int(rng.integers(distribution.high + 1))
            for parameter, distribution in space.distributions.items()
        }
        allocation = space.allocation(params)
        study._storage.create_new_trial(
            study._study_id,
            create_trial(
                params=params,
                distributions=space.distributions,
                values=[model.cost.budgets(allocation)["budget.model"], model.nll(allocation)],
                system_attrs={
                    f"{owner}:generation": number // GENERATION
                    for owner in ("NSGAIISampler", "NSGAIIISampler")
                },
            ),
        )
    times = []
    for number in range(trials, trials + rounds + 1):
        reseed(sampler, 0, number)
        start = time.perf_counter()
        trial = study.ask(space.distributions)
        times.append(1000 * (time.perf_counter() - start))
        study.tell(trial, state=TrialState.FAIL)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
