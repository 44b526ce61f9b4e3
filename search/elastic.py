"""How many replicas there are, as nodes join and leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search.cluster import Need, Nodes

# Nodes join within minutes; a look at them costs milliseconds.
LOOK_SECONDS = 2.0


ONE_CORE = Need(1)


@dataclass(frozen=True)
class Elastic:
    """Fewer than `least` loaded replicas get no trial; there are never more than `most` (None: no bound).

    With `follow` a replica is added for each one that nodes have room for beyond those there are. `nodes`
    tells what there is; None where no node joins or leaves.
    """

    least: int = 1
    most: int | None = None
    follow: bool = False
    need: Need = ONE_CORE
    nodes: Callable[[], Nodes] | None = None

    def missing(self, nodes: Nodes, there: int) -> int:
        """How many replicas to add to those that are there."""
        if not self.follow:
            return 0
        room = sum(nodes.usable(self.need).values())
        return max(0, (room if self.most is None else min(room, self.most)) - there)


# As many as were asked for, on the nodes there are.
FIXED = Elastic()
