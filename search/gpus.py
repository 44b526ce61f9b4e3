"""The GPUs of a cluster, as replicas share them out."""

from __future__ import annotations

from actors.types import RankfrontError
from search.cluster import Machine
from search.sections import ReplicaSection
from search.shares import gpu_places, in_words


def gpus_each(section: ReplicaSection, machine: Machine) -> float:
    """GPUs of a replica: as configured; where `auto` finds any, one."""
    return min(1.0, machine.gpus) if section.gpus == "auto" else float(section.gpus)


def worker_gpus(section: ReplicaSection, machine: Machine) -> int:
    """GPUs of a worker, which holds the model on one GPU, whatever a replica takes: one where replicas take
    any, none on a machine that has none and that no node joins."""
    return 1 if gpus_each(section, machine) and (machine.gpus or machine.grows) else 0


def gpus_awaited(section: ReplicaSection, machine: Machine) -> int:
    """GPUs of as many replicas as are named, where nodes that have them may join."""
    named = section.max if section.count == "auto" else section.count
    return int((named or 0) * gpus_each(section, machine)) if machine.grows else 0


def places_by_gpu(machine: Machine, gpus: float) -> int:
    """How many replicas of `gpus` each the GPUs of all nodes are enough for."""
    return sum(gpu_places(room.gpus, gpus) for room in machine.nodes)


def gpu_shortage(section: ReplicaSection, machine: Machine) -> str | None:
    """That no node has the GPUs of one replica, so that replicas wait for such a node; None where one has.

    They wait where their number is named: that is what an autoscaler goes by, or a person.

    Raises:
        RankfrontError: nobody would bring such a node; names what there is.
    """
    if section.gpus == "auto" or places_by_gpu(machine, section.gpus):
        return None
    there = sorted((int(room.gpus) for room in machine.nodes), reverse=True)
    has = "nodes have " + ", ".join(map(str, there))
    if len(there) == 1 or not there[0]:
        has = f"there {'are' if there[0] > 1 else 'is'} {there[0] or 'none'}"
    what = f"replicas.gpus: each takes {in_words(section.gpus)} of one node, and {has}"
    if machine.grows and (section.max is not None or section.count != "auto"):
        return f"{what}: waiting for a node that has"
    right = f"{there[0]} at most, a share of one, or auto" if there[0] else "auto"
    if machine.grows:
        right += "; or name replicas.max, to wait for a node that has"
    raise RankfrontError(f"{what}; {right}")
