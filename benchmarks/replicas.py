"""Trials per minute of two one-thread replicas under the driver, next to two bare processes.

    python benchmarks/replicas.py [--trials 8] [--rounds 3]

The left side is everything rankfront does: sampler, journal, Ray, replicas. The right side is two
independent Python processes that score the same allocations in a loop and do nothing else. Both
sides are warm and take turns in one run; each score is compared across the sides.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import statistics
import time
from multiprocessing.connection import Connection

import ray
import torch
from _common import CACHE, machine, prepared, quick_start, table

from actors.types import Allocation, Prepared, ReplicaSpec
from search.config import Config
from search.folder import StudyFolder
from search.pool import Pool, connect
from search.runner import Runner, Stop
from search.sections import StopSection
from search.study import SearchStudy

SIDES = 2


def bare(pipe: Connection, spec: ReplicaSpec) -> None:
    """One independent process: score whatever list of allocations arrives, answer with the losses."""
    torch.set_num_threads(1)
    from actors.scoring import Scorer

    scorer = Scorer(spec)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            allocations: list[Allocation] = pipe.recv()
            pipe.send([scorer.score(allocation).text.nll for allocation in allocations])


def driver_round(study: SearchStudy, pool: Pool, trials: int) -> tuple[float, list[Allocation], list[float]]:
    """Seconds for `trials` new trials, their allocations and losses."""
    before = len(study.rows())
    start = time.perf_counter()
    Runner(study, pool, StopSection(trials=before + trials), "random", Stop()).run()
    seconds = time.perf_counter() - start
    rows = study.rows()[before:]
    assert all(row.score is not None and row.copied_from is None for row in rows)
    return seconds, [row.allocation for row in rows], [row.score.text.nll for row in rows if row.score]


def bare_round(pipes: list[Connection], allocations: list[Allocation]) -> tuple[float, list[float]]:
    """Seconds for the same allocations, every second one to either process."""
    start = time.perf_counter()
    for index, pipe in enumerate(pipes):
        pipe.send(allocations[index::SIDES])
    answers = [pipe.recv() for pipe in pipes]
    seconds = time.perf_counter() - start
    losses = [0.0] * len(allocations)
    for index, answer in enumerate(answers):
        losses[index::SIDES] = answer
    return seconds, losses


def measure(config: Config, ready: Prepared, trials: int, rounds: int) -> list[tuple[float, float]]:
    """(driver, bare) seconds of each round."""
    spec = config.preparation()
    connect()
    path = CACHE / config.study
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    study = StudyFolder(path, config, ready).open_study()
    pool = Pool([ReplicaSpec(f"replica-{i}", spec, ready, 1) for i in range(SIDES)], 0, 1)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(SIDES)]
    processes = [
        context.Process(target=bare, args=(theirs, ReplicaSpec(f"bare-{i}", spec, ready, 1)), daemon=True)
        for i, (_, theirs) in enumerate(ends)
    ]
    pipes = [ours for ours, _ in ends]
    for process, pipe in zip(processes, pipes, strict=True):
        process.start()
        assert pipe.recv() == "ready"
    _, warm, _ = driver_round(study, pool, SIDES)
    bare_round(pipes, warm)
    found = []
    for _ in range(rounds):
        ours, allocations, losses = driver_round(study, pool, trials)
        theirs, again = bare_round(pipes, allocations)
        assert losses == again, "the same allocation scored differently"
        found.append((ours, theirs))
        print(f"driver {ours:.1f} s, bare {theirs:.1f} s", flush=True)
    pool.close()
    ray.shutdown()
    for process in processes:
        process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8, help="trials of each side in a round, even")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = quick_start(study="replicas", sampler={"name": "random"}, space={"floor": 0.7})
    ready = prepared(config.preparation())
    found = measure(config, ready, arguments.trials, arguments.rounds)
    rates = [[60 * arguments.trials / seconds for seconds in pair] for pair in found]
    ours, theirs = ([pair[side] for pair in rates] for side in (0, 1))
    ratio = statistics.median(o / t for o, t in rates)
    columns = ["side", "trials/min (median)", "min..max"]
    rows = [
        ["rankfront: driver, journal, two one-thread replicas", *_spread(ours)],
        ["two independent one-thread processes", *_spread(theirs)],
        ["ratio, round by round", f"{ratio:.3f}", ""],
    ]
    print(table(columns, rows))
    print(
        f"\n{arguments.rounds} rounds of {arguments.trials} trials, "
        f"{ready.tokens['search.forward']} tokens each, all scores equal; {machine()}"
    )


def _spread(values: list[float]) -> list[str]:
    return [f"{statistics.median(values):.2f}", f"{min(values):.2f}..{max(values):.2f}"]


if __name__ == "__main__":
    main()
