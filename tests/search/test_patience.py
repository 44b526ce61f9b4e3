"""How long a storage that refuses is asked again, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Time

from search.events import EVENTS
from search.patience import Patience, impatient


class Refusing:
    """Fails until a time, and counts how often it was asked."""

    def __init__(self, time: Time, until: float) -> None:
        self._time, self._until = time, until
        self.asked: list[bool] = []

    def __call__(self, again: bool) -> str:
        self.asked.append(again)
        if self._time.now < self._until:
            raise OSError(28, "No space left on device")
        return "written"


def reason_of(error: Exception) -> str | None:
    return str(error)


def test_what_passes_is_waited_for_and_said_once() -> None:
    time, said, heard = Time(), [], []
    patience = Patience(60.0, said.append, time.clock, time.sleep)
    patience.note = lambda event, **facts: heard.append((event, facts))
    ask = Refusing(time, until=10.0)
    assert patience.ride_out(ask, (OSError,), reason_of) == "written"
    assert 10.0 <= time.now <= 12.0
    assert ask.asked == [False] + [True] * (len(ask.asked) - 1)
    assert len(ask.asked) < 12, "ten seconds are few attempts"
    assert said == [
        "storage: [Errno 28] No space left on device; asking again for up to 60 s",
        f"storage: answers again after {time.now:.1f} s; nothing is lost",
    ]
    assert [event for event, _ in heard] == ["storage refused", "storage back"]
    assert {event for event, _ in heard} <= set(EVENTS)
    assert heard[1][1] == {"seconds": time.now, "attempts": len(ask.asked)}


def test_an_answer_at_once_says_nothing() -> None:
    said: list[str] = []
    assert Patience(60.0, said.append).ride_out(lambda again: 3, (OSError,), reason_of) == 3
    assert said == []


def test_patience_ends_with_the_last_error() -> None:
    time = Time()
    ask = Refusing(time, until=1e9)
    with pytest.raises(OSError, match="No space left"):
        Patience(60.0, clock=time.clock, sleep=time.sleep).ride_out(ask, (OSError,), reason_of)
    assert time.now == pytest.approx(60.0)


@pytest.mark.parametrize(
    ("kinds", "reason"), [((OSError,), lambda error: None), ((ValueError,), lambda error: "no")]
)
def test_what_will_not_pass_is_not_waited_for(kinds: Any, reason: Any) -> None:
    time = Time()
    ask = Refusing(time, until=1.0)
    with pytest.raises(OSError, match="No space left"):
        Patience(60.0, clock=time.clock, sleep=time.sleep).ride_out(ask, kinds, reason)
    assert (time.now, ask.asked) == (0.0, [False])


def test_without_patience_the_first_error_is_the_last() -> None:
    ask = Refusing(Time(), until=1.0)
    with pytest.raises(OSError, match="No space left"):
        impatient().ride_out(ask, (OSError,), reason_of)
    assert ask.asked == [False]
