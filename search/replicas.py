"""The replicas of a study: how many, with how many threads, and from when to when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from actors.storage import ITEMSIZE
from actors.types import Prepared, ReplicaSpec
from search.cluster import Need, cluster_nodes
from search.config import Config
from search.database import resolve, shown
from search.elastic import Elastic
from search.events import Note, silent
from search.fitting import at_once, crowding
from search.folder import StudyFolder
from search.gpus import gpu_shortage, gpus_each, places_by_gpu
from search.hangs import Bounds
from search.opening import Session
from search.pool import DEPTH, Machine, Pool
from search.shares import gpu_places, in_words
from search.tenure import Tenure, study_key

# Bytes of a replica beyond its weights: torch, a batch of logits, activations.
REPLICA_BYTES = 700 * 2**20
# Weights are there twice (dense and product) and the node's factors are shared: see actors.low_rank.
WEIGHT_COPIES = 2.5


@contextlib.contextmanager
def replicas(session: Session, note: Note = silent) -> Iterator[Pool]:
    """The replicas of a study, gone at the end."""
    pool = _start_pool(session.folder, session.machine, session.say, note)
    try:
        yield pool
    finally:
        pool.close()


def _start_pool(folder: StudyFolder, machine: Machine, say: Callable[[str], None], note: Note) -> Pool:
    config, prepared = folder.config, folder.prepared
    waits = gpu_shortage(config.replicas, machine)
    count, threads = replica_plan(config, prepared, machine)
    elastic = elastic_of(config, prepared, machine, threads)
    gpus = elastic.need.gpus
    line = f"replicas: {count}, {threads} threads" + (f" and {in_words(gpus)}" if gpus else "") + " each"
    room = count if machine.grows else at_once(config.replicas, machine, threads)
    say(line + (f", {room} at once" if room < count else ""))
    if waits is not None:
        say(waits)
    elif machine.grows and not gpus:  # `auto`, which took the cluster for one of CPUs
        say(
            "replicas: no node has a GPU now, and replicas.gpus is auto: they take none; "
            "replicas: {gpus: 1, max: N} waits for nodes that have one, and an autoscaler brings them"
        )
    section, run = config.replicas, config.run
    if run.deterministic and run.lag + 1 < DEPTH * count:
        taken = DEPTH * count
        say(f"run.lag: {run.lag} lets {run.lag + 1} trials be under way, the replicas could take {taken}")
    asked = None if section.gpus == "auto" else gpus
    specs = [
        ReplicaSpec(f"replica-{index}", config.preparation(), prepared, threads, gpus=asked)
        for index in range(count)
    ]
    tenure = tenure_of(folder, machine)
    bounds = Bounds.asked(section.trial_seconds, section.load_seconds)
    lengths = lengths_of(prepared.tokens)
    return Pool(specs, gpus, section.attempts, bounds, note, elastic, tenure, say, lengths)


def lengths_of(tokens: Mapping[str, int]) -> dict[str, float]:
    """How many times a search score's time a score of each other split may take: its tokens twice, as the
    first one on a replica may run the dense model over them too, and once more to read them."""
    searched = tokens["search.forward"]
    splits = [name.removesuffix(".forward") for name in tokens if name.endswith(".forward")]
    return {split: 1 + 2 * tokens[f"{split}.forward"] / searched for split in splits if split != "search"}


def tenure_of(folder: StudyFolder, machine: Machine) -> Tenure | None:
    """How replicas outlive this driver; None where the cluster ends with it, or nothing is to wait."""
    config = folder.config
    alone = config.replicas.alone_seconds
    if not machine.grows or not alone:
        return None
    place = str(folder.path.resolve()) if config.database is None else shown(resolve(config.database))
    return Tenure(study_key(place, config.study), alone)


def elastic_of(config: Config, prepared: Prepared, machine: Machine, threads: int) -> Elastic:
    """How the number of replicas follows the nodes. What this process started stays as it is.

    Raises:
        RankfrontError: none, or fewer replicas than `replicas.min`, fit a machine that no node joins.
    """
    section, gpus = config.replicas, gpus_each(config.replicas, machine)
    need = Need(threads, gpus, 0.0 if gpus else replica_bytes(config, prepared))
    if machine.grows:
        return Elastic(section.min, section.max, section.count == "auto", need, cluster_nodes)
    crowding(section, machine, threads)
    return Elastic(section.min, need=need)


def replica_bytes(config: Config, prepared: Prepared) -> float:
    """Memory that a replica without a GPU takes."""
    weights = prepared.model_parameters * ITEMSIZE[config.model.dtype]
    return REPLICA_BYTES + WEIGHT_COPIES * weights + config.scoring.prefix_memory_mb * 1e6


def replica_plan(config: Config, prepared: Prepared, machine: Machine) -> tuple[int, int]:
    """How many replicas to begin with, and their threads: as GPUs allow, or cores and memory without any.

    At least `replicas.min` and at most `replicas.max`, and where nodes may join as many as the most: those
    that wait for a node are what an autoscaler goes by. Threads are no more than any node with room has for
    each, and one where the nodes with GPUs are yet to come. Sums over other numbers of threads differ: in a
    deterministic search `auto` is one thread, however many replicas there are.
    """
    section, gpus = config.replicas, gpus_each(config.replicas, machine)
    wanted_threads = 1 if section.threads == "auto" else section.threads
    if section.count != "auto":
        count = section.count
    elif gpus:
        count = places_by_gpu(machine, gpus)
        if gpus < 1:  # more replicas than cores would wait for ever
            count = min(count, machine.cores // wanted_threads)
    else:
        fit = int(0.8 * machine.memory / replica_bytes(config, prepared))
        count = max(1, min(machine.cores // wanted_threads, fit))
    there = count
    if section.count == "auto":
        most = section.max or max(count, section.min)
        count = most if machine.grows and section.max else min(most, max(count, section.min))
    if section.threads == "auto" and not config.run.deterministic:
        share = machine.cores // max(1, min(count, there) if machine.grows else count)
        return count, max(1, min(share, *_cores(machine, gpus)))
    return count, wanted_threads


def _cores(machine: Machine, gpus: float) -> list[int]:
    """Cores that each node with room has for a replica; of a node with GPUs, where its GPUs are all used.

    Where none has room, a node is waited for. It is taken to be as the largest that has GPUs, if too few for
    a replica. Where none has any it is not known at all, and a replica asks for one core: for as many as a
    large head has, no smaller node with GPUs would ever be enough, nor would an autoscaler bring one.
    """
    if not gpus:
        return [int(room.cpus) for room in machine.rooms if room.cpus >= 1] or [machine.cores]
    used = [(room.cpus, gpu_places(room.gpus, gpus)) for room in machine.nodes]
    largest = max((int(room.cpus) for room in machine.nodes if room.gpus), default=1)
    return [int(cpus / places) for cpus, places in used if places] or [largest]
