"""Which size the next proposal aims at: a sequence that covers a range evenly, and what a size promises.

Everything is in stored parameters and in one loss, both minimised; the staircase is what finished trials
leave attainable at each size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# The range of sizes is cut into so many parts, taken in turn; within its part a proposal aims where most is
# to be gained. One part alone may leave sizes unvisited for long; four gave less hypervolume at 100 trials.
PARTS = 2
# Candidate sizes within a part.
CANDIDATES = 24
# A size is drawn with its expected gain to this power: near the best, but not the same for trials in flight.
SHARPNESS = 3.0


def van_der_corput(number: int) -> float:
    """The number's binary digits mirrored at the point: in [0, 1), every prefix spread evenly."""
    value, digit = 0.0, 0.5
    while number:
        value += digit * (number & 1)
        number, digit = number >> 1, digit / 2
    return value


def part_of(number: int, low: float, high: float) -> Floats:
    """Sizes (CANDIDATES,) a trial of this number may aim at: of the part of [low, high] whose turn it is."""
    part = int(van_der_corput(number % PARTS) * PARTS)
    width = (high - low) / PARTS
    begin = low + part * width
    return np.asarray(begin + width * (np.arange(CANDIDATES) + van_der_corput(number)) / CANDIDATES)


def staircase(sizes: Integers, losses: Floats) -> NDArray[np.intp]:
    """Indices of the points (n,) that none equals or beats in size and loss, by size; of equals the first."""
    order = np.lexsort((losses, sizes))
    best = np.minimum.accumulate(losses[order])
    return np.asarray(order[np.append(True, best[1:] < best[:-1])[: len(order)]], dtype=np.intp)


def expected_gains(
    sizes: Floats, losses: Floats, steps: tuple[Integers, Floats], worst: float, dense: int
) -> Floats:
    """Area (c,) that a point of each size and loss would add below a staircase.

    `steps` are the sizes and losses of the staircase's members; below the smallest of them the loss is
    `worst`, and nothing counts beyond `dense`.
    """
    begins = np.append(-np.inf, steps[0])
    ends = np.append(steps[0], dense)
    heights = np.append(worst, steps[1])
    widths = np.maximum(ends - np.maximum(begins, sizes[:, None]), 0.0)
    return np.asarray((widths * np.maximum(heights - losses[:, None], 0.0)).sum(axis=1))


def draw(gains: Floats, rng: np.random.RandomState) -> int:
    """An index, near the largest gain; any where nothing is to be gained."""
    if gains.max() <= 0:
        return int(rng.randint(len(gains)))
    weights = (gains / gains.max()) ** SHARPNESS
    return int(rng.choice(len(gains), p=weights / weights.sum()))
