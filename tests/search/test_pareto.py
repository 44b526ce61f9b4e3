"""Front and hypervolume against brute force, closed forms and optuna's WFG."""

from __future__ import annotations

import math
import time
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from optuna._hypervolume import compute_hypervolume

from search.pareto import Front, contributions, front, hypervolume, hypervolume_history, plateaued

Floats = NDArray[np.float64]


def brute_front(points: Floats) -> list[int]:
    def beaten(i: int) -> bool:
        return any(
            (points[j] <= points[i]).all() and ((points[j] < points[i]).any() or j < i)
            for j in range(len(points))
            if j != i
        )

    return [i for i in range(len(points)) if not beaten(i)]


def counted_volume(points: Floats, reference: Floats) -> int:
    """Unit cells of an integer grid that some point dominates: the volume, by counting."""
    cells = np.stack(np.meshgrid(*[np.arange(r) for r in reference], indexing="ij"), axis=-1)
    flat = cells.reshape(-1, len(reference))
    covered = [(point <= flat).all(axis=1) for point in points]
    return int(np.any(covered, axis=0).sum()) if len(points) else 0


@st.composite
def grids(draw: st.DrawFn) -> Floats:
    """Few distinct integers, so ties and duplicates are common. (n, d), d in 2, 3."""
    d = draw(st.sampled_from([2, 3]))
    rows = draw(st.lists(st.lists(st.integers(0, 6), min_size=d, max_size=d), max_size=12))
    return np.array(rows, dtype=float).reshape(len(rows), d)


@given(grids())
@settings(deadline=None)
def test_front_is_what_brute_force_finds(points: Floats) -> None:
    assert front(points).tolist() == brute_front(points)


