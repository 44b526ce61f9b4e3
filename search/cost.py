"""Parameters of an allocation, in exact integers, as they are stored.

A rank-r target of shape (m, n), biases on top:

    dense      m n             its own bias, if the architecture has one
    factored   r (m + n)       A (m, r) and B (r, n)
    pivoted    r (m + n - r)   r rows of W_r and the coefficients of the others (PIFA, arXiv 2501.19090)

A compressed target stores m bias values where the layer had a bias or the factors bring one
(`bias: mean`). The pivoted form's row order counts in bytes, not in parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from actors.types import Allocation, TargetSpec

DENSE, FACTORED, PIVOTED = "dense", "factored", "pivoted"


@dataclass(frozen=True)
class CostModel:
    """Counts parameters for one model, one storage form of compressed targets, one bias rule."""

    targets: tuple[TargetSpec, ...]
    model_parameters: int
    storage: str
    bias: str

    @cached_property
    def linear_parameters(self) -> int:
        """Dense parameters of all targets, their biases included."""
        return sum(target.parameters for target in self.targets)

    @cached_property
    def _by_name(self) -> dict[str, TargetSpec]:
        return {target.name: target for target in self.targets}

    def compressed(self, target: TargetSpec, rank: int) -> int:
        """Parameters of a target stored at `rank` in this model's storage form."""
        weights = rank * (target.rows + target.cols)
        if self.storage == PIVOTED:
            weights -= rank * rank
        return weights + (target.rows if target.bias or self.bias == "mean" else 0)

    def largest_rank(self, target: TargetSpec, share: float) -> int | None:
        """The largest rank that stores at most `share` of the dense target; None (dense) at 1.

        Rank 1 where even that stores more.
        """
        if share >= 1:
            return None
        allowed = share * target.parameters
        low, high = 1, target.full_rank
        while low < high:
            middle = (low + high + 1) // 2
            if self.compressed(target, middle) <= allowed:
                low = middle
            else:
                high = middle - 1
        return low

    def linear(self, allocation: Allocation) -> int:
        """Stored parameters of all targets."""
        return sum(
            self._by_name[name].parameters if rank is None else self.compressed(self._by_name[name], rank)
            for name, rank in allocation
        )

    def budgets(self, allocation: Allocation) -> dict[str, float]:
        """`budget.linear` and `budget.model`: stored parameters over dense ones."""
        linear = self.linear(allocation)
        return {
            "budget.linear": linear / self.linear_parameters,
            "budget.model": (self.model_parameters - self.linear_parameters + linear) / self.model_parameters,
        }

    def uniform(self, share: float) -> Allocation:
        """Every target at the same share of its own parameters."""
        return Allocation(tuple((t.name, self.largest_rank(t, share)) for t in self.targets))
