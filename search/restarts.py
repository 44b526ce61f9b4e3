"""When a replica that could not start is tried again, where, and when to give up: times and counts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

# Starts that fail in a row, everywhere or on one node: the cause is not bad luck.
START_FAILURES = 3
# The first wait after a failed start; it doubles with each one more, up to the bound (seconds).
FIRST_SECONDS = 1.0
LONGEST_SECONDS = 300.0
# A node where starts failed is tried again after this: someone may have mended it.
AVOID_SECONDS = 900.0


class Restarts:
    """What is known of starts. `clock` gives seconds.

    `first_error` is of the first start that failed, until none that failed is still to succeed.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_name: Counter[str] = Counter()
        self._by_node: Counter[str] = Counter()
        self._failed_at: dict[str, float] = {}
        self.in_a_row = 0
        self.first_error: str | None = None

    def succeeded(self, name: str, node: str | None) -> None:
        """A replica has loaded."""
        self.in_a_row = 0
        self._by_name.pop(name, None)
        if not self._by_name:
            self.first_error = None
        if node is not None:
            self._by_node.pop(node, None)

    def failed(self, name: str, node: str | None, error: str) -> float:
        """A replica could not start: returns when to start it again, on `clock`."""
        self.in_a_row += 1
        self.first_error = self.first_error or error
        self._by_name[name] += 1
        if node is not None:
            self._by_node[node] += 1
            self._failed_at[node] = self._clock()
        # The bound is reached long before 2 to the 30th.
        wait = FIRST_SECONDS * float(2 ** min(self._by_name[name] - 1, 30))
        return self._clock() + min(LONGEST_SECONDS, wait)

    def avoided(self, usable: Collection[str]) -> list[str]:
        """Nodes to start nothing on; none where all that are usable would be."""
        bad = [
            node
            for node, count in self._by_node.items()
            if count >= START_FAILURES and self._clock() - self._failed_at[node] < AVOID_SECONDS
        ]
        return bad if any(node not in bad for node in usable) else []

    def hopeless(self, usable: Collection[str]) -> bool:
        """Whether starts failed in a row and no usable node is left on which none has."""
        return self.in_a_row >= START_FAILURES and all(self._by_node[node] for node in usable)
