"""Trades of parameters between the levels of a space: take where little is lost, give where much is gained.

Every level parameter has a curve of predicted loss over stored size; the edges of its lower convex hull are
the steps that can be traded. A multiplier for each parameter scales its curve: a step is worth multiplier x
loss saved / parameters spent, and equal worth at the margin is the best that an additive loss allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.seeds import hull

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """The e steps of p parameters, those of a parameter together and from its lowest level up.

    Step j takes parameter `owner[j]` from level `low[j]` to `high[j]`, stores `width[j]` > 0 more and is
    predicted to save `gain[j]` >= 0; `gain / width` falls along a parameter's steps, up to rounding. `sizes`
    (p, L + 1) are those of every level, `corner` (p, L + 1) the nearest level, in size, that is the end of a
    step; `lowest` (p,) are the levels below all steps.
    """

    owner: Integers
    low: Integers
    high: Integers
    width: Integers
    gain: Floats
    sizes: Integers
    corner: Integers
    lowest: Integers

    @classmethod
    def of(cls, sizes: Integers, losses: Floats) -> Steps:
        """From sizes and losses (p, L + 1) of every level; one that stores more than dense is never used."""
        owner, low, high, corner, lowest = [], [], [], [], []
        for index, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            order = np.lexsort((loss, size))
            order = order[np.unique(size[order], return_index=True)[1]]  # of equal sizes the least loss
            order = order[size[order] <= size[-1]]
            corners = order[hull(size[order], loss[order])]
            owner.append(np.full(len(corners) - 1, index))
            low.append(corners[:-1])
            high.append(corners[1:])
            lowest.append(corners[0])
            corner.append(corners[np.abs(size[:, None] - size[corners]).argmin(axis=1)])
        owners, lows, highs = (np.concatenate(part).astype(np.int64) for part in (owner, low, high))
        width = sizes[owners, highs] - sizes[owners, lows]
        gain = np.maximum(losses[owners, lows] - losses[owners, highs], 0.0)
        return cls(
            owners, lows, highs, width, gain, sizes, np.array(corner, np.int64), np.array(lowest, np.int64)
        )

    def size(self, levels: Integers) -> int:
        return int(self.sizes[np.arange(len(levels)), levels].sum())

    @cached_property
    def _place(self) -> Integers:
        """Of each step (e,) how many of its parameter's are below it."""
        return np.arange(len(self.owner)) - np.searchsorted(self.owner, self.owner)

    def _worth(self, multipliers: Floats) -> Floats:
        """What each step (e,) saves for a parameter spent; along a parameter's steps it never rises.

        Along a straight part of a curve it is one number up to rounding. Were an upper step worth a last
        digit more, it could be taken without the one below it, whose width would be left out.
        """
        worth = multipliers[self.owner] * self.gain / self.width
        if not ((worth[1:] > worth[:-1]) & (self.owner[1:] == self.owner[:-1])).any():
            return worth  # as of all curves that are bent throughout
        table = np.full((len(self.lowest), self._place.max(initial=0) + 1), -np.inf)
        table[self.owner, self._place] = worth
        return np.asarray(np.minimum.accumulate(table, axis=1)[self.owner, self._place])

    def fill(self, multipliers: Floats, room: float) -> Integers:
        """Levels (p,) of least multiplied loss that store at most `room`, short of it by less than a step."""
        return self.grow(self.lowest, multipliers, room)

    def grow(self, levels: Integers, multipliers: Floats, room: float) -> Integers:
        """Take the steps above `levels` (corners), those worth most first, to the first that does not fit."""
        above = np.flatnonzero(self.low >= levels[self.owner])
        # Stable, so that of a parameter's steps of equal worth the lower one comes first.
        above = above[np.argsort(-self._worth(multipliers)[above], kind="stable")]
        taken = above[np.cumsum(self.width[above]) <= room - self.size(levels)]
        grown = levels.copy()
        np.maximum.at(grown, self.owner[taken], self.high[taken])
        return grown

    def shrink(self, levels: Integers, multipliers: Floats, room: float) -> Integers:
        """Undo the steps below `levels` (corners), the least worth first, until at most `room` is stored."""
        excess = self.size(levels) - room
        if excess <= 0:
            return levels
        below = np.flatnonzero(self.high <= levels[self.owner])
        worth = self._worth(multipliers)[below]
        # Backwards, so that of a parameter's steps of equal worth the upper one goes first.
        below = below[::-1][np.argsort(worth[::-1], kind="stable")]
        count = int(np.searchsorted(np.cumsum(self.width[below]), excess)) + 1
        undone = below[:count]
        shrunk = levels.copy()
        np.minimum.at(shrunk, self.owner[undone], self.low[undone])
        return shrunk

    def restore(self, levels: Integers, multipliers: Floats, room: float) -> Integers:
        """Any levels, brought to `room`: shrunk to it or grown up to it, by less than a step."""
        corners = self.corner[np.arange(len(levels)), levels]
        return self.grow(self.shrink(corners, multipliers, room), multipliers, room)

    def frontier(self, multipliers: Floats, losses: Floats) -> tuple[Integers, Floats]:
        """Sizes and multiplied losses (e + 1,) of `fill` at every room; `losses` (p,) are `lowest`'s."""
        order = np.argsort(-self._worth(multipliers), kind="stable")
        saved = (multipliers[self.owner] * self.gain)[order]
        sizes = self.size(self.lowest) + np.append(0, np.cumsum(self.width[order]))
        return sizes, float(multipliers @ losses) - np.append(0.0, np.cumsum(saved))
