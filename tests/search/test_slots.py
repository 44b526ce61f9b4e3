"""What a place for a replica says of the GPUs that fill it. Its actors are in the tests of the pool."""

from __future__ import annotations

import pytest

from actors.types import ReplicaSpec
from search.slots import Slot


def test_gpus_work_a_share_of_the_time_since_their_replica_was_loaded() -> None:
    slot = Slot(ReplicaSpec("r", None, None, 1, gpus=2), loaded_at=100.0, starts=1)  # type: ignore[arg-type]
    assert slot.health(110.0, 0.0).gpus == ()
    for busy in ((3.0, 1.0), (2.0, 4.0)):
        slot.add_work(busy)
    assert slot.health(110.0, 0.0).gpus == pytest.approx((0.5, 0.5))
    slot.add_work((0.0, 3.0))
    assert slot.health(116.0, 0.0).gpus == pytest.approx((5 / 16, 0.5))
    assert slot.health(100.0, 0.0).gpus == (0.0, 0.0), "a clock that has not moved"


def test_replicas_without_gpus_say_nothing_of_them() -> None:
    slot = Slot(ReplicaSpec("r", None, None, 1), loaded_at=1.0, starts=1)  # type: ignore[arg-type]
    slot.add_work(())
    assert slot.health(2.0, 0.0).gpus == ()
