"""Whom a replica serves: one driver, the next only after it, none twice."""

from __future__ import annotations

import pytest

from actors.lease import Lease, NotHolderError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_next_driver_follows_one_that_is_silent(clock: Clock) -> None:
    lease = Lease("first", 15.0, clock)
    clock.now += 14.9
    assert not lease.take("second"), "the first may be alive"
    lease.check("first")
    with pytest.raises(NotHolderError, match="serves another driver"):
        lease.check("second")
    clock.now += 0.1
    assert lease.take("second")
    lease.check("second")
    with pytest.raises(NotHolderError):
        lease.check("first")


def test_a_holder_that_is_heard_of_keeps_it(clock: Clock) -> None:
    lease = Lease("first", 15.0, clock)
    for _ in range(10):
        clock.now += 10.0
        assert lease.renew("first")
        assert not lease.take("second")
    assert not lease.renew("second"), "a stranger's word renews nothing"
    clock.now += 7.0
    assert lease.alone == 7.0


def test_who_lost_it_never_gets_it_back(clock: Clock) -> None:
    """A driver that was stopped and goes on does not take its replicas from the one that followed."""
    lease = Lease("first", 15.0, clock)
    clock.now += 20.0
    assert lease.take("second")
    assert lease.take("second"), "asked twice, because the answer was lost"
    clock.now += 1000.0
    assert not lease.take("first")
    assert not lease.renew("first")
    lease.check("second")
    assert lease.take("third")
