"""The replicas of a study: how many, with how many threads, and from when to when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from actors.storage import ITEMSIZE
from actors.types import Prepared, ReplicaSpec
from search.config import Config
from search.events import Note, silent
from search.opening import Session
from search.pool import DEPTH, Machine, Pool

# Bytes of a replica beyond its weights: torch, a batch of logits, activations.
REPLICA_BYTES = 700 * 2**20
# Weights are there twice (dense and product) and the node's factors are shared: see actors.low_rank.
WEIGHT_COPIES = 2.5


@contextlib.contextmanager
def replicas(session: Session, note: Note = silent) -> Iterator[Pool]:
    """The replicas of a study, gone at the end."""
    pool = _start_pool(session.folder.config, session.folder.prepared, session.machine, session.say, note)
    try:
        yield pool
    finally:
        pool.close()


def _start_pool(
    config: Config, prepared: Prepared, machine: Machine, say: Callable[[str], None], note: Note
) -> Pool:
    count, threads = replica_plan(config, prepared, machine)
    say(f"replicas: {count}, {threads} threads each" + (", one GPU each" if machine.gpus else ""))
    section, run = config.replicas, config.run
    if run.deterministic and run.lag + 1 < DEPTH * count:
        taken = DEPTH * count
        say(f"run.lag: {run.lag} lets {run.lag + 1} trials be under way, the replicas could take {taken}")
    specs = [
        ReplicaSpec(f"replica-{index}", config.preparation(), prepared, threads) for index in range(count)
    ]
    return Pool(specs, 1 if machine.gpus else 0, section.attempts, section.trial_seconds, note)


def replica_plan(config: Config, prepared: Prepared, machine: Machine) -> tuple[int, int]:
    """How many replicas, with how many threads each: a GPU each, or what cores and memory allow.

    Sums over other numbers of threads differ: in a deterministic search `auto` is one thread, however many
    replicas there are.
    """
    section = config.replicas
    wanted_threads = 1 if section.threads == "auto" else section.threads
    if section.count != "auto":
        count = section.count
    elif machine.gpus:
        count = machine.gpus
    else:
        weights = prepared.model_parameters * ITEMSIZE[config.model.dtype]
        each = REPLICA_BYTES + WEIGHT_COPIES * weights + config.scoring.prefix_memory_mb * 1e6
        count = max(1, min(machine.cores // wanted_threads, int(0.8 * machine.memory / each)))
    if section.threads == "auto" and not config.run.deterministic:
        return count, max(1, machine.cores // count)
    return count, wanted_threads
