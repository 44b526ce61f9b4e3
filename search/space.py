"""Search spaces: Optuna parameters <-> allocations, one mapping for every space.

Targets that share a group share one integer parameter, the level. Level L (the highest) is dense;
level l < L keeps the share floor + (1 - floor) l / L of each target's parameters: equal steps of
parameters, not of rank.

Where the search may choose between methods, targets of one module type share one categorical
parameter more, `method/<module>`: the method their ranks are cut by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from actors.types import Allocation, FactorSpec, RankfrontError, TargetSpec
from search.cost import CostModel

Params = dict[str, int | str]
"""A level for each group and, where methods are chosen, a method for each module type."""


class Space:
    """One study's space. `group` is target, module or block; see `SpaceSection`.

    `factors` name the configured method of each target and the methods to choose from, which must
    hold every configured one.
    """

    def __init__(
        self, cost: CostModel, factors: FactorSpec, group: str, segments: int, levels: int, floor: float
    ) -> None:
        self._cost, self._levels, self._floor = cost, levels, floor
        depth = 1 + max(target.block for target in cost.targets)
        self._group_of = {
            target.name: _group(target, group, min(segments, depth), depth) for target in cost.targets
        }
        self._methods = factors.choices
        self._configured = {target.name: factors.method_of(target.name) for target in cost.targets}

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Levels of each group, then the methods of each module type, in the model's order."""
        found: dict[str, BaseDistribution] = {
            name: IntDistribution(0, self._levels) for name in self.level_names
        }
        if self._methods:
            for target in self._cost.targets:
                found.setdefault(_method_parameter(target), CategoricalDistribution(self._methods))
        return found

    @cached_property
    def level_names(self) -> tuple[str, ...]:
        """Names of the parameters that are levels."""
        return tuple(dict.fromkeys(self._group_of.values()))

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The methods of each parameter that is a choice between them."""
        return {name: self._methods for name in self.distributions if name not in self.level_names}

    def group_of(self, target: TargetSpec) -> str:
        """The parameter that is a target's level."""
        return self._group_of[target.name]

    def ranks_of(self, target: TargetSpec) -> list[int | None]:
        """A target's rank at each level; the last is dense."""
        return self._ranks[target.name]

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
        """Raise RankfrontError for the first parameter whose value is not of this space.

        Parameters that are not given and names that are no parameter are passed over.
        """
        for name, distribution in self.distributions.items():
            if name not in params:
                continue
            value = params[name]
            if isinstance(distribution, CategoricalDistribution):
                if value not in self._methods:
                    raise RankfrontError(
                        f"params.{name}: method {value!r} is not one of {', '.join(self._methods)}"
                    )
            elif not isinstance(value, int) or not 0 <= value <= self._levels:
                raise RankfrontError(f"params.{name}: level {value!r} is not an integer in 0..{self._levels}")

    def allocation(self, params: Mapping[str, int | str]) -> Allocation:
        """The allocation of a full set of parameters.

        It names a method only where it differs from the configured one, and none for a target that
        stays dense: equal models are equal allocations.

        Raises:
            RankfrontError: a parameter that is missing, or whose value is not of this space.
        """
        self.check(dict.fromkeys(self.distributions) | dict(params))
        ranks = tuple(
            (target.name, self._ranks[target.name][int(params[self._group_of[target.name]])])
            for target in self._cost.targets
        )
        if not self._methods:
            return Allocation(ranks)
        chosen = {target.name: str(params[_method_parameter(target)]) for target in self._cost.targets}
        methods = tuple(
            (name, chosen[name])
            for name, rank in ranks
            if rank is not None and chosen[name] != self._configured[name]
        )
        return Allocation(ranks, methods)

    def params(self, allocation: Allocation) -> Params:
        """The parameters that come nearest to an allocation.

        Exact (`space.allocation(space.params(a)) == a`) for every allocation of the space; for any
        other one the sampler is told the nearest values while the trial scores the true allocation.
        Levels are nearest in stored parameters, group by group. A module type's method is the one most
        of its compressed targets are cut by, on a tie the one the earliest of them is; where all are
        dense, the configured method of its first target.
        """
        return {**self._nearest_levels(allocation), **self._usual_methods(allocation)}

    def _nearest_levels(self, allocation: Allocation) -> dict[str, int]:
        stored = dict.fromkeys(self.level_names, 0)
        at_level = {name: [0] * (self._levels + 1) for name in self.level_names}
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

    def _usual_methods(self, allocation: Allocation) -> dict[str, str]:
        if not self._methods:
            return {}
        ranks, used = allocation.to_dict(), {**self._configured, **dict(allocation.methods)}
        where_dense: dict[str, str] = {}
        counts: dict[str, Counter[str]] = {}
        for target in self._cost.targets:
            name = _method_parameter(target)
            where_dense.setdefault(name, self._configured[target.name])
            if ranks[target.name] is not None:
                counts.setdefault(name, Counter())[used[target.name]] += 1
        most = {name: count.most_common(1)[0][0] for name, count in counts.items()}
        return {**where_dense, **most}

    def _stored(self, target: TargetSpec, rank: int | None) -> int:
        return target.parameters if rank is None else self._cost.compressed(target, rank)


def _method_parameter(target: TargetSpec) -> str:
    return f"method/{target.module}"


def _group(target: TargetSpec, group: str, segments: int, depth: int) -> str:
    if group == "target":
        return target.name
    if group == "block":
        return f"block.{target.block}"
    if segments == 1:
        return target.module
    return f"{target.module}/{target.block * segments // depth + 1}of{segments}"
