"""Search spaces: Optuna parameters <-> allocations, one mapping for every space.

Every target has a level: that of its group, or of its module type's curve (`search.grouping`). Level L (the
highest) is dense; level l < L keeps the share floor + (1 - floor) l / L of each target's parameters: equal
steps of parameters, not of rank. A target that even rank 1 stores no smaller is dense at every level.

Where the search may choose between methods, targets of one module type share one categorical
parameter more, `method/<module>`: the method their ranks are cut by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
    check_distribution_compatibility,
)

from actors.types import Allocation, FactorSpec, RankfrontError, TargetSpec
from search.cost import CostModel
from search.grouping import Curves, Grouping, Shared
from search.sections import KNOTS

Params = dict[str, int | str]
"""A level for each group or knot and, where methods are chosen, a method for each module type."""


class Space:
    """One study's space. `group` is target, module, block or curve; see `SpaceSection`.

    `factors` name the configured method of each target and the methods to choose from, which must
    hold every configured one.
    """

    def __init__(
        self,
        cost: CostModel,
        factors: FactorSpec,
        group: str,
        segments: int,
        levels: int,
        floor: float,
        knots: int = KNOTS,
    ) -> None:
        self._cost, self._levels, self._floor = cost, levels, floor
        targets = cost.targets
        self._grouping: Grouping = (
            Curves(targets, knots) if group == "curve" else Shared(targets, group, segments)
        )
        self._methods = factors.choices
        self._configured = {target.name: factors.method_of(target.name) for target in cost.targets}

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Levels of each group or knot, then the methods of each module type, in the model's order."""
        # One for all of them, which storages write out and compare.
        levels = IntDistribution(0, self._levels)
        found: dict[str, BaseDistribution] = dict.fromkeys(self._grouping.names, levels)
        if self._methods:
            for target in self._cost.targets:
                found.setdefault(_method_parameter(target), CategoricalDistribution(self._methods))
        return found

    @cached_property
    def level_names(self) -> tuple[str, ...]:
        """Names of the parameters that are levels."""
        return self._grouping.names

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The methods of each parameter that is a choice between them."""
        return {name: self._methods for name in self.distributions if name not in self.level_names}

    def group_of(self, target: TargetSpec) -> str:
        """The parameter that is a target's level; on a curve no single one is."""
        assert isinstance(self._grouping, Shared), "a curve has no groups"
        return self._grouping.group_of(target)

    def ranks_of(self, target: TargetSpec) -> list[int | None]:
        """A target's rank at each level; the last is dense."""
        return self._ranks[target.name]

    @cached_property
    def _ranks(self) -> dict[str, list[int | None]]:
        """For each target the rank of each level."""
        steps = range(self._levels)
        shares = [self._floor + (1 - self._floor) * level / self._levels for level in steps]
        return {
            target.name: [*(self._rank(target, share) for share in shares), None]
            for target in self._cost.targets
        }

    def _rank(self, target: TargetSpec, share: float) -> int | None:
        """The largest rank that keeps `share` of a target's parameters, at least 1; None (dense) where that
        saves none: levels are told apart by what they store, and a larger model than dense is none to try."""
        rank = self._cost.largest_rank(target, share)
        return rank if rank is not None and self._stored(target, rank) < target.parameters else None

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

    def check_distributions(self, distributions: Mapping[str, BaseDistribution]) -> None:
        """Raise RankfrontError for the first distribution that Optuna holds for of another kind than ours.

        Such a trial cannot be asked for in this space, whatever its values: a level that is a choice, or a
        method whose choices are others or in another order. Names that are no parameter are passed over.
        """
        for name, ours in self.distributions.items():
            if name not in distributions:
                continue
            try:
                check_distribution_compatibility(distributions[name], ours)
            except ValueError as error:
                raise RankfrontError(
                    f"params.{name}: {distributions[name]} is not {ours}: {error}"
                ) from error

    def allocation(self, params: Mapping[str, int | str]) -> Allocation:
        """The allocation of a full set of parameters.

        It names a method only where it differs from the configured one, and none for a target that
        stays dense: equal models are equal allocations.

        Raises:
            RankfrontError: a parameter that is missing, or whose value is not of this space.
        """
        self.check(dict.fromkeys(self.distributions) | dict(params))
        levels = self._grouping.levels({name: int(params[name]) for name in self._grouping.names})
        ranks = tuple(
            (target.name, self._ranks[target.name][levels[target.name]]) for target in self._cost.targets
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
        Levels are nearest in stored parameters, as the grouping defines it. A module type's method is the
        one most of its compressed targets are cut by, on a tie the one the earliest of them is; where all
        are dense, the configured method of its first target.
        """
        return {**self._nearest_levels(allocation), **self._usual_methods(allocation)}

    @cached_property
    def _sizes(self) -> dict[str, NDArray[np.int64]]:
        """For each target its stored parameters at each level."""
        return {
            target.name: np.array([self._stored(target, rank) for rank in self._ranks[target.name]])
            for target in self._cost.targets
        }

    def _nearest_levels(self, allocation: Allocation) -> dict[str, int]:
        ranks = allocation.to_dict()
        stored = {target.name: self._stored(target, ranks[target.name]) for target in self._cost.targets}
        return self._grouping.nearest(self._sizes, stored)

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
