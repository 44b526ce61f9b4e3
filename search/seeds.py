"""Seeds: allocations of equal marginal loss per parameter, worked out before anything is scored.

For each budget of a ladder, the ranks that minimise the sum of the targets' losses, each target's loss taken
alone, with stored parameters at most the budget's share of the targets' dense ones (as `references.uniform`
counts). Losses are those the factors predict, or those `rankfront sensitivity` measured. Both are of
single targets: what layers do to each other is left to the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from actors.types import Allocation, FactorSpec, RankfrontError, TargetSpec
from search.alone import FILE, Log, cells
from search.cost import CostModel
from search.sections import SeedSection
from search.spectra import losses

ORIGIN = "seed"
DENSE = 0
"""Stands for no rank in arrays of ranks."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What one target may be stored as: `ranks` (c,), their sizes, strictly rising, and losses.

    Sizes are stored parameters. The last is dense (rank DENSE), at loss 0, which is the least. `corners`
    (h,) index the lower convex hull of (sizes, losses), both ends included.
    """

    ranks: NDArray[np.int64]
    sizes: NDArray[np.int64]
    losses: Floats
    corners: NDArray[np.intp]


def curves_of(
    cost: CostModel,
    floor: float,
    losses_at: Callable[[TargetSpec], Floats],
    broken: Mapping[str, int] = MappingProxyType({}),
) -> list[Curve]:
    """Every target's curve; `losses_at` gives its loss (k,), nats/token, at each rank 1..k.

    `broken` has, by target, the rank at which, and below which, it is not to be stored.
    """
    sizes: dict[tuple[int, int, bool], NDArray[np.int64]] = {}
    found = []
    for target in cost.targets:
        shape = target.rows, target.cols, target.bias
        if shape not in sizes:
            sizes[shape] = _stored(cost, target)
        lowest = max(cost.largest_rank(target, floor) or target.full_rank, broken.get(target.name, 0) + 1)
        found.append(_curve(target, lowest, sizes[shape], losses_at(target)))
    return found


def _curve(target: TargetSpec, lowest: int, stored: NDArray[np.int64], loss: Floats) -> Curve:
    """From `stored` parameters and `loss` (k,) at each rank, those of rank `lowest` and above, and dense."""
    # Dense first: a full rank that stores as much and loses as little is no gain, and not the model's own.
    ranks = np.append(DENSE, np.arange(lowest, target.full_rank + 1))
    sizes = np.append(target.parameters, stored[lowest - 1 :])
    values = np.append(0.0, np.maximum(loss[lowest - 1 :], 0.0))
    order = np.lexsort((values, sizes))
    order = order[np.unique(sizes[order], return_index=True)[1]]  # of equal sizes the least loss
    order = order[sizes[order] <= target.parameters]
    sizes, values = sizes[order], values[order]
    return Curve(ranks[order], sizes, values, hull(sizes, values))


def hull(sizes: NDArray[np.int64], values: Floats) -> NDArray[np.intp]:
    """Indices of the corners of the lower convex hull of points (c,), sizes strictly rising.

    Its slopes are the isotonic regression of the points' slopes, weighted by their widths (the greatest
    convex minorant; Barlow et al., 1972): pooled blocks are its edges.
    """
    if len(sizes) == 1:
        return np.zeros(1, dtype=np.intp)
    widths = np.diff(sizes).astype(np.float64)
    return np.asarray(isotonic_regression(np.diff(values) / widths, weights=widths).blocks, dtype=np.intp)


def share_out(curves: Sequence[Curve], budgets: Iterable[int]) -> Iterator[list[int | None] | None]:
    """For each budget the rank of each target: least sum of losses with stored parameters at most that.

    Every edge of every hull is taken in the order of what it gains per parameter, up to the first that does
    not fit; its target then takes the best rank that does. Least for the hulls, so exact but for that one
    target. None where the lowest ranks alone store more.
    """
    lowest = sum(int(each.sizes[0]) for each in curves)
    widths = [np.diff(each.sizes[each.corners]) for each in curves]
    gains = [-np.diff(e.losses[e.corners]) / width for e, width in zip(curves, widths, strict=True)]
    # Along a straight part of a hull gains are equal up to rounding: edges are counted from the lowest one.
    gains = [np.minimum.accumulate(gain) for gain in gains]
    owner = np.repeat(np.arange(len(curves)), [len(width) for width in widths])
    order = np.argsort(-np.concatenate(gains), kind="stable")
    filled = np.cumsum(np.concatenate(widths)[order])
    for room in (budget - lowest for budget in budgets):
        if room < 0:
            yield None
            continue
        taken = int(np.searchsorted(filled, room, side="right"))
        edges = np.bincount(owner[order[:taken]], minlength=len(curves))
        at = [int(each.corners[count]) for each, count in zip(curves, edges, strict=True)]
        if taken < len(order):
            last = int(owner[order[taken]])
            left = room - (int(filled[taken - 1]) if taken else 0)
            sizes, values = curves[last].sizes, curves[last].losses
            fits = int(np.searchsorted(sizes, sizes[at[last]] + left, side="right"))
            at[last] = int(np.argmin(values[:fits]))
        chosen = (int(each.ranks[index]) for each, index in zip(curves, at, strict=True))
        yield [None if rank == DENSE else rank for rank in chosen]


def tail_losses(loss: Floats) -> Floats:
    """Predicted loss (k,) at each rank 1..k, nats/token, from what each rank adds (k,)."""
    return np.append(np.cumsum(loss[:0:-1])[::-1], 0.0)


def measured_losses(cost: CostModel, target: TargetSpec, measured: Mapping[int, float]) -> Floats:
    """Loss (k,) at each rank 1..k from measured loss increases at some ranks, and 0 at dense.

    Noise is taken out first: no increase is negative, none falls as parameters do, and the greatest
    convex curve below them is kept. Between the points that are left a monotone cubic in stored parameters,
    below the lowest one the straight line through the lowest two.
    """
    points = {cost.compressed(target, rank): increase for rank, increase in measured.items()}
    sizes = np.array(sorted({*points, target.parameters}), dtype=np.int64)
    sizes = sizes[sizes <= target.parameters]
    values = np.array([points.get(int(size), 0.0) for size in sizes[:-1]] + [0.0])
    values = np.maximum.accumulate(np.maximum(values, 0.0)[::-1])[::-1]
    corners = hull(sizes, values)
    sizes, values = sizes[corners], values[corners]
    at = _stored(cost, target)
    if len(sizes) == 1:  # every measured rank stores as much as the dense target
        return np.zeros(len(at))
    inside = PchipInterpolator(sizes, values)(np.clip(at, sizes[0], sizes[-1]))
    slope = (values[1] - values[0]) / (sizes[1] - sizes[0])
    return np.asarray(inside + slope * np.minimum(at - sizes[0], 0), dtype=np.float64)


def predicted(cost: CostModel, floor: float, factors: FactorSpec, store: Path) -> list[Curve]:
    """Every target's curve from the predicted losses of its configured method.

    Methods are not chosen here: `curvature` minimises the prediction itself, and would always win.

    Raises:
        RankfrontError: the store cannot be read, or a target has no predicted loss.
    """
    known = losses(store)
    missing = [t.name for t in cost.targets if factors.method_of(t.name) not in known.get(t.name, {})]
    if missing:
        raise RankfrontError(
            f"{len(missing)} of {len(cost.targets)} targets have no predicted loss ({missing[0]} is the "
            "first): the factors were built without its gradients, by methods that need none or by an "
            f"earlier version; without the folder {store} they are built anew"
        )
    return curves_of(
        cost, floor, lambda target: tail_losses(known[target.name][factors.method_of(target.name)])
    )


def measured(cost: CostModel, floor: float, shares: Iterable[float], log: Log) -> list[Curve]:
    """Every target's curve from its measured loss increases at `shares`.

    Where a target alone broke the model, no curve goes down to that rank; one that always did stays dense.

    Raises:
        RankfrontError: the dense model or a target has no measured loss.
    """
    dense = log.score(Allocation.dense(cost.targets).key)
    if dense is None:
        raise RankfrontError(f"{FILE} holds no score of the dense model for these factors and this split")
    increases: dict[str, dict[int, float]] = {target.name: {} for target in cost.targets}
    broken: dict[str, int] = {}
    for cell in cells(cost, shares):
        name, score = cell.target.name, log.score(cell.key)
        if score is not None and cell.rank is not None:
            increases[name][cell.rank] = score.text.nll - dense.text.nll
        elif cell.rank is not None and log.broken(cell.key):
            broken[name] = max(broken.get(name, 0), cell.rank)
    for target in cost.targets:
        if target.name in broken and not increases[target.name]:
            broken[target.name] = target.full_rank
    missing = [name for name, points in increases.items() if not points and name not in broken]
    if missing:
        raise RankfrontError(
            f"{len(missing)} of {len(increases)} targets have no measured loss ({missing[0]} is the first); "
            "`rankfront sensitivity` goes on with them"
        )
    return curves_of(
        cost, floor, lambda target: measured_losses(cost, target, increases[target.name]), broken
    )


def ladder(cost: CostModel, curves: Sequence[Curve], budgets: Iterable[float]) -> Iterator[Allocation | None]:
    """An allocation for each linear budget; None where the lowest ranks of the curves store more."""
    names = [target.name for target in cost.targets]
    for ranks in share_out(curves, (int(budget * cost.linear_parameters) for budget in budgets)):
        yield None if ranks is None else Allocation(tuple(zip(names, ranks, strict=True)))


def seed_allocations(
    section: SeedSection,
    cost: CostModel,
    floor: float,
    factors: FactorSpec,
    store: Path,
    log: Log | None,
    shares: Iterable[float],
    say: Callable[[str], None],
) -> Iterator[tuple[Allocation, str]]:
    """(allocation, origin) pairs: the ladder from the spectra, then the one from measured losses, if any.

    A ladder that cannot be worked out, and a budget below the floor, are left out and said.
    """
    sources: list[tuple[str, tuple[float, ...], Callable[[], list[Curve]]]] = [
        ("spectra", section.spectra, lambda: predicted(cost, floor, factors, store))
    ]
    if log is not None:
        sources.append(("sensitivity", section.sensitivity, lambda: measured(cost, floor, shares, log)))
    for name, budgets, curves in sources:
        if not budgets:
            continue
        try:
            found = curves()
        except RankfrontError as error:
            say(f"seeds.{name}: none; {error}")
            continue
        for budget, allocation in zip(budgets, ladder(cost, found, budgets), strict=True):
            if allocation is None:
                more = ", and what broke the model alone, keep" if name == "sensitivity" else " keeps"
                say(f"seeds.{name}: none at {budget:g}; space.floor {floor:g}{more} more than that")
            else:
                yield allocation, ORIGIN


def _stored(cost: CostModel, target: TargetSpec) -> NDArray[np.int64]:
    """Stored parameters (k,) at each rank 1..k."""
    ranks = range(1, target.full_rank + 1)
    return np.array([cost.compressed(target, rank) for rank in ranks], dtype=np.int64)