@given(grids(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_front_that_grows_is_the_front_of_all(points: Floats, random: Random) -> None:
    growing, order = Front(points.shape[1]), list(range(len(points)))
    random.shuffle(order)
    for key in order:
        growing.add(key, points[key])
    assert growing.keys == front(points).tolist()
    assert growing.points.tolist() == points[growing.keys].tolist()


@given(grids())
@settings(deadline=None)
def test_hypervolume_counts_grid_cells(points: Floats) -> None:
    reference = np.full(points.shape[1], 5.0)  # points at 5 and 6 lie outside
    assert hypervolume(points, reference) == counted_volume(points, reference)


@given(grids())
@settings(deadline=None)
def test_history_is_the_hypervolume_of_every_prefix(points: Floats) -> None:
    reference = np.full(points.shape[1], 5.5)
    history = hypervolume_history(points, reference)
    assert history.shape == (len(points),)
    assert history.tolist() == [hypervolume(points[: i + 1], reference) for i in range(len(points))]
    assert (np.diff(history) >= 0).all()


@given(grids())
@settings(deadline=None)
def test_dominated_points_and_order_do_not_matter(points: Floats) -> None:
    reference = np.full(points.shape[1], 7.0)
    volume = hypervolume(points, reference)
    assert hypervolume(points[front(points)], reference) == volume
    assert hypervolume(points[::-1], reference) == volume


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_hypervolume_agrees_with_optuna(d: int, n: int) -> None:
    rng = np.random.default_rng(n * d)
    for _ in range(5):
        points = rng.random((n, d)) * 1.2
        reference = np.full(d, 1.0)
        inside = points[(points < reference).all(axis=1)]
        expected = compute_hypervolume(inside, reference) if len(inside) else 0.0
        assert math.isclose(hypervolume(points, reference), expected, rel_tol=1e-12, abs_tol=1e-15)


def test_history_ends_where_optuna_does() -> None:
    points = np.random.default_rng(0).random((80, 3))
    history = hypervolume_history(points, np.ones(3))
    for i in (0, 20, 79):
        assert math.isclose(history[i], compute_hypervolume(points[: i + 1], np.ones(3)), rel_tol=1e-12)


def test_closed_forms() -> None:
    assert hypervolume([[0.25, 0.5]], [1.0, 1.0]) == 0.375
    assert hypervolume([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], [3.0, 3.0]) == 6.0
    assert hypervolume([[0, 0, 1], [1, 0, 0], [0, 1, 0]], [2.0, 2.0, 2.0]) == 7.0
    steps = np.arange(100) / 100  # staircase x + y = 0.99: 1/2 + 1/200
    assert math.isclose(hypervolume(np.c_[steps, steps[::-1]], [1.0, 1.0]), 0.505, rel_tol=1e-12)


def test_front_of_one_and_four_objectives() -> None:
    rng = np.random.default_rng(1)
    assert front([[3.0], [1.0], [2.0], [1.0]]).tolist() == [1]
    points = rng.integers(0, 4, (60, 4)).astype(float)
    assert front(points).tolist() == brute_front(points)


def test_first_of_duplicates_is_kept() -> None:
    assert front([[2, 2], [1, 3], [2, 2], [1, 3], [3, 1]]).tolist() == [0, 1, 4]


def test_no_points() -> None:
    assert front([]).tolist() == []
    assert front(np.empty((0, 3))).tolist() == []
    assert hypervolume([], [1.0, 1.0]) == 0.0
    assert hypervolume_history([], [1.0, 1.0, 1.0]).shape == (0,)


def test_points_on_or_beyond_the_reference_add_nothing() -> None:
    outside = [[1.0, 0.0], [0.0, 1.0], [-5.0, 2.0], [math.inf, 0.0]]
    assert hypervolume(outside, [1.0, 1.0]) == 0.0
    assert hypervolume([*outside, [0.5, 0.5]], [1.0, 1.0]) == 0.25
    assert hypervolume_history([*outside, [0.5, 0.5]], [1.0, 1.0]).tolist() == [0, 0, 0, 0, 0.25]


def test_values_that_cannot_be_ranked_are_refused() -> None:
    with pytest.raises(ValueError, match=r"points\[1\] is \[nan, 1.0\]"):
        front([[0.0, 0.0], [math.nan, 1.0]])
    with pytest.raises(ValueError, match=r"points\[0\]"):
        hypervolume_history([[-math.inf, 0.0]], [1.0, 1.0])
    with pytest.raises(ValueError, match="2 or 3 objectives"):
        hypervolume(np.zeros((1, 4)), np.ones(4))
    with pytest.raises(ValueError, match="3 objectives, the reference 2"):
        hypervolume(np.zeros((1, 3)), np.ones(2))
    with pytest.raises(ValueError, match="need finite"):
        hypervolume(np.zeros((1, 2)), [1.0, math.inf])
    with pytest.raises(ValueError, match="shape"):
        front(np.zeros(3))


def test_five_thousand_points_are_quick() -> None:
    rng = np.random.default_rng(2)
    sphere = rng.normal(size=(5000, 3))
    sphere = 1 - np.abs(sphere / np.linalg.norm(sphere, axis=1, keepdims=True))  # nearly all non-dominated
    started = time.process_time()
    assert len(front(sphere)) > 2500
    assert time.process_time() - started < 5  # 0.3 s here; a quadratic Python loop takes a minute


@settings(max_examples=200, deadline=None)
@given(grids(), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.125, 0.5]))
def test_a_plateau_is_a_history_that_no_longer_grows(points: Floats, window: int, tolerance: float) -> None:
    """Of whole numbers, so that both ways of adding up volumes are exact."""
    reference = np.full(points.shape[1], 6.0)
    history = hypervolume_history(points, reference)
    grown = history[-1] - history[-1 - window] if len(history) > window else np.inf
    assert plateaued(points, reference, window, tolerance) == bool(grown <= tolerance * history[-1:].sum())


def test_a_plateau_needs_a_window() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        plateaued([(1.0, 1.0)], (2.0, 2.0), window=0, tolerance=0.1)


def test_a_contribution_is_what_only_that_point_dominates() -> None:
    """Of a staircase in two dimensions: the rectangle to its neighbours. Twins and outsiders add nothing."""
    points = [(1.0, 4.0), (2.0, 2.0), (4.0, 1.0)]
    assert contributions(points, (5.0, 5.0)).tolist() == [1.0 * 1.0, 2.0 * 2.0, 1.0 * 1.0]
    twins = [*points, (2.0, 2.0), (6.0, 0.5)]
    assert contributions(twins, (5.0, 5.0)).tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert contributions([(0.0, 0.0, 0.0)], (1.0, 2.0, 3.0)).tolist() == [6.0]
