"""Which sizes a proposal of `exchange` may aim at, by bounds on them and by what became of smaller trials.

A size is stored parameters of all targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

# How far below the smallest trial that keeps to the constraints another may, as a share of the dense size,
# before any in there was tried in vain.
BEYOND = 0.05


@dataclass(frozen=True)
class Reach:
    """From `low` to `high`; a size that models are to be chosen at may be below `low`, but not `limit`."""

    low: int
    high: int
    limit: int


def reach(
    smallest: int, told: int, of_use: int, most: int, dense: int, kept: Integers, broken: Integers
) -> Reach:
    """The sizes worth aiming at.

    Between `smallest` and `dense`, which are those of the space, they begin at `of_use` and end at `most`,
    what the bounds on costs allow. Where the two leave less than a strip, the strip below `most` is it, down
    to what the config names as the smallest of interest (`told`, 0 for none), if the bounds allow that.

    `kept` are sizes of trials that keep to the constraints, or violate them least, `broken` those of trials
    that violate them more or have no score. Where some below all of `kept` broke, a strip below these is
    left: the narrower, the more did in it. What breaks a model is a matter of more than its size, so another
    may be found there; but as nothing is known there it promises most, and every other proposal would go
    there for ever.
    """
    width = round(BEYOND * dense)
    limit = smallest
    least = int(kept.min(initial=dense))
    below = broken[broken < least]
    if len(kept) and len(below):
        tried = np.count_nonzero(below >= least - width)
        limit = max(limit, least - round(width / (1 + tried)))
    low = max(of_use, limit)
    if most < dense:
        low = min(low, max(smallest, told if told < most else 0, most - width))
    return Reach(low, min(dense, most if most > low else low + width), limit)
