"""From when on a replica is taken to hang."""

from __future__ import annotations

from search.hangs import FIRST, TIMES, Bound


def test_without_a_figure_the_bound_is_many_times_the_longest_so_far() -> None:
    bound = Bound("auto", least=600.0)
    assert bound.seconds == FIRST
    for seconds, most in ((2.0, 600.0), (50.0, 50.0 * TIMES), (40.0, 50.0 * TIMES)):
        bound.ended(seconds)
        assert bound.seconds == most
    asked, none = Bound(7.0, least=600.0), Bound(None, least=600.0)
    for each in (asked, none):
        each.ended(50.0)
    assert asked.seconds == 7.0
    assert none.seconds == float("inf")
