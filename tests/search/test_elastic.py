"""How many replicas nodes have room for, how many are added, and how many threads others get."""

from __future__ import annotations

import pytest

from search.cluster import Machine, Need, Nodes, Room, threads_each
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
    ("machine", "count", "gpus", "threads"),
    [
        (Machine(8, 0, 1), 3, 0, 2),
        (Machine(8, 0, 1), 9, 0, 1),
        (Machine(16, 4, 1), 1, 1, 16),
        (Machine(16, 4, 1), 4, 1, 4),
        (Machine(64, 0, 1, True, (CPU,) * 8), 8, 0, 8),
        (Machine(64, 0, 1, True, (CPU,) * 8), 9, 0, 4),  # two on a node
        (Machine(11, 0, 1, True, (CPU, Room(3, 0, GIB))), 1, 0, 3),  # it may come to be on either
        (Machine(19, 8, 1, True, (CPU, GPU, SMALL)), 6, 1, 1),  # three cores and four GPUs
        (Machine(16, 4, 1, True, (CPU, GPU)), 2, 1, 4),
        (Machine(16, 4, 1, True, (CPU, GPU, Room(0, 4, GIB))), 1, 1, 8),  # on no node without a core
        (Machine(11, 0, 1, True, (CPU, Room(3, 0, GIB))), 2, 1, 4),  # a node with GPUs is waited for
        (Machine(0, 0, 1, True), 1, 0, 1),
    ],
    ids=str,
)
def test_threads_are_of_the_smallest_node_that_has_room(
    machine: Machine, count: int, gpus: int, threads: int
) -> None:
    assert threads_each(machine, count, gpus) == threads


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
