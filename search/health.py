"""How a driver and its replicas are: a small file in the study's folder, written every few seconds.

The storage tells of trials; what only the driver knows, where a replica runs and how often it died, is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.types import RankfrontError
from search.files import write_atomic

STATUS = "status.json"
# Often enough for who looks, seldom enough to cost nothing.
WRITE_SECONDS = 5.0


@dataclass(frozen=True)
class ReplicaHealth:
    """One replica. `trials` are the one it scores and those behind it.

    `state` is `waiting` (for a node), `loading`, `idle`, `busy` or `failed` (it could not start, and will be
    tried again).

    `starts` counts it and those before it in its place; `failure` is why the last of them ended. `since` is
    when it began the trial it scores (Unix time, seconds). `gpus` are the shares of the time since it was
    loaded that each of its GPUs worked at trials which have ended.
    """

    name: str
    state: str
    starts: int
    trials: tuple[int, ...]
    since: float | None
    node: str | None
    pid: int | None
    failure: str | None
    gpus: tuple[float, ...] = ()


@dataclass(frozen=True)
class Health:
    """A driver at the time `written` (Unix time, seconds, as `started`).

    `queue` are jobs without a replica; `stopped` is why it ended, None while it runs and where it was killed.
    Killed, it leaves replicas that wait `alone_seconds` for the next driver.
    """

    written: float
    started: float
    host: str
    pid: int
    queue: int
    replicas: tuple[ReplicaHealth, ...]
    stopped: str | None
    alone_seconds: float = 0.0

    def waits(self, now: float) -> float:
        """How many seconds longer its replicas wait, at a time (Unix time), if it is gone; 0: none do."""
        return 0.0 if self.stopped else max(0.0, self.written + self.alone_seconds - now)

    @property
    def busy(self) -> float:
        """The share of replicas that score a trial; those without a node are none yet."""
        there = [each for each in self.replicas if each.state != "waiting"]
        return sum(each.state == "busy" for each in there) / max(1, len(there))

    @property
    def busy_gpus(self) -> dict[tuple[str, int], float]:
        """The share of its time that each GPU works, by replica and its number there."""
        return {(each.name, gpu): share for each in self.replicas for gpu, share in enumerate(each.gpus)}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Health:
        replicas = [
            ReplicaHealth(**{**each, "trials": tuple(each["trials"]), "gpus": tuple(each.get("gpus", ()))})
            for each in data["replicas"]
        ]
        return cls(**{**data, "replicas": tuple(replicas)})


def here(
    started: float,
    queue: int,
    replicas: tuple[ReplicaHealth, ...],
    stopped: str | None = None,
    alone_seconds: float = 0.0,
) -> Health:
    """Of this process as the driver, now."""
    return Health(
        time.time(), started, socket.gethostname(), os.getpid(), queue, replicas, stopped, alone_seconds
    )


def write_health(folder: Path, health: Health) -> None:
    """Replace the file; a disk that is full leaves the old one, and the search goes on."""
    with contextlib.suppress(OSError):
        write_atomic(folder / STATUS, json.dumps(health.to_dict()))


def read_health(folder: Path) -> Health | None:
    """What the last driver wrote last; None where none did.

    Raises:
        RankfrontError: the file is no such record.
    """
    path = folder / STATUS
    if not path.exists():
        return None
    try:
        return Health.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise RankfrontError(f"{path} is damaged: {error}") from error
