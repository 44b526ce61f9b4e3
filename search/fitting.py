"""How many replicas run at once on a machine that no node joins: none and too few are refused."""

from __future__ import annotations

from actors.types import RankfrontError
from search.cluster import Machine
from search.gpus import gpus_each, places_by_gpu
from search.sections import ReplicaSection
from search.shares import in_words


def at_once(section: ReplicaSection, machine: Machine, threads: int) -> int:
    """How many replicas of so many threads have room at the same time, by cores and GPUs. Each reserves a
    core for each of its threads."""
    fit, gpus = machine.cores // threads, gpus_each(section, machine)
    return min(fit, places_by_gpu(machine, gpus)) if gpus else fit


def crowding(section: ReplicaSection, machine: Machine, threads: int | None = None) -> str | None:
    """That fewer replicas run at once than are named, while the others wait; None where all do.

    `threads` are those of each; where they are not known yet, the configured ones, and the fewest for
    `auto`: replicas are given no more threads than all of them have cores for.

    Raises:
        RankfrontError: none ever runs, or fewer than `replicas.min` do, on a machine that no node joins.
    """
    if machine.grows:
        return None
    if threads is None:
        threads = 1 if section.threads == "auto" else section.threads
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
    if threads > machine.cores:
        raise RankfrontError(
            f"replicas.threads: {threads}, this machine has {cores}, and no node joins it; "
            f"{machine.cores} at most, or auto"
        )
    fit, gpus = at_once(section, machine, threads), gpus_each(section, machine)
    each = f"{threads} of {cores}" + (f" and {in_words(gpus)}" if gpus else "")
    if section.min > fit:
        raise RankfrontError(
            f"replicas.min: {section.min} never run at once: each takes {each}, and no node joins this "
            f"machine; {fit} at most"
        )
    if section.count == "auto" or section.count <= fit:
        return None
    return (
        f"replicas.count: {section.count}, and {fit} run{'s' * (fit == 1)} at once on this machine: "
        f"each takes {each}; the others wait"
    )
