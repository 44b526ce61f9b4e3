"""When and where replicas start again: waits that double, nodes that are avoided, the end of hope."""

from __future__ import annotations

import pytest

from search.restarts import AVOID_SECONDS, FIRST_SECONDS, LONGEST_SECONDS, START_FAILURES, Restarts


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_waits_double_up_to_a_bound_and_begin_anew_after_a_success() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    waits = [restarts.failed("replica-0", None, "no GPU") - clock.now for _ in range(60)]
    assert waits[:4] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS, 8 * FIRST_SECONDS]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_SECONDS
    assert restarts.failed("replica-1", None, "no GPU") - clock.now == FIRST_SECONDS, "each waits for itself"
    restarts.succeeded("replica-0", None)
    assert restarts.failed("replica-0", None, "no GPU") - clock.now == FIRST_SECONDS


def test_the_first_error_is_kept_until_its_replica_starts() -> None:
    restarts = Restarts(Clock())
    for error in ("the cause", "an effect"):
        restarts.failed("replica-0", "a", error)
    restarts.succeeded("replica-1", "b")
    assert restarts.first_error == "the cause"
    restarts.succeeded("replica-0", "a")
    assert restarts.first_error is None


def test_a_bad_node_is_avoided_while_there_are_others() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    for _ in range(START_FAILURES):
        assert restarts.avoided(["bad", "good"]) == []
        restarts.failed("replica-0", "bad", "no driver")
    assert restarts.avoided(["bad", "good"]) == ["bad"]
    assert restarts.avoided(["bad"]) == [], "where there is no other, it is tried"
    clock.now += AVOID_SECONDS
    assert restarts.avoided(["bad", "good"]) == [], "someone may have mended it"


@pytest.mark.parametrize(
    ("failures", "usable", "hopeless"),
    [
        (["a"] * 2, ["a"], False),
        (["a"] * 3, ["a"], True),
        (["a"] * 9, ["a", "b"], False),
        (["a", "a", "b"], ["a", "b"], True),
        ([None] * 3, [], True),
    ],
)
def test_hope_ends_where_every_node_failed(
    failures: list[str | None], usable: list[str], hopeless: bool
) -> None:
    restarts = Restarts(Clock())
    for number, node in enumerate(failures):
        restarts.failed(f"replica-{number}", node, "no driver")
    assert restarts.hopeless(usable) == hopeless
    restarts.succeeded("replica-9", "a")
    assert not restarts.hopeless(usable)
