"""Parameters and bytes counted against tensors that are really there.

factored keeps A (m, r) and B (r, n); pivoted keeps r rows of length n, r coefficients for each of the other
m - r rows and the rows' order; dense keeps the product; a bias has m values. A compressed target has a bias
where its layer had one or the factors bring one. `auto` takes the form of fewest bytes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from fakes import LINEAR_PARAMETERS, MODEL_PARAMETERS, TARGETS, cost_model
from hypothesis import given
from hypothesis import strategies as st

from actors.types import Allocation, TargetSpec
from search.cost import CostModel

SIDES = st.integers(1, 40)
FLOATS = {4: np.float32, 2: np.float16}
# In the order of preference among forms of equal bytes.
FORMS = ("dense", "factored", "pivoted")
storages = st.sampled_from(["auto", "factored", "pivoted"])


def arrays(target: TargetSpec, rank: int | None, form: str, bias: str, itemsize: int = 4) -> list[np.ndarray]:
    """The arrays that hold the target."""
    rows, cols = target.rows, target.cols
    if rank is None or form == "dense":
        shapes = [(rows, cols)]
    elif form == "factored":
        shapes = [(rows, rank), (rank, cols)]
    else:
        shapes = [(rank, cols), (rows - rank, rank)]
    if target.bias or (rank is not None and bias == "mean"):
        shapes.append((rows,))  # type: ignore[arg-type]
    found: list[np.ndarray] = [np.zeros(shape, FLOATS[itemsize]) for shape in shapes]
    if rank is not None and form == "pivoted":
        found.append(np.zeros(rows, np.int32))
    return found


def size(found: list[np.ndarray]) -> int:
    return sum(array.nbytes for array in found)


def parameters(found: list[np.ndarray]) -> int:
    return sum(array.size for array in found if array.dtype != np.int32)


def chosen(target: TargetSpec, rank: int, storage: str, bias: str, itemsize: int) -> str:
    """The form by trying all."""
    if storage != "auto":
        return storage
    return min(FORMS, key=lambda form: (size(arrays(target, rank, form, bias, itemsize)), FORMS.index(form)))


@given(
    rows=SIDES,
    cols=SIDES,
    has_bias=st.booleans(),
    storage=storages,
    bias=st.sampled_from(["mean", "none"]),
    itemsize=st.sampled_from([2, 4]),
    share=st.floats(0.01, 1),
)
def test_counts_and_the_largest_rank(
    rows: int, cols: int, has_bias: bool, storage: str, bias: str, itemsize: int, share: float
) -> None:
    target = TargetSpec("t", rows, cols, has_bias, 0, "t")
    cost = CostModel((target,), 10_000, storage, bias, itemsize)
    ranks = range(1, min(rows, cols) + 1)
    forms = {rank: chosen(target, rank, storage, bias, itemsize) for rank in ranks}
    held = {rank: arrays(target, rank, forms[rank], bias, itemsize) for rank in ranks}
    sizes = {rank: parameters(found) for rank, found in held.items()}
    dense = parameters(arrays(target, None, "dense", bias))
    assert {rank: cost.form(target, rank) for rank in ranks} == forms
    assert {rank: cost.compressed(target, rank) for rank in ranks} == sizes
    assert {rank: cost.stored(target, rank).bytes for rank in ranks} == {r: size(a) for r, a in held.items()}
    assert target.parameters == dense
    assert cost.form(target, None) == "dense"
    fitting = [rank for rank, count in sizes.items() if count <= share * dense]
    assert cost.largest_rank(target, share) == (None if share == 1 else max(fitting, default=1))


def test_parameters_may_fall_where_the_form_changes() -> None:
    """48 x 24 in two bytes. At rank 9 the factors take 2 x 648 bytes, the pivots 2 x 567 + 192 = 1326; at
    rank 10 1440 and 2 x 620 + 192 = 1432. So 620 to 647 parameters are enough for rank 10 but not for 9."""
    target = TargetSpec("t", 48, 24, False, 0, "t")
    cost = CostModel((target,), 1152, "auto", "none", itemsize=2)
    assert [(cost.form(target, r), cost.compressed(target, r)) for r in (8, 9, 10)] == [
        ("factored", 576),
        ("factored", 648),
        ("pivoted", 620),
    ]
    limits = {575: 7, 576: 8, 619: 8, 620: 10, 647: 10, 648: 10}
    assert {limit: cost.largest_rank(target, (limit + 0.5) / 1152) for limit in limits} == limits


@given(rows=SIDES, cols=SIDES, storage=storages, bias=st.sampled_from(["mean", "none"]))
def test_a_larger_share_never_stores_less(rows: int, cols: int, storage: str, bias: str) -> None:
    """Ranks, parameters and bytes alike."""
    target = TargetSpec("t", rows, cols, False, 0, "t")
    cost = CostModel((target,), 10_000, storage, bias, itemsize=2)
    ranks = [cost.largest_rank(target, share) for share in np.linspace(0.01, 0.99, 99)]
    held = [(rank, cost.compressed(target, rank), cost.stored(target, rank).bytes) for rank in ranks if rank]
    assert len(held) == 99
    for low, high in pairwise(held):
        assert all(a <= b for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("storage", ["auto", "factored", "pivoted"])
@pytest.mark.parametrize("bias", ["mean", "none"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_budgets_count_the_rest_of_the_model(storage: str, bias: str, itemsize: int) -> None:
    cost = CostModel(TARGETS, MODEL_PARAMETERS, storage, bias, itemsize)
    ranks = {"layers.0.q_proj": 5, "layers.1.up_proj": 13, "layers.2.q_proj": 24, "layers.3.down_proj": 11}
    allocation = Allocation.of(ranks, TARGETS)
    held = []
    for target in TARGETS:
        rank = ranks.get(target.name)
        form = "dense" if rank is None else chosen(target, rank, storage, bias, itemsize)
        held += arrays(target, rank, form, bias, itemsize)
    rest = np.zeros(MODEL_PARAMETERS - LINEAR_PARAMETERS, FLOATS[itemsize])
    assert cost.linear(allocation) == parameters(held)
    assert cost.model_bytes(allocation) == size([*held, rest])
    assert cost.budgets(allocation) == {
        "budget.linear": parameters(held) / LINEAR_PARAMETERS,
        "budget.model": parameters([*held, rest]) / MODEL_PARAMETERS,
        "budget.bytes": size([*held, rest]) / (MODEL_PARAMETERS * itemsize),
    }


def test_by_hand() -> None:
    """48 x 24 at rank 10: 10 rows of 24 and 38 x 10 coefficients, and 48 of bias; 4 bytes for each row."""
    target = TargetSpec("t", 48, 24, False, 0, "t")
    assert CostModel((target,), 1152, "pivoted", "none").compressed(target, 10) == 240 + 380
    assert CostModel((target,), 1152, "pivoted", "mean").compressed(target, 10) == 240 + 380 + 48
    assert CostModel((target,), 1152, "factored", "none").compressed(target, 10) == 720
    assert CostModel((target,), 1152, "pivoted", "mean", 2).stored(target, 10).bytes == 2 * 668 + 4 * 48
    # Dense at full rank: the product of 1152 values, and 48 of bias that the dense layer has not.
    full = Allocation((("t", 24),))
    assert CostModel((target,), 1152, "auto", "mean").budgets(full)["budget.bytes"] == 1200 / 1152


def test_dense_costs_one() -> None:
    for itemsize in (2, 4):
        cost = CostModel(TARGETS, MODEL_PARAMETERS, "auto", "mean", itemsize)
        assert cost.linear_parameters == LINEAR_PARAMETERS
        budgets = cost.budgets(Allocation.dense(TARGETS))
        assert budgets == {"budget.linear": 1.0, "budget.model": 1.0, "budget.bytes": 1.0}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95])
def test_uniform_spends_its_share_in_every_target(share: float) -> None:
    cost = cost_model("pivoted", "none")
    for (_, rank), target in zip(cost.uniform(share), TARGETS, strict=True):
        assert rank is not None
        allowed = share * target.rows * target.cols
        assert parameters(arrays(target, rank, "pivoted", "none")) <= allowed
        assert parameters(arrays(target, rank + 1, "pivoted", "none")) > allowed


@pytest.mark.parametrize("itemsize", [2, 4])
def test_smollm2_at_seventy_percent_takes_a_quarter_off_its_bytes(itemsize: int) -> None:
    """Its real shapes; an export holds exactly these bytes (tests/actors/test_export_families.py)."""
    shapes = {
        "q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
        "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536),
    }  # fmt: skip
    targets = tuple(
        TargetSpec(f"{block}.{name}", *shape, False, block, name)
        for block in range(30)
        for name, shape in shapes.items()
    )
    linear = sum(target.parameters for target in targets)
    whole = linear + 49_152 * 576 + 61 * 576
    assert whole == 134_515_008
    cost = CostModel(targets, whole, "auto", "mean", itemsize)
    budgets = cost.budgets(cost.uniform((0.7 * whole - whole + linear) / linear))
    assert 0.69 < budgets["budget.model"] <= 0.7
    assert budgets["budget.bytes"] < 0.75
