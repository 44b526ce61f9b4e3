"""How long a replica may take before it is taken to hang: what the config says, or many times the longest so
far.

Work that is stopped too early is paid for twice, and a trial that is stopped on every attempt fails: without
a figure of the user's no replica that works comes near a bound, and one that hangs is waited for longer. Only
a node that joins late and copies a model for longer than that needs such a figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

# A second node may be slower, another program may share it, a storage may stutter: not by as much as this.
TIMES = 20
# Seconds that are given whatever the longest was: to a score, to loading a model.
LEAST_SCORE = 600.0
LEAST_LOAD = 1800.0
# Seconds that the first ones may take, of which nothing is known.
FIRST = 4 * 3600.0

Seconds = float | Literal["auto"] | None


@dataclass
class Bound:
    """Seconds that work of one kind may take. `of` is what the user asked for, None for no bound; `longest`
    is the longest that ended so far."""

    of: Seconds
    least: float
    longest: float = 0.0

    @property
    def seconds(self) -> float:
        if self.of is None:
            return math.inf
        if self.of != "auto":
            return self.of
        return max(self.least, TIMES * self.longest) if self.longest else FIRST

    def ended(self, seconds: float) -> None:
        """Work of this kind has ended after so long."""
        self.longest = max(self.longest, seconds)


@dataclass
class Bounds:
    """What a pool waits for: a score of the search split, a replica that loads once it is on a node."""

    score: Bound = field(default_factory=lambda: Bound(None, LEAST_SCORE))
    load: Bound = field(default_factory=lambda: Bound(None, LEAST_LOAD))

    @classmethod
    def asked(cls, score: Seconds, load: Seconds) -> Bounds:
        return cls(Bound(score, LEAST_SCORE), Bound(load, LEAST_LOAD))
