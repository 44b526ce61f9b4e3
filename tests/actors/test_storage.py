"""Counts of stored layers against tensors that are really there: arrays, and the modules of an export."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors import modeling_rankfront, storage
from actors.storage import AUTO, FORMS, ITEMSIZE, Stored, in_form, stored_layer, stored_target
from actors.types import TargetSpec

FLOATS = {4: np.float32, 2: np.float16}
itemsizes = st.sampled_from([2, 4])


def arrays(form: str, m: int, n: int, r: int, bias: bool, itemsize: int) -> list[np.ndarray]:
    """The arrays of a form, written down from its definition."""
    shapes = {
        "dense": [(m, n)],
        "factored": [(m, r), (r, n)],
        "pivoted": [(r, n), (m - r, r)],
    }[form]
    found = [np.zeros(shape, FLOATS[itemsize]) for shape in [*shapes, *([(m,)] if bias else [])]]
    return [*found, np.zeros(m, np.int32)] if form == "pivoted" else found


def counted(form: str, m: int, n: int, r: int, bias: bool, itemsize: int) -> Stored:
    found = arrays(form, m, n, r, bias, itemsize)
    parameters = sum(array.size for array in found if array.dtype != np.int32)
    macs = sum(array.size for array in found if array.ndim == 2)
    return Stored(form, parameters, sum(array.nbytes for array in found), macs)


@given(st.integers(1, 60), st.integers(1, 60), st.data(), st.booleans(), itemsizes)
def test_counts_are_those_of_the_arrays(
    m: int, n: int, data: st.DataObject, bias: bool, itemsize: int
) -> None:
    r = data.draw(st.integers(1, min(m, n)))
    for form in FORMS:
        expected = counted(form, m, n, r, bias, itemsize)
        assert in_form(form, m, n, r, bias, itemsize) == expected
        assert stored_layer(form, m, n, r, bias, itemsize) == expected


@pytest.mark.parametrize("dtype", list(ITEMSIZE))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "r"), [(8, 5, 3), (5, 8, 5), (4, 4, 1), (1, 1, 1), (7, 9, 7)])
def test_counts_are_those_of_the_modules(dtype: str, bias: bool, m: int, n: int, r: int) -> None:
    """Every form has a module; its parameters and its saved tensors are what was counted."""
    assert set(modeling_rankfront.FORMS) == set(FORMS)
    for form, module in modeling_rankfront.FORMS.items():
        layer = module(n, m, r, bias).to(getattr(torch, dtype))
        found = in_form(form, m, n, r, bias, ITEMSIZE[dtype])
        assert sum(parameter.numel() for parameter in layer.parameters()) == found.parameters
        assert sum(tensor.nbytes for tensor in layer.state_dict().values()) == found.bytes


@given(st.integers(1, 60), st.integers(1, 60), st.booleans(), itemsizes)
def test_auto_is_the_form_of_fewest_bytes_and_never_falls(m: int, n: int, bias: bool, itemsize: int) -> None:
    chosen = [stored_layer(AUTO, m, n, r, bias, itemsize) for r in range(1, min(m, n) + 1)]
    for r, found in enumerate(chosen, 1):
        sizes = {form: counted(form, m, n, r, bias, itemsize) for form in FORMS}
        assert found == sizes[found.form]
        assert found.bytes == min(size.bytes for size in sizes.values())
    assert all(low.bytes <= high.bytes for low, high in pairwise(chosen))


@pytest.mark.parametrize(
    ("m", "n", "r", "itemsize", "form"),
    [
        # r^2 saved parameters of 4 bytes against 4 bytes for each of 100 rows
        (100, 100, 9, 4, "factored"),
        (100, 100, 10, 4, "factored"),  # equal: two products are fewer steps than two and a gather
        (100, 100, 11, 4, "pivoted"),
        (100, 100, 11, 2, "factored"),
        (100, 100, 15, 2, "pivoted"),
        # (m - r)(n - r) saved over dense, against the same indices
        (100, 100, 89, 4, "pivoted"),
        (100, 100, 90, 4, "dense"),  # equal: one product
        (100, 100, 91, 4, "dense"),
        (100, 100, 100, 4, "dense"),
        (1, 1, 1, 4, "dense"),
    ],
)
def test_forms_by_hand(m: int, n: int, r: int, itemsize: int, form: str) -> None:
    assert stored_layer(AUTO, m, n, r, False, itemsize).form == form


@pytest.mark.parametrize("rule", ["mean", "none"])
@pytest.mark.parametrize("own", [True, False])
def test_a_target_has_a_bias_where_it_had_one_or_the_factors_bring_one(rule: str, own: bool) -> None:
    target = TargetSpec("t", 30, 20, own, 0, "t")
    for kind in (AUTO, "pivoted", "factored"):
        found = stored_target(kind, target, 7, rule, 2)
        assert found == counted(found.form, 30, 20, 7, own or rule == "mean", 2)
        assert stored_target(kind, target, None, rule, 2) == counted("dense", 30, 20, 20, own, 2)


def test_the_formulas_need_no_torch() -> None:
    """The driver imports them."""
    assert {name for name, value in vars(storage).items() if type(value).__name__ == "module"} == set()
