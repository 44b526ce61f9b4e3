"""What a steady-state trial costs next to a dense pass over the same tokens, loss included on both sides.

    python benchmarks/trial_cost.py [--tokens 8192] [--rounds 5] [--threads 1]

Both sides in one process, in turn: a plain transformers model (never touched by rankfront), and a
replica's scorer that installs an allocation with every target changed and scores it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from _common import machine, prepared, quick_start, table

from actors.models import load_model
from actors.perplexity import score_text
from actors.scoring import Scorer
from actors.storage import ITEMSIZE
from actors.types import ReplicaSpec
from search.cost import CostModel

# Two allocations a step apart at each share, scored in turn, so that every target changes every time.
STEP = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.7])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = quick_start(
        scoring={"window": 512, "tokens": {"search": arguments.tokens, "test": 512}, "batch_tokens": 1024}
    )
    spec = config.preparation()
    ready = prepared(spec)
    itemsize = ITEMSIZE[config.model.dtype]
    cost = CostModel(ready.targets, ready.model_parameters, config.storage, config.factors.bias, itemsize)
    scorer = Scorer(ReplicaSpec("benchmark", spec, ready, arguments.threads))
    dense = load_model(ready.model_folder, spec.model)
    data = scorer.split("search")
    assert data.tokens == arguments.tokens, (data.tokens, arguments.tokens)

    rows = []
    for share in arguments.shares:
        pair = [cost.uniform(share), cost.uniform(share - STEP)]
        changed = sum(a != b for a, b in zip(*pair, strict=True))
        scorer.score(pair[1])
        score_text(dense, data.windows, spec.scoring.batch_tokens, "warm-up")
        sides: dict[str, list[float]] = {"dense": [], "trial": []}
        for turn in range(arguments.rounds):
            start = time.perf_counter()
            score_text(dense, data.windows, spec.scoring.batch_tokens, "dense")
            sides["dense"].append(time.perf_counter() - start)
            start = time.perf_counter()
            scorer.score(pair[turn % 2])
            sides["trial"].append(time.perf_counter() - start)
        ratios = [t / d for t, d in zip(sides["trial"], sides["dense"], strict=True)]
        rows.append(
            [
                f"{share:.0%}",
                f"{changed} of {len(ready.targets)}",
                f"{statistics.median(sides['dense']):.2f}",
                f"{statistics.median(sides['trial']):.2f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f}..{max(ratios):.3f}",
            ]
        )
    columns = ["linear budget", "targets changed", "dense pass, s", "trial, s", "ratio (median)", "min..max"]
    print(table(columns, rows))
    print(
        f"\n{arguments.tokens} tokens in windows of 512, {arguments.threads} thread(s), "
        f"{arguments.rounds} rounds; {machine()}"
    )


if __name__ == "__main__":
    main()
