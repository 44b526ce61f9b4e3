"""How far samplers get from the same seeds, on made-up losses. SYNTHETIC: no model is run.

    python benchmarks/sampler_quality.py [--trials 400] [--seeds 3] [--first 0] [--group target]

224 targets whose measured losses are the predicted ones times random multipliers, and more (`_made_up.py`).
Every sampler starts from the same trials, those of a search: dense, uniform allocations and seeds. `ladder`
learns nothing: it scores the predicted optimum at budgets spread evenly, so what `exchange` is above it is
what it learned. `seeds` are the common trials alone.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from _common import machine, table
from _made_up import DENSE_NLL, OBJECTIVES, ROOM, MadeUp
from optuna.storages import InMemoryStorage

from actors.types import Allocation
from search.aims import van_der_corput
from search.pareto import hypervolume_history
from search.samplers import make_sampler
from search.sections import ReferenceSection, SamplerSection, SeedSection
from search.seeds import ladder
from search.study import SearchStudy, open_storage_study

NAMES = ("exchange", "ladder", "tpe", "nsga2", "nsga3", "random")
CHECKPOINTS = (50, 100, 200, 400)
# The smallest linear budget of `ladder`: about where these losses leave the hypervolume's room.
LOWEST = 0.42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--group", choices=("target", "module", "block"), default="target")
    parser.add_argument("--segments", type=int, default=1)
    parser.add_argument("--samplers", nargs="+", default=NAMES)
    arguments = parser.parse_args()
    at = [count for count in CHECKPOINTS if count <= arguments.trials]
    rows = []
    for name in arguments.samplers:
        runs = [
            history(name, seed, arguments.trials, arguments.group, arguments.segments)
            for seed in range(arguments.first, arguments.first + arguments.seeds)
        ]
        if not rows:
            common = len(warm_start(MadeUp(0)))
            rows.append(["seeds", *[spread([run[common - 1] for run in runs])] * len(at)])
        rows.append([name, *(spread([run[count - 1] for run in runs]) for count in at)])
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(["sampler", *(f"{count} trials" for count in at)], rows))
    print(
        f"\nHypervolume from budget.model 1 and ten times the dense perplexity: mean over {arguments.seeds} "
        f"made-up models (least..most); {common} common trials first; space.group {arguments.group}, "
        f"segments {arguments.segments}, 20 levels, floor 0.2; {machine()}"
    )


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f}..{max(values):.4f})"


def warm_start(model: MadeUp) -> list[tuple[Allocation, str]]:
    """Dense, uniform and seed allocations, at the budgets a search has them by default."""
    uniform = [model.cost.uniform(share) for share in ReferenceSection().uniform]
    seeds = ladder(model.cost, model.curves, SeedSection().spectra)
    return [
        (Allocation.dense(model.cost.targets), "dense"),
        *((allocation, "uniform") for allocation in uniform),
        *((allocation, "seed") for allocation in seeds if allocation is not None),
    ]


def history(name: str, seed: int, trials: int, group: str, segments: int) -> np.ndarray:
    """Hypervolume after each trial (trials,)."""
    model = MadeUp(seed)
    space = model.space(group, segments)
    section = SamplerSection(name="random" if name == "ladder" else name, seed=seed)
    sampler = make_sampler(section, lambda: model.landscape(space))
    inner = open_storage_study(InMemoryStorage(), "made-up", OBJECTIVES)
    study = SearchStudy(inner, sampler, seed, space, model.cost, OBJECTIVES)
    study.enqueue(warm_start(model))
    if name == "ladder":
        budgets = (LOWEST + (1 - LOWEST) * van_der_corput(number) for number in range(1, trials + 1))
        found = ladder(model.cost, model.curves, budgets)
        study.enqueue((allocation, "ladder") for allocation in found if allocation is not None)
    points = []
    for _ in range(trials):
        planned = study.propose(name)
        points.append(study.complete(planned, model.score(planned.allocation)))
    return hypervolume_history(points, (1.0, DENSE_NLL + ROOM))


if __name__ == "__main__":
    main()
