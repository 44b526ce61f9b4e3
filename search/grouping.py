"""Which parameters stand for the level of which target: shared levels, or curves over the depth.

Levels are integers from 0 to the highest one, which is dense. A grouping turns parameters into the level of
every target, and tells which parameters come nearest to what the targets of some allocation store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.types import TargetSpec

Integers = NDArray[np.int64]


class Grouping(Protocol):
    """Level parameters by name, and the one mapping between them and the levels of targets."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the model's order."""

    def levels(self, params: Mapping[str, int]) -> dict[str, int]:
        """The level of every target."""

    def nearest(self, sizes: Mapping[str, Integers], stored: Mapping[str, int]) -> dict[str, int]:
        """The parameters nearest to an allocation in which each target has `stored` parameters; `sizes`
        (levels + 1,) are those of a target at each level."""


class Shared:
    """Targets that share a group share one level: each `target`, each `block`, or each `module` type in each
    of its depth's segments."""

    def __init__(self, targets: Sequence[TargetSpec], group: str, segments: int) -> None:
        depth = 1 + max(target.block for target in targets)
        self._group_of = {
            target.name: _group(target, group, min(segments, depth), depth) for target in targets
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._group_of.values()))

    def group_of(self, target: TargetSpec) -> str:
        """The parameter that is a target's level."""
        return self._group_of[target.name]

    def levels(self, params: Mapping[str, int]) -> dict[str, int]:
        return {name: params[group] for name, group in self._group_of.items()}

    def nearest(self, sizes: Mapping[str, Integers], stored: Mapping[str, int]) -> dict[str, int]:
        """Nearest in the sum of a group's parameters; of two as near the higher level."""
        gaps: dict[str, Integers] = {}
        for name, group in self._group_of.items():
            gaps[group] = gaps.get(group, np.int64(0)) + sizes[name] - stored[name]
        return {group: _last_least(np.abs(gap)) for group, gap in gaps.items()}


def _group(target: TargetSpec, group: str, segments: int, depth: int) -> str:
    if group == "target":
        return target.name
    if group == "block":
        return f"block.{target.block}"
    if segments == 1:
        return target.module
    return f"{target.module}/{target.block * segments // depth + 1}of{segments}"


class Curves:
    """Each module type has a curve over the depth: a level at each of its knots, and between two knots the
    straight line through them, rounded to a level. Parameters are `<module>@<block>`.

    Knots are at blocks that have the module, its first and its last one among them, evenly spread in their
    order; a module type in fewer blocks than there are knots has one in each. A single knot is a constant.
    """

    def __init__(self, targets: Sequence[TargetSpec], knots: int) -> None:
        blocks: dict[str, dict[int, list[str]]] = {}
        for target in targets:
            blocks.setdefault(target.module, {}).setdefault(target.block, []).append(target.name)
        self._curves = {module: _Curve(module, found, knots) for module, found in blocks.items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for curve in self._curves.values() for name in curve.names)

    def levels(self, params: Mapping[str, int]) -> dict[str, int]:
        return {name: level for curve in self._curves.values() for name, level in curve.levels(params)}

    def nearest(self, sizes: Mapping[str, Integers], stored: Mapping[str, int]) -> dict[str, int]:
        """Nearest in the sum over targets of |parameters at the level - `stored`|, module type by module
        type: least over all levels of all knots."""
        return {
            name: level for curve in self._curves.values() for name, level in curve.nearest(sizes, stored)
        }


class _Curve:
    """The curve of one module type; `targets` are those of each of its blocks."""

    def __init__(self, module: str, targets: Mapping[int, Sequence[str]], knots: int) -> None:
        self._targets = {block: targets[block] for block in sorted(targets)}
        blocks = list(self._targets)
        count = min(knots, len(blocks))
        steps = range(count)
        places = [0] if count == 1 else [step * (len(blocks) - 1) // (count - 1) for step in steps]
        self._knots = [blocks[place] for place in places]
        self.names = tuple(f"{module}@{block}" for block in self._knots)

    def levels(self, params: Mapping[str, int]) -> list[tuple[str, int]]:
        at_knots = [params[name] for name in self.names]
        found = []
        for block, targets in self._targets.items():
            index, here = self._segment(block)
            after = min(index + 1, len(at_knots) - 1)
            level = int(interpolated(at_knots[index], at_knots[after], *here))
            found += [(name, level) for name in targets]
        return found

    def _segment(self, block: int) -> tuple[int, tuple[int, int]]:
        """The knot at or before a block, and how far the block is from it towards the next: (steps, of)."""
        index = max(i for i, knot in enumerate(self._knots) if knot <= block)
        if index == len(self._knots) - 1:
            return index, (0, 1)
        return index, (block - self._knots[index], self._knots[index + 1] - self._knots[index])

    def nearest(self, sizes: Mapping[str, Integers], stored: Mapping[str, int]) -> list[tuple[str, int]]:
        """By dynamic programming from knot to knot: a block depends on the knots at its two sides alone."""
        costs = {
            block: np.sum([np.abs(sizes[name] - stored[name]) for name in targets], axis=0)
            for block, targets in self._targets.items()
        }
        if len(self._knots) == 1:
            return [(self.names[0], _last_least(np.sum(list(costs.values()), axis=0)))]
        level = np.arange(len(costs[self._knots[0]]))
        total, before = costs[self._knots[0]], []
        for left, right in pairwise(self._knots):
            # between[a, b]: what the blocks past `left` cost, up to `right`, with level a there and b here
            between = total[:, None] + costs[right][None, :]
            for block in (block for block in costs if left < block < right):
                between = (
                    between
                    + costs[block][interpolated(level[:, None], level[None, :], block - left, right - left)]
                )
            before.append(len(level) - 1 - np.argmin(between[::-1], axis=0))  # of equal ones the highest
            total = between.min(axis=0)
        chosen = [_last_least(total)]
        for choice in reversed(before):
            chosen.append(int(choice[chosen[-1]]))
        return list(zip(self.names, reversed(chosen), strict=True))


def interpolated(left: Integers | int, right: Integers | int, steps: int, of: int) -> Integers | int:
    """The level `steps` of `of` blocks from `left` towards `right`, rounded half up, in integers."""
    return (2 * (left * (of - steps) + right * steps) + of) // (2 * of)


def _last_least(costs: Integers) -> int:
    """The highest level of least cost."""
    return int(len(costs) - 1 - np.argmin(costs[::-1]))
