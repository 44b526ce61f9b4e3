"""Trades of parameters: held against every allocation there is, and against a closed form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.trades import Steps

LEVELS = 4
SIZES = np.array([[2, 4, 6, 8], [3, 6, 9, 12], [1, 2, 3, 4]], dtype=np.int64)
CONVEX = np.array([[9.0, 4.0, 1.0, 0.0], [1.8, 0.8, 0.2, 0.0], [9.0, 3.0, 1.0, 0.0]])
ROOMS = st.integers(int(SIZES[:, 0].sum()), int(SIZES[:, -1].sum()))
MULTIPLIERS = st.lists(st.floats(0.2, 5.0), min_size=3, max_size=3).map(np.array)
ANY = st.lists(st.integers(0, LEVELS - 1), min_size=3, max_size=3).map(np.array)


def loss(levels: np.ndarray, multipliers: np.ndarray) -> float:
    return float(multipliers @ CONVEX[np.arange(3), levels])


@settings(max_examples=60, deadline=None)
@given(room=ROOMS, multipliers=MULTIPLIERS)
def test_fill_loses_least_of_all_allocations_of_its_size(room: int, multipliers: np.ndarray) -> None:
    steps = Steps.of(SIZES, CONVEX)
    levels = steps.fill(multipliers, room)
    size = steps.size(levels)
    assert size <= room
    others = [np.array(each) for each in product(range(LEVELS), repeat=3)]
    least = min(loss(each, multipliers) for each in others if steps.size(each) <= size)
    assert loss(levels, multipliers) == pytest.approx(least)


@settings(max_examples=60, deadline=None)
@given(levels=ANY, room=ROOMS, multipliers=MULTIPLIERS)
def test_restore_keeps_the_budget_within_one_step(
    levels: np.ndarray, room: int, multipliers: np.ndarray
) -> None:
    steps = Steps.of(SIZES, CONVEX)
    restored = steps.restore(levels, multipliers, room)
    assert room - steps.width.max() < steps.size(restored) <= room


def test_restore_takes_where_the_least_is_lost() -> None:
    """Three too many: a parameter less costs the second one 0.2, the first 1.5, the third 2."""
    steps = Steps.of(SIZES, CONVEX)
    assert steps.restore(np.array([2, 2, 2]), np.ones(3), 15.0).tolist() == [2, 1, 2]


def test_the_frontier_is_what_fill_finds() -> None:
    steps, multipliers = Steps.of(SIZES, CONVEX), np.array([1.0, 2.0, 0.5])
    sizes, losses = steps.frontier(multipliers, CONVEX[:, 0])
    found = [steps.fill(multipliers, float(size)) for size in sizes]
    assert [steps.size(levels) for levels in found] == sizes.tolist()
    assert [loss(levels, multipliers) for levels in found] == pytest.approx(losses.tolist())


def test_levels_of_equal_size_and_off_the_hull_are_passed_over() -> None:
    sizes = np.array([[2, 2, 5, 6, 8]], dtype=np.int64)
    losses = np.array([[5.0, 4.0, 3.9, 1.0, 0.0]])
    steps = Steps.of(sizes, losses)
    assert steps.lowest.tolist() == [1]
    assert list(zip(steps.low.tolist(), steps.high.tolist(), strict=True)) == [(1, 3), (3, 4)]
    assert steps.corner.tolist() == [[1, 1, 3, 3, 4]]


# -- straight curves --------------------------------------------------------------------------


def straight(random: np.random.Generator, bends: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and convex losses (p, L + 1) of straight lines with at most `bends` bends: steps of a parameter
    are worth the same up to rounding, or the lower ones more."""
    count, levels = random.integers(1, 9), random.integers(2, 20)
    sizes = np.cumsum(random.integers(1, 60, (count, levels + 1)), axis=1)
    lines = random.exponential(size=(count, 1 + bends, 1))
    reach = np.cumsum(random.integers(1, 300, (count, 1 + bends, 1)), axis=1)
    lacking = sizes[:, None, -1:] - sizes[:, None, :]
    return sizes, np.sum(lines * np.maximum(lacking - reach + reach[:, :1], 0), axis=1)


Case = tuple[np.random.Generator, np.ndarray, np.ndarray, Steps]


def cases(bends: int, count: int) -> Iterator[Case]:
    """So many straight curves, with what they were drawn from: sizes, losses, and their steps."""
    random = np.random.default_rng(bends)
    for _ in range(count):
        sizes, losses = straight(random, bends)
        yield random, sizes, losses, Steps.of(sizes, losses)


@pytest.mark.parametrize("bends", [0, 1, 3])
def test_straight_curves_keep_the_budget_within_one_step(bends: int) -> None:
    """From the lowest levels and from any others, with room for as much as was asked for."""
    for random, sizes, _, steps in cases(bends, 400):
        multipliers = random.lognormal(size=len(sizes))
        room = random.uniform(sizes[:, 0].sum(), sizes[:, -1].sum())
        levels = random.integers(0, sizes.shape[1], len(sizes))
        for found in (steps.fill(multipliers, room), steps.restore(levels, multipliers, room)):
            assert room - steps.width.max() < steps.size(found) <= room


@pytest.mark.parametrize("bends", [0, 1, 3])
def test_straight_curves_are_shrunk_by_no_step_too_many(bends: int) -> None:
    for random, sizes, _, steps in cases(bends, 400):
        room = random.uniform(sizes[:, 0].sum(), sizes[:, -1].sum())
        dense = steps.corner[:, -1]
        shrunk = steps.shrink(dense, random.lognormal(size=len(sizes)), room)
        assert room - steps.width.max() < steps.size(shrunk) <= room


@pytest.mark.parametrize("bends", [0, 1, 3])
def test_the_frontier_of_straight_curves_is_what_fill_finds(bends: int) -> None:
    for random, sizes, losses, steps in cases(bends, 60):
        multipliers = random.lognormal(size=len(sizes))
        rooms, predicted = steps.frontier(multipliers, losses[np.arange(len(sizes)), steps.lowest])
        for room, expected in zip(rooms.tolist(), predicted.tolist(), strict=True):
            levels = steps.fill(multipliers, room)
            assert steps.size(levels) == room
            found = float(multipliers @ losses[np.arange(len(sizes)), levels])
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
