"""What prefix reuse and stages save, each off against on over the same trials.

    python benchmarks/scoring.py [--tokens 2048] [--rounds 1] [--threads 1] > benchmarks/results/scoring.md

Seconds are of the processor, which other work on the machine disturbs less than those of the clock.

Prefix: a walk from the last block to the first, the attention or the MLP of a block compressed at a time, all
else dense. Both sides in one process, trial by trial, with the dense model scored first as in every study.
Stages: one list of allocations through the search's own loop, study and all: seeds first, as in every study,
then random ones around two budgets, which are mostly worse.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _common import machine, prepared, quick_start, table
from optuna.storages import InMemoryStorage

from actors.scoring import Scorer
from actors.storage import ITEMSIZE
from actors.types import Allocation, Prepared, ReplicaSpec, Score, TargetSpec
from search.config import Config
from search.cost import CostModel
from search.pareto import front
from search.pool import DEPTH, Job, Outcome
from search.records import Objective
from search.runner import Runner, Stop, minimised
from search.samplers import make_sampler
from search.sections import SamplerSection, StopSection
from search.seeds import ladder, predicted
from search.space import Space
from search.study import SearchStudy, open_storage_study

WINDOW, BATCH = 128, 512
EVERY = 5  # of the blocks, in the walk
WALK_SHARE = 0.7
# Budgets of the targets for which seeds are worked out, and the smallest share a target may keep in one.
SEEDS, FLOOR = (0.95, 0.9, 0.8, 0.7, 0.6), 0.3
# Random allocations: one share for each module type and third of the depth, this far around a budget.
BUDGETS, EACH, SPREAD, THIRDS = (0.9, 0.7), 8, 0.2, 3
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
PREFIX_MB = 1000.0


def walk(targets: tuple[TargetSpec, ...], cost: CostModel) -> Iterator[tuple[int, str, Allocation]]:
    """(block, group, allocation): attention and MLP in turn, from the last block to the first."""
    last = max(target.block for target in targets)
    for block, group in zip(range(last, -1, -EVERY), itertools.cycle(("mlp", "self_attn")), strict=False):
        chosen = [t for t in targets if t.block == block and t.module.startswith(group)]
        ranks = {target.name: cost.largest_rank(target, WALK_SHARE) for target in chosen}
        yield block, group, Allocation.of(ranks, targets)


@dataclass(frozen=True)
class Work:
    """Multiplications of one token: of a block (its products and its attention) and of the head."""

    block: int
    head: int
    blocks: int

    def saving(self, first_changed: int) -> float:
        """The largest share of a pass that a trial can save by skipping the blocks before its change."""
        return self.block * first_changed / (self.block * self.blocks + self.head)


def work_of(scorer: Scorer, targets: tuple[TargetSpec, ...]) -> Work:
    """By the shapes alone; a token attends to (window + 1) / 2 tokens on average, in two products."""
    blocks = 1 + max(target.block for target in targets)
    first = [target for target in targets if target.block == 0]
    [queries] = [target.rows for target in first if target.module.endswith("q_proj")]
    products = sum(target.rows * target.cols for target in first)
    head = scorer.model.get_output_embeddings().weight.numel()
    return Work(products + queries * (WINDOW + 1), head, blocks)


def values(score: Score) -> Score:
    """All of a score but who took how long."""
    return replace(score, seconds=0.0, replica="")


def prefix_rows(scorers: dict[str, Scorer], ready: Prepared, cost: CostModel, rounds: int) -> list[list[str]]:
    """A line for each trial of the walk, and one for all of it: medians over rounds."""
    work = work_of(scorers["off"], ready.targets)
    steps = list(walk(ready.targets, cost))
    seconds = {side: [[0.0] * rounds for _ in steps] for side in scorers}
    for scorer in scorers.values():
        scorer.score(Allocation.dense(ready.targets))
    for turn in range(rounds):
        for index, (block, group, allocation) in enumerate(steps):
            order = sorted(scorers, reverse=(index + turn) % 2 == 1)
            found = {}
            for side in order:
                start = time.process_time()
                found[side] = values(scorers[side].score(allocation))
                seconds[side][index][turn] = time.process_time() - start
            assert found["on"] == found["off"], f"block {block}, {group}: other bits"
            print(f"prefix, round {turn}: block {block}", file=sys.stderr, flush=True)
    rows, totals = [], [0.0, 0.0]
    for index, (block, group, _) in enumerate(steps):
        off, on = (statistics.median(seconds[side][index]) for side in ("off", "on"))
        totals = [totals[0] + off, totals[1] + on]
        rows.append(_prefix_row(f"{block}, {group}", off, on, work.saving(block)))
    bound = sum(work.saving(block) for block, _, _ in steps) / len(steps)
    return [*rows, _prefix_row("the whole walk", *totals, bound)]


def _prefix_row(name: str, off: float, on: float, bound: float) -> list[str]:
    saved = 1 - on / off
    reached = f"{saved / bound:.0%}" if bound else ""
    return [name, f"{off:.2f}", f"{on:.2f}", f"{saved:.1%}", f"{bound:.1%}", reached]


class Inline:
    """The pool's interface over one scorer in this process: one job runs, one waits, as on a replica."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self._queue = scorer, list[Job]()
        self.seconds = 0.0

    @property
    def free(self) -> int:
        return DEPTH - len(self._queue)

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def wait(self, seconds: float) -> Iterator[Outcome]:
        job = self._queue.pop(0)
        start = time.process_time()
        score = self._scorer.score(job.allocation, job.split, job.rivals)
        self.seconds += time.process_time() - start
        print(f"stages: trial {job.key}, {score.forward_tokens} tokens", file=sys.stderr, flush=True)
        yield Outcome(job, score)


