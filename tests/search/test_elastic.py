"""How many replicas nodes have room for, and how many are added."""

from __future__ import annotations

import pytest

from search.cluster import Need, Nodes, Room
from search.elastic import Elastic

GIB = 2.0**30
GPU = Room(cpus=8, gpus=4, memory=64 * GIB)
SMALL = Room(cpus=3, gpus=4, memory=64 * GIB)
CPU = Room(cpus=8, gpus=0, memory=16 * GIB)


@pytest.mark.parametrize(
    ("room", "need", "places"),
    [
        (GPU, Need(2, 1), 4),
        (SMALL, Need(2, 1), 1),  # cores for one, though there are GPUs for four
        (CPU, Need(2, 1), 0),
        (CPU, Need(2), 4),
        (CPU, Need(2, memory=6 * GIB), 2),
        (GPU, Need(1, 0.5), 8),
        (Room(cpus=32, gpus=4, memory=GIB), Need(2, 0.3333), 12),  # three on each: a share is never of two
        (GPU, Need(1, 3), 1),
        (GPU, Need(9, 1), 0),
    ],
    ids=str,
)
def test_a_node_has_room_for_what_its_scarcest_share_allows(room: Room, need: Need, places: int) -> None:
    assert room.places(need) == places


@pytest.mark.parametrize(
    ("elastic", "there", "missing"),
    [
        (Elastic(follow=True, need=Need(2, 1)), 1, 4),  # five places: four and one
        (Elastic(follow=True, need=Need(2, 1)), 5, 0),
        (Elastic(follow=True, need=Need(2, 1)), 9, 0),  # those without a node keep their place
        (Elastic(most=3, follow=True, need=Need(2, 1)), 1, 2),
        (Elastic(most=3, follow=True, need=Need(2, 1)), 4, 0),
        (Elastic(need=Need(2, 1)), 1, 0),
    ],
    ids=str,
)
def test_replicas_are_added_where_nodes_that_stay_have_room(
    elastic: Elastic, there: int, missing: int
) -> None:
    nodes = Nodes({"a": GPU, "b": SMALL, "c": CPU, "leaves": GPU}, draining=frozenset({"leaves"}))
    assert elastic.missing(nodes, there) == missing
