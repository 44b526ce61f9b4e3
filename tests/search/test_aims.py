"""Aims: an even sequence, and gains that are the hypervolume's."""

from __future__ import annotations

import numpy as np
import pytest

from search.aims import CANDIDATES, PARTS, draw, expected_gains, part_of, staircase, van_der_corput
from search.pareto import front, hypervolume


def test_the_sequence_mirrors_binary_digits() -> None:
    assert [van_der_corput(number) for number in range(8)] == [
        0,
        1 / 2,
        1 / 4,
        3 / 4,
        1 / 8,
        5 / 8,
        3 / 8,
        7 / 8,
    ]


def test_numbers_in_a_row_aim_at_every_part_of_the_range() -> None:
    for start in (0, 5, 11):
        aims = [part_of(number, 40.0, 100.0) for number in range(start, start + PARTS)]
        parts = sorted({int((each.mean() - 40) / 60 * PARTS) for each in aims})
        assert parts == list(range(PARTS))
        assert all(each.min() >= 40 and each.max() <= 100 and len(each) == CANDIDATES for each in aims)


def test_the_staircase_is_the_front() -> None:
    rng = np.random.default_rng(0)
    sizes, losses = rng.integers(0, 30, 60), rng.integers(0, 30, 60).astype(float)
    members = staircase(sizes, losses)
    expected = front(np.stack([sizes, losses], axis=1))
    assert sorted(members.tolist()) == expected.tolist()
    assert (np.diff(sizes[members]) > 0).all()
    assert len(staircase(sizes[:0], losses[:0])) == 0


def test_a_gain_is_what_the_hypervolume_grows_by() -> None:
    """Below the smallest member everything up to `worst` is to be gained."""
    sizes, losses = np.array([40, 60, 90]), np.array([3.0, 2.0, 0.5])
    points = np.stack([sizes, losses], axis=1)
    tried = [(30.0, 3.5), (30.0, 1.0), (50.0, 2.5), (50.0, 3.5), (70.0, 1.0), (95.0, 0.1)]
    gains = expected_gains(*np.array(tried).T, (sizes, losses), worst=4.0, dense=100)
    before = hypervolume(points, (100.0, 4.0))
    grown = [hypervolume(np.vstack([points, point]), (100.0, 4.0)) - before for point in tried]
    assert gains == pytest.approx(grown)


def test_most_draws_are_near_the_largest_gain() -> None:
    rng = np.random.RandomState(0)
    drawn = [draw(np.array([0.0, 1.0, 10.0, 9.0]), rng) for _ in range(200)]
    assert set(drawn) <= {1, 2, 3}
    assert sum(index >= 2 for index in drawn) > 190
    assert {draw(np.zeros(3), rng) for _ in range(50)} == {0, 1, 2}
