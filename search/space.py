"""Search spaces: Optuna parameters <-> allocations, one mapping for every space.

Targets that share a group share one integer parameter, the level. Level L (the highest) is dense;
level l < L keeps the share floor + (1 - floor) l / L of each target's parameters: equal steps of
parameters, not of rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from optuna.distributions import BaseDistribution, IntDistribution

from actors.types import Allocation, RankfrontError, TargetSpec
from search.cost import CostModel


class Space:
    """One study's space. `group` is target, module or block; see `SpaceSection`."""

    def __init__(self, cost: CostModel, group: str, segments: int, levels: int, floor: float) -> None:
        self._cost, self._levels, self._floor = cost, levels, floor
        depth = 1 + max(target.block for target in cost.targets)
        self._group_of = {
            target.name: _group(target, group, min(segments, depth), depth) for target in cost.targets
        }

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """One integer distribution of levels for each group, in the model's order."""
        names = dict.fromkeys(self._group_of.values())
        return {name: IntDistribution(0, self._levels) for name in names}

    @cached_property
    def _ranks(self) -> dict[str, list[int | None]]:
        """For each target the rank of each level."""
        steps = range(self._levels)
        shares = [self._floor + (1 - self._floor) * level / self._levels for level in steps]
        return {
            target.name: [*(self._cost.largest_rank(target, share) for share in shares), None]
            for target in self._cost.targets
        }

    def check(self, params: Mapping[str, object]) -> None:
        """Raise RankfrontError for the first level that is no integer in 0..L; other names are ignored."""
        for name in self.distributions:
            level = params.get(name, 0)
            if not isinstance(level, int) or not 0 <= level <= self._levels:
                raise RankfrontError(f"params.{name}: level {level!r} is not an integer in 0..{self._levels}")

    def allocation(self, params: Mapping[str, int]) -> Allocation:
        """The allocation of a full set of levels.

        Raises:
            RankfrontError: a group without a level, or a level outside 0..L.
        """
        self.check(dict.fromkeys(self.distributions) | dict(params))
        return Allocation(
            tuple((t.name, self._ranks[t.name][params[self._group_of[t.name]]]) for t in self._cost.targets)
        )

    def params(self, allocation: Allocation) -> dict[str, int]:
        """The levels whose stored parameters come nearest to the allocation's, group by group.

        Exact (`space.allocation(space.params(a)) == a`) for every allocation of the space; for any
        other one the sampler is told the nearest levels while the trial scores the true ranks.
        """
        stored = dict.fromkeys(self.distributions, 0)
        at_level = {name: [0] * (self._levels + 1) for name in self.distributions}
        ranks = allocation.to_dict()
        for target in self._cost.targets:
            group = self._group_of[target.name]
            stored[group] += self._stored(target, ranks[target.name])
            for level, rank in enumerate(self._ranks[target.name]):
                at_level[group][level] += self._stored(target, rank)
        return {
            name: min(range(self._levels + 1), key=lambda level: (abs(sizes[level] - stored[name]), -level))
            for name, sizes in at_level.items()
        }

    def _stored(self, target: TargetSpec, rank: int | None) -> int:
        return target.parameters if rank is None else self._cost.compressed(target, rank)


def _group(target: TargetSpec, group: str, segments: int, depth: int) -> str:
    if group == "target":
        return target.name
    if group == "block":
        return f"block.{target.block}"
    if segments == 1:
        return target.module
    return f"{target.module}/{target.block * segments // depth + 1}of{segments}"
