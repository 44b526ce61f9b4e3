"""The Ray actor around a replica: it loads when asked, serves its holder alone, and ends when left alone."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from actors.lease import SILENT_SECONDS, UNASKED_SECONDS, Lease
from actors.types import Allocation, Place, ReplicaSpec, Rival, Score

# The concurrency group of what must be answered while a trial is scored.
PROMPT = "prompt"
# How often an actor looks whether it is alone for too long.
WATCH_SECONDS = 1.0


class Held:
    """Makes a replica of the class `kind` at the first `ready`, in the one thread that scores as well.

    `seat`, `take`, `renew` and `end` are asked in the group PROMPT. With `alone_seconds` the process ends
    once its holder has been silent for so long (UNASKED_SECONDS where it was never asked to load), whatever
    it is at: nothing of a driver that died holds a GPU for longer.
    """

    def __init__(
        self,
        kind: Any,
        spec: ReplicaSpec,
        token: str,
        alone_seconds: float | None = None,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._kind, self._spec, self._lease = kind, spec, Lease(token, silent_seconds)
        self._replica: Any = None
        self._asked = False
        if alone_seconds is not None:
            threading.Thread(target=self._watch, args=(alone_seconds,), daemon=True).start()

    def _watch(self, alone_seconds: float) -> None:
        while self._lease.alone < (alone_seconds if self._asked else min(alone_seconds, UNASKED_SECONDS)):
            time.sleep(min(WATCH_SECONDS, alone_seconds))
        os._exit(0)

    def seat(self) -> str:
        """The id of the node it runs on."""
        import ray

        return ray.get_runtime_context().get_node_id()  # type: ignore[no-any-return]

    def take(self, token: str) -> str | None:
        """Serve a new driver from now on: returns the seat, None where the old one is alive."""
        return self.seat() if self._lease.take(token) else None

    def renew(self, token: str) -> bool:
        """Hear from the holder."""
        return self._lease.renew(token)

    def ready(self, token: str) -> Place:
        """Answers when the model is loaded, and what was begun for an earlier driver is done."""
        self._lease.check(token)
        self._asked = True
        if self._replica is None:
            self._replica = self._kind(self._spec)
        return self._replica.ready()  # type: ignore[no-any-return]

    def score(self, token: str, allocation: Allocation, split: str, rivals: tuple[Rival, ...]) -> Score:
        self._lease.check(token)
        return self._replica.score(allocation, split, rivals)  # type: ignore[no-any-return]

    def end(self, token: str) -> None:
        """End the process at once, whatever it is at."""
        self._lease.check(token)
        os._exit(0)
