"""Front and hypervolume of plain arrays. Every objective is minimised: callers flip signs.

Point i dominates j when it is nowhere larger and somewhere smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def front(points: ArrayLike) -> NDArray[np.intp]:
    """Indices of the non-dominated rows of `points` (n, d), increasing; of equal rows the first.

    Raises:
        ValueError: `points` is not (n, d), or a row holds NaN.
    """
    array = _points(points)
    # Lexicographic and stable: whatever dominates a row, or equals it with a smaller index, comes before it.
    order = np.lexsort(array.T[::-1])
    kept = np.empty_like(array)
    indices: list[int] = []
    for index in order:
        if not (kept[: len(indices)] <= array[index]).all(axis=1).any():
            kept[len(indices)] = array[index]
            indices.append(int(index))
    return np.array(sorted(indices), dtype=np.intp)


class Front:
    """The non-dominated of keyed points that come one by one, in any order; of equal ones the lowest key.

    Invariant: `keys` are those that `front` finds among all points so far, ordered by key.
    """

    def __init__(self, dimensions: int) -> None:
        self.keys: list[int] = []
        self.points = np.empty((0, dimensions))

    def add(self, key: int, point: Sequence[float] | Floats) -> None:
        """Raises ValueError as `front`; a key is added once."""
        new = _points(np.array([point], dtype=np.float64), self.points.shape[1])
        below = (self.points <= new).all(axis=1)
        equal = below & (self.points >= new).all(axis=1)
        if (below & ~equal).any() or any(self.keys[index] < key for index in np.flatnonzero(equal)):
            return
        kept = np.flatnonzero(~(self.points >= new).all(axis=1))
        keys = [*(self.keys[index] for index in kept), key]
        order = np.argsort(keys)
        self.keys = [keys[index] for index in order]
        self.points = np.vstack([self.points[kept], new])[order]


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume dominated by `points` (n, d) and bounded by `reference` (d,), exact for d = 2 and d = 3.

    A point that is not strictly smaller than the reference in every objective contributes nothing.

    Raises:
        ValueError: d is neither 2 nor 3, shapes disagree, NaN or -inf in `points`, NaN or inf in `reference`.
    """
    bound = _reference(reference)
    array = _points(points, bound.size)
    inside = array[(array < bound).all(axis=1)]
    return _volume(inside[front(inside)], bound)


def contributions(points: ArrayLike, reference: ArrayLike) -> Floats:
    """What each of `points` (n, d) adds to the hypervolume that all others dominate, (n,).

    Raises as `hypervolume`.
    """
    array = _points(points)
    whole = hypervolume(array, reference)
    return np.array([whole - hypervolume(np.delete(array, i, axis=0), reference) for i in range(len(array))])


def hypervolume_history(points: ArrayLike, reference: ArrayLike) -> Floats:
    """Hypervolume after each row of `points` (n, d), in their order: (n,), never decreasing.

    Only a row that no earlier one dominates or equals costs a recomputation. Raises as `hypervolume`.
    """
    bound = _reference(reference)
    array = _points(points, bound.size)
    history = np.zeros(len(array))
    best = np.empty((0, bound.size))
    current = 0.0
    for index, point in enumerate(array):
        if (point < bound).all() and not (best <= point).all(axis=1).any():
            best = np.vstack([best[~(point <= best).all(axis=1)], point])
            current = max(current, _volume(best, bound))  # rounding must not show as a loss
        history[index] = current
    return history


def plateaued(points: ArrayLike, reference: ArrayLike, window: int, tolerance: float) -> bool:
    """Whether the last `window` rows of `points` (n, d) raised the hypervolume by at most `tolerance` of what
    it is now.

    False until there are more rows than that. A hypervolume that is still 0 has not grown. Two hypervolumes
    are computed, whatever the number of rows.

    Raises:
        ValueError: `window` below 1, `tolerance` negative, or as `hypervolume`.
    """
    if window < 1 or not tolerance >= 0:
        raise ValueError(f"window is {window}, tolerance {tolerance}; need window >= 1 and tolerance >= 0")
    array = _points(points)
    if len(array) <= window:
        return False
    now = hypervolume(array, reference)
    return now - hypervolume(array[:-window], reference) <= tolerance * now


def _points(points: ArrayLike, objectives: int | None = None) -> Floats:
    array = np.asarray(points, dtype=np.float64)
    if array.shape == (0,):
        array = array.reshape(0, objectives or 1)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"points have shape {array.shape}; need (n, d) with d >= 1")
    if objectives is not None and array.shape[1] != objectives:
        raise ValueError(f"points have {array.shape[1]} objectives, the reference {objectives}")
    bad = np.isnan(array) if objectives is None else np.isnan(array) | np.isneginf(array)
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=1))[0])
        raise ValueError(
            f"points[{row}] is {array[row].tolist()}; a score that is no number cannot be ranked"
        )
    return array


def _reference(reference: ArrayLike) -> Floats:
    bound = np.asarray(reference, dtype=np.float64)
    if bound.shape not in ((2,), (3,)):
        raise ValueError(
            f"reference has shape {bound.shape}; hypervolume is exact for 2 or 3 objectives only"
        )
    if not np.isfinite(bound).all():
        raise ValueError(f"reference is {bound.tolist()}; need finite values")
    return bound


def _volume(points: Floats, bound: Floats) -> float:
    """Volume of points (n, d) that are all strictly inside `bound`."""
    return _area(points, bound) if bound.size == 2 else _slices(points, bound)


def _area(points: Floats, bound: Floats) -> float:
    """2-d sweep: between neighbouring x, the height is the distance of the lowest y so far to the bound."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    widths = np.diff(points[:, 0], append=bound[0])
    return float(widths @ (bound[1] - np.minimum.accumulate(points[:, 1])))


def _slices(points: Floats, bound: Floats) -> float:
    """3-d sweep: between neighbouring z, the section is the area of the points at or below that z."""
    points = points[np.argsort(points[:, 2], kind="stable")]
    depths = np.diff(points[:, 2], append=bound[2])
    sections = (_area(points[: i + 1, :2], bound[:2]) for i in range(len(points)))
    return float(sum(depth * section for depth, section in zip(depths, sections, strict=True)))
