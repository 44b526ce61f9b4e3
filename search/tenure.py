"""Replicas that outlive their driver: what they are called, and how the next driver takes them over.

A name says whose they are (the study), what they have loaded (the key) and who started them; whom they serve
is theirs to say (`actors.lease`).
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util import list_named_actors

from actors.held import PROMPT
from actors.lease import SILENT_SECONDS
from actors.types import ReplicaSpec, digest
from search.failures import GONE

# Of a digest and of a token: enough that no two of a cluster are alike.
LETTERS = 16
# A replica that does not say in this time whom it serves has no node yet, or is stopped: it is let go.
ANSWER_SECONDS = 10.0
# Between two questions to replicas whose last driver may not be dead.
ASK_AGAIN_SECONDS = 0.5
# How long replicas that are told to end may take before they are killed.
END_SECONDS = 5.0


@dataclass(frozen=True)
class Tenure:
    """One driver's hold on the replicas of a study, which wait for the next driver `alone_seconds`.

    They follow another while this one has been silent for `silent_seconds`.
    """

    study: str
    alone_seconds: float
    silent_seconds: float = SILENT_SECONDS
    token: str = field(default_factory=lambda: secrets.token_hex(LETTERS))

    def name(self, spec: ReplicaSpec, gpus: float) -> str:
        """A name for a new replica; no two are equal, though a replica of the same spec died."""
        serial = secrets.token_hex(4)
        return ":".join((self.study, spec_key(spec, gpus), self.token[:LETTERS], serial, spec.name))


@dataclass(frozen=True)
class Taken:
    """A replica of an earlier driver that serves this one now: its name in the pool, and its node."""

    name: str
    actor: Any
    node: str


def study_key(place: str, study: str) -> str:
    """Of a study and the place it is kept in: a folder, or a database's URL without its secrets."""
    return digest([place, study])[:LETTERS]


def spec_key(spec: ReplicaSpec, gpus: float) -> str:
    """Of all that decides what a replica has loaded and what it takes of a node."""
    return digest([dataclasses.asdict(dataclasses.replace(spec, name="")), gpus])[:LETTERS]


def take_over(
    tenure: Tenure,
    specs: list[ReplicaSpec],
    gpus: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[Taken]:
    """Replicas that wait for the study's next driver and have loaded what `specs` ask for, at most as many.

    All others of the study are ended: they hold GPUs for what nobody asks for. The caller drives the study,
    so an earlier driver is dead, though some replicas may have heard of it a moment ago.
    """
    names = [name for name in list_named_actors() if name.startswith(f"{tenure.study}:")]
    taken = _taken(tenure, names, clock, pause)
    found: dict[str, Taken] = {}
    rest = []
    for name, (actor, node) in taken.items():
        _, key, _, _, replica = name.split(":", 4)
        if key == spec_key(specs[0], gpus) and replica not in found and len(found) < len(specs):
            found[replica] = Taken(replica, actor, node)
        else:
            rest.append(actor)
    end_all(rest, tenure.token)
    if taken:
        say(
            f"replicas: {len(found)} of an earlier driver go on, {len(rest)} end: nobody needs what they hold"
        )
    return list(found.values())


def _taken(
    tenure: Tenure, names: list[str], clock: Callable[[], float], pause: Callable[[float], None]
) -> dict[str, tuple[Any, str]]:
    """Every named replica that serves this driver from now on, with its node."""
    since, taken = clock(), {}
    actors = {name: actor for name in names if (actor := _actor(name)) is not None}
    while actors:
        asked = {prompt(actor.take).remote(tenure.token): name for name, actor in actors.items()}
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for reference in silent:
            ray.kill(actors.pop(asked[reference]))
        for reference in answered:
            name = asked[reference]
            try:
                node = ray.get(reference)
            except GONE:
                del actors[name]
                continue
            if node is not None:
                taken[name] = (actors.pop(name), node)
        if clock() - since > tenure.silent_seconds + ANSWER_SECONDS:
            break  # they serve a driver that is alive: of a copy of the study
        if actors:
            pause(ASK_AGAIN_SECONDS)
    return taken


def _actor(name: str) -> Any:
    try:
        return ray.get_actor(name)
    except ValueError:  # it ended in between
        return None


def prompt(method: Any) -> Any:
    """A method of a replica, answered while it scores."""
    return method.options(concurrency_group=PROMPT)


def end_all(actors: list[Any], token: str) -> None:
    """End replicas that serve `token`; those that do not answer are killed."""
    ends = {prompt(actor.end).remote(token): actor for actor in actors}
    if not ends:
        return
    _, silent = ray.wait(list(ends), num_returns=len(ends), timeout=END_SECONDS)
    for reference in silent:
        ray.kill(ends[reference])
