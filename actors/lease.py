"""Who a replica serves: one driver at a time, by a token, and for how long it waits for the next one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from actors.errors import RankfrontError

# A holder is heard of every RENEW_SECONDS; three times silent, it is dead or cut off, and another may follow.
RENEW_SECONDS = 5.0
SILENT_SECONDS = 3 * RENEW_SECONDS
# A replica that nobody ever asked to load: its driver died as it was placed.
UNASKED_SECONDS = 60.0


class NotHolderError(RankfrontError):
    """Asked by a driver that does not hold the replica, or does no longer."""


class Lease:
    """Invariant: one token holds it; a token that lost it never holds it again.

    A new token is taken only from a holder that has been silent for `silent_seconds`. `clock` gives seconds.
    """

    def __init__(
        self, token: str, silent_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._token, self._silent, self._clock = token, silent_seconds, clock
        self._heard = clock()
        self._retired: set[str] = set()
        self._lock = threading.Lock()

    @property
    def alone(self) -> float:
        """Seconds since the holder was heard of."""
        with self._lock:
            return self._clock() - self._heard

    def renew(self, token: str) -> bool:
        """Hear from a driver; False where it is not the holder."""
        with self._lock:
            if token != self._token:
                return False
            self._heard = self._clock()
            return True

    def take(self, token: str) -> bool:
        """Make `token` the holder; False where another is alive, or where it was the holder once."""
        if self.renew(token):
            return True
        with self._lock:
            if token in self._retired or self._clock() - self._heard < self._silent:
                return False
            self._retired.add(self._token)
            self._token, self._heard = token, self._clock()
            return True

    def check(self, token: str) -> None:
        """Raises NotHolderError where `token` is not the holder's."""
        with self._lock:
            if token != self._token:
                raise NotHolderError("this replica serves another driver: the study has a new one")
