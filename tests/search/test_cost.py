"""Parameters counted against tensors that are really there.

factored keeps A (m, r) and B (r, n); pivoted keeps r rows of length n and r coefficients for each of the
other m - r rows; a bias has m values. A compressed target has a bias where its layer had one or the
factors bring one.
"""

from __future__ import annotations

import numpy as np
import pytest
from fakes import LINEAR_PARAMETERS, MODEL_PARAMETERS, TARGETS, cost_model
from hypothesis import given
from hypothesis import strategies as st

from actors.types import Allocation, TargetSpec
from search.cost import CostModel

SIDES = st.integers(1, 40)


def stored(target: TargetSpec, rank: int | None, storage: str, bias: str) -> int:
    """Values in the tensors that hold the target."""
    rows, cols = target.rows, target.cols
    if rank is None:
        tensors = [np.zeros((rows, cols))]
    elif storage == "factored":
        tensors = [np.zeros((rows, rank)), np.zeros((rank, cols))]
    else:
        tensors = [np.zeros((rank, cols)), np.zeros((rows - rank, rank))]
    if target.bias or (rank is not None and bias == "mean"):
        tensors.append(np.zeros(rows))
    return sum(tensor.size for tensor in tensors)


@given(
    rows=SIDES,
    cols=SIDES,
    has_bias=st.booleans(),
    storage=st.sampled_from(["factored", "pivoted"]),
    bias=st.sampled_from(["mean", "none"]),
    share=st.floats(0.01, 1),
)
def test_counts_and_the_largest_rank(
    rows: int, cols: int, has_bias: bool, storage: str, bias: str, share: float
) -> None:
    target = TargetSpec("t", rows, cols, has_bias, 0, "t")
    cost = CostModel((target,), 10_000, storage, bias)
    sizes = {rank: stored(target, rank, storage, bias) for rank in range(1, min(rows, cols) + 1)}
    dense = stored(target, None, storage, bias)
    assert {rank: cost.compressed(target, rank) for rank in sizes} == sizes
    assert target.parameters == dense
    fitting = [rank for rank, size in sizes.items() if size <= share * dense]
    assert cost.largest_rank(target, share) == (None if share == 1 else max(fitting, default=1))


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.parametrize("bias", ["mean", "none"])
def test_budgets_count_the_rest_of_the_model(storage: str, bias: str) -> None:
    cost = cost_model(storage, bias)
    ranks = {"layers.0.q_proj": 5, "layers.3.down_proj": 11}
    allocation = Allocation.of(ranks, TARGETS)
    linear = sum(stored(target, ranks.get(target.name), storage, bias) for target in TARGETS)
    assert cost.linear(allocation) == linear
    assert cost.budgets(allocation) == {
        "budget.linear": linear / LINEAR_PARAMETERS,
        "budget.model": (linear + MODEL_PARAMETERS - LINEAR_PARAMETERS) / MODEL_PARAMETERS,
    }


def test_pivoted_by_hand() -> None:
    """48 x 24 at rank 10: 10 rows of 24 and 38 x 10 coefficients, and 48 of bias."""
    target = TargetSpec("t", 48, 24, False, 0, "t")
    assert CostModel((target,), 1152, "pivoted", "none").compressed(target, 10) == 240 + 380
    assert CostModel((target,), 1152, "pivoted", "mean").compressed(target, 10) == 240 + 380 + 48
    assert CostModel((target,), 1152, "factored", "none").compressed(target, 10) == 720


def test_dense_costs_one() -> None:
    cost = cost_model("pivoted", "mean")
    assert cost.linear_parameters == LINEAR_PARAMETERS
    assert cost.budgets(Allocation.dense(TARGETS)) == {"budget.linear": 1.0, "budget.model": 1.0}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_uniform_spends_its_share_in_every_target(share: float) -> None:
    cost = cost_model("pivoted", "none")
    for (_, rank), target in zip(cost.uniform(share), TARGETS, strict=True):
        assert rank is not None
        assert stored(target, rank, "pivoted", "none") <= share * target.rows * target.cols
        assert stored(target, rank + 1, "pivoted", "none") > share * target.rows * target.cols
