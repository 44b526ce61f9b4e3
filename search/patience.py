"""A storage that refuses for a while: a full disk, a server that restarts.

It is asked again, aloud, and only so long. What is asked must do no harm when it is asked twice: a write
that was not answered may have arrived all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from search.events import Note, silent

T = TypeVar("T")

# A server that fails over or recovers takes a minute or two; replicas wait that long for the driver at most.
SECONDS = 120.0
# Between two attempts, doubled from the first to the longest: an interruption of an instant costs little.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0


def _unsaid(line: str) -> None:
    """Nobody reads."""


class Patience:
    """Asks again while a storage refuses, for `seconds` at most; 0 of them is no patience at all.

    `note` hears of it as well, once there is someone to tell.
    """

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None] = _unsaid,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self.say = seconds, say
        self._clock, self._sleep = clock, sleep
        self.note: Note = silent

    def ride_out(
        self,
        ask: Callable[[bool], T],
        kinds: tuple[type[Exception], ...],
        reason_of: Callable[[Exception], str | None],
    ) -> T:
        """The answer of `ask`, which is told whether it was asked before.

        `reason_of` says in a line why an error of one of the `kinds` may pass, None where it will not.

        Raises:
            Exception: the last error, where it will not pass or `seconds` are over.
        """
        began, attempts, pause = 0.0, 0, FIRST_PAUSE
        while True:
            attempts += 1
            try:
                answer = ask(attempts > 1)
            except kinds as error:
                now = self._clock()
                began = began if attempts > 1 else now
                reason = reason_of(error)
                if reason is None or now - began >= self._seconds:
                    raise
                if attempts == 1:
                    self._told_of_refusal(reason)
                self._sleep(min(pause, began + self._seconds - now))
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if attempts > 1:
                    self._told_of_answer(self._clock() - began, attempts)
                return answer

    def _told_of_refusal(self, reason: str) -> None:
        self.say(f"storage: {reason}; asking again for up to {self._seconds:.0f} s")
        self.note("storage refused", reason=reason)

    def _told_of_answer(self, seconds: float, attempts: int) -> None:
        self.say(f"storage: answers again after {seconds:.1f} s; nothing is lost")
        self.note("storage back", seconds=seconds, attempts=attempts)


def impatient() -> Patience:
    """Of whoever would rather know at once: a command that a person waits for."""
    return Patience(0.0)
