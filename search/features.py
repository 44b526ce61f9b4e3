"""What trials are told apart by when losses are learned: shares of parameters, kinds and choices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from search.landscape import Landscape

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Features:
    """`alike` (p, a) has a column for all parameters together, for each alone, and one for each module type
    and block (the share of its targets in a parameter); `kinds` (p, k) are those of module types. `choices`
    are the numbers of choices of each method parameter, whose module types are the first of `kinds`."""

    alike: Floats
    kinds: Floats
    choices: tuple[int, ...]

    @classmethod
    def of(cls, landscape: Landscape) -> Features:
        p = len(landscape.names)
        kinds, blocks = (
            _shares(landscape.owner, labels, p) for labels in (landscape.kinds, landscape.blocks)
        )
        # A column for each parameter says as much as one for each parameter's own kind.
        parts = [np.ones((p, 1)), np.eye(p), *(part for part in (kinds, blocks) if 1 < part.shape[1] < p)]
        choices = tuple(len(names) for names in landscape.methods.values())
        return cls(np.concatenate(parts, axis=1) / np.sqrt(len(parts)), kinds, choices)

    def of_trials(self, predicted: Floats, methods: Integers) -> Floats:
        """Features (n, q) of predicted losses (n, p), no row all 0, and of method indices (n, c).

        Those of a method's choice are the share of the loss that it was made for.
        """
        shares = predicted / predicted.sum(axis=1, keepdims=True)
        chosen = [
            shares @ self.kinds[:, index] * (methods[:, index] == choice)
            for index, count in enumerate(self.choices)
            for choice in range(count)
        ]
        return np.concatenate([shares @ self.alike, *(column[:, None] for column in chosen)], axis=1)

    def multipliers(self, coefficients: Floats) -> Floats:
        """What each parameter's predicted loss is multiplied by (p,)."""
        return np.asarray(1 + self.alike @ coefficients[: self.alike.shape[1]], dtype=np.float64)

    def methods(self, coefficients: Floats) -> Integers:
        """The choice (c,) of least loss for each method parameter."""
        ends = self.alike.shape[1] + np.cumsum([0, *self.choices])
        least = [int(np.argmin(coefficients[a:b])) for a, b in pairwise(ends)]
        return np.array(least, dtype=np.int64)


def _shares(owner: Integers, labels: Integers, parameters: int) -> Floats:
    """The share (p, k) of a parameter's targets that bear each label."""
    counts = np.zeros((parameters, int(labels.max()) + 1))
    np.add.at(counts, (owner, labels), 1.0)
    return np.asarray(counts / counts.sum(axis=1, keepdims=True), dtype=np.float64)