def random_allocations(targets: tuple[TargetSpec, ...], cost: CostModel) -> list[Allocation]:
    chance = random.Random("scoring")
    blocks = 1 + max(target.block for target in targets)
    found = []
    for budget in BUDGETS:
        for _ in range(EACH):
            shares: dict[tuple[str, int], float] = {}
            ranks = {}
            for target in targets:
                group = (target.module, target.block * THIRDS // blocks)
                shares.setdefault(group, chance.uniform(budget - SPREAD, min(1.0, budget + SPREAD)))
                ranks[target.name] = cost.largest_rank(target, shares[group])
            found.append(Allocation.of(ranks, targets))
    chance.shuffle(found)
    return found


def seeds(config: Config, ready: Prepared, cost: CostModel) -> list[Allocation]:
    """Equal marginal loss per parameter, by the spectra."""
    curves = predicted(cost, FLOOR, config.factor_spec, Path(ready.factor_store))
    return [allocation for allocation in ladder(cost, curves, SEEDS) if allocation is not None]


def stage_row(
    name: str, scorer: Scorer, config: Config, allocations: list[Allocation], cost: CostModel, staged: bool
) -> tuple[list[str], list[int]]:
    """One search of the list: tokens, seconds, trials stopped; and the numbers on its front."""
    storage = open_storage_study(InMemoryStorage(), name, OBJECTIVES)
    space = Space(cost, config.factor_spec, "module", THIRDS, levels=20, floor=FLOOR)
    sampler = make_sampler(SamplerSection(name="random"))
    study = SearchStudy(storage, sampler, 0, space, cost, OBJECTIVES)
    study.enqueue((allocation, "random") for allocation in allocations)
    rules = StopSection(trials=len(allocations))
    pool = Inline(scorer)
    Runner(study, pool, rules, "random", Stop(), staged=staged).run()  # type: ignore[arg-type]
    scores = [row.score for row in study.rows() if row.score]
    assert len(scores) == len(allocations)
    points, numbers = minimised(study)
    stopped = sum(score.stopped_by is not None for score in scores)
    tokens = sum(score.forward_tokens for score in scores)
    members = sorted(numbers[front(points)].tolist())
    line = [
        name,
        f"{stopped} of {len(scores)}",
        f"{tokens:,}",
        f"{pool.seconds:.1f}",
        ", ".join(map(str, members)),
    ]
    return line, members


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of a trial; its one stage is half of them")
    parser.add_argument("--rounds", type=int, default=1, help="of the walk")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens, stage = arguments.tokens, arguments.tokens // 2
    scoring = {"window": WINDOW, "tokens": {"search": tokens, "test": 512}, "batch_tokens": BATCH}
    config = quick_start(scoring={**scoring, "stages": [stage]})
    spec = config.preparation()
    ready = prepared(spec)
    itemsize = ITEMSIZE[config.model.dtype]
    cost = CostModel(ready.targets, ready.model_parameters, config.storage, config.factors.bias, itemsize)
    with_prefix = replace(spec, scoring=replace(spec.scoring, prefix_memory_mb=PREFIX_MB))
    scorers = {
        side: Scorer(ReplicaSpec(side, preparation, ready, arguments.threads))
        for side, preparation in (("off", spec), ("on", with_prefix))
    }
    walked = prefix_rows(scorers, ready, cost, arguments.rounds)
    kept = scorers.pop("on").prefix.bytes / 1e6
    allocations = [*seeds(config, ready, cost), *random_allocations(cost.targets, cost)]
    (off, before), (on, after) = (
        stage_row(name, scorers["off"], config, allocations, cost, staged=name != "off")
        for name in ("off", f"after {stage:,} tokens")
    )
    print("# What prefix reuse and stages save\n")
    command = f"python benchmarks/scoring.py --tokens {tokens} --rounds {arguments.rounds}"
    print(f"`{command}` (both sides in one run)\n")
    print("Prefix reuse, from the last block to the first; scores equal to the bit:\n")
    columns = ["first changed block", "off, s", "on, s", "saved", "bound by multiplications", "share reached"]
    print(table(columns, walked))
    print(f"\nHidden states of every block boundary: {kept:.0f} MB.\n")
    print(
        f"Stages, {len(SEEDS)} seeds, then {EACH} random allocations around each of {BUDGETS[0]:.0%} and "
        f"{BUDGETS[1]:.0%}:\n"
    )
    print(table(["stages", "stopped early", "tokens", "s", "front (trials)"], [off, on]))
    print(f"\nThe fronts are {'the same' if before == after else 'NOT the same'}.\n")
    print(
        f"SmolLM2-135M-Instruct, {tokens} tokens in windows of {WINDOW}, {arguments.threads} thread(s), "
        f"{arguments.rounds} round(s); {machine()}"
    )


if __name__ == "__main__":
    main()
