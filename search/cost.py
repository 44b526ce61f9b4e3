"""Parameters, bytes and multiply-accumulates of an allocation, in exact integers, as they are stored.

What one target holds at a rank is decided in `actors.storage`, by which the export stores it too.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from actors.storage import ITEMSIZE, Stored, stored_target
from actors.types import Allocation, Operations, TargetSpec


@dataclass(frozen=True)
class _Table:
    """A target at each of its ranks 1..k, and for each rank the fewest parameters from there upwards."""

    stored: tuple[Stored, ...]
    fewest: tuple[int, ...]


@dataclass(frozen=True)
class CostModel:
    """Counts for one model, one `storage` of compressed targets, one bias rule, one precision.

    `itemsize` is the bytes of a parameter; `operations` are those beside the targets where they are known,
    `length` the positions that the counted token attends to.
    """

    targets: tuple[TargetSpec, ...]
    model_parameters: int
    storage: str
    bias: str
    itemsize: int = ITEMSIZE["float32"]
    operations: Operations | None = None
    length: int = 1

    @cached_property
    def linear_parameters(self) -> int:
        """Dense parameters of all targets, their biases included."""
        return sum(target.parameters for target in self.targets)

    @cached_property
    def _by_name(self) -> dict[str, TargetSpec]:
        return {target.name: target for target in self.targets}

    @cached_property
    def _tables(self) -> dict[tuple[int, int, bool], _Table]:
        """One table for each shape there is, so that counting an allocation is looking up."""
        shapes = {_shape(target): target for target in self.targets}
        return {shape: self._table(target) for shape, target in shapes.items()}

    def _table(self, target: TargetSpec) -> _Table:
        stored = tuple(
            stored_target(self.storage, target, rank, self.bias, self.itemsize)
            for rank in range(1, target.full_rank + 1)
        )
        backwards = accumulate((entry.parameters for entry in reversed(stored)), min)
        return _Table(stored, tuple(backwards)[::-1])

    def stored(self, target: TargetSpec, rank: int | None) -> Stored:
        """Form, parameters and bytes of a target; None is the dense layer."""
        if rank is None:
            return stored_target(self.storage, target, None, self.bias, self.itemsize)
        return self._tables[_shape(target)].stored[rank - 1]

    def form(self, target: TargetSpec, rank: int | None) -> str:
        """The form a target is stored in: dense, factored or pivoted."""
        return self.stored(target, rank).form

    def compressed(self, target: TargetSpec, rank: int) -> int:
        """Parameters of a target stored at `rank`."""
        return self.stored(target, rank).parameters

    def largest_rank(self, target: TargetSpec, share: float) -> int | None:
        """The largest rank that stores at most `share` of the dense target's parameters; None (dense) at 1.

        Rank 1 where even that stores more. Where the form of fewest bytes changes from factored to pivoted
        the parameters can fall as the rank grows, so the search runs over the fewest from each rank upwards:
        those never fall, and the last one that is allowed is the cost of its own rank.
        """
        if share >= 1:
            return None
        return max(1, bisect_right(self._tables[_shape(target)].fewest, share * target.parameters))

    def linear(self, allocation: Allocation) -> int:
        """Stored parameters of all targets."""
        return sum(self.stored(self._by_name[name], rank).parameters for name, rank in allocation)

    def linear_room(self, budget: float) -> float:
        """Parameters that all targets may store where the whole model may store `budget` of its own."""
        return budget * self.model_parameters - (self.model_parameters - self.linear_parameters)

    def model_bytes(self, allocation: Allocation) -> int:
        """Stored bytes of the whole model, every parameter that is no target's at `itemsize`."""
        targets = sum(self.stored(self._by_name[name], rank).bytes for name, rank in allocation)
        return (self.model_parameters - self.linear_parameters) * self.itemsize + targets

    def macs(self, allocation: Allocation) -> int | None:
        """Multiply-accumulates of a token in the whole model at `length`; None where they are not known."""
        if self.operations is None:
            return None
        targets = sum(self.stored(self._by_name[name], rank).macs for name, rank in allocation)
        return self.operations.at(self.length) + targets

    def budgets(self, allocation: Allocation) -> dict[str, float]:
        """`budget.linear` and `budget.model`: stored parameters over dense ones; `budget.bytes`: bytes."""
        linear = self.linear(allocation)
        return {
            "budget.linear": linear / self.linear_parameters,
            "budget.model": (self.model_parameters - self.linear_parameters + linear) / self.model_parameters,
            "budget.bytes": self.model_bytes(allocation) / (self.model_parameters * self.itemsize),
        }

    def uniform(self, share: float) -> Allocation:
        """Every target at the same share of its own parameters."""
        return Allocation(tuple((t.name, self.largest_rank(t, share)) for t in self.targets))


def _shape(target: TargetSpec) -> tuple[int, int, bool]:
    return target.rows, target.cols, target.bias
