"""Packing and paired differences against numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from actors.samples import (
    mean_difference,
    pack_bits,
    pack_floats,
    paired_difference,
    standard_error,
    unpack_bits,
    unpack_floats,
)

FLOATS = st.lists(st.floats(-100, 100), max_size=20)


@given(FLOATS)
def test_floats_come_back_as_float32(values: list[float]) -> None:
    found = unpack_floats(pack_floats(values))
    assert np.array(found).tolist() == np.array(values, np.float32).astype(float).tolist()


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(values: list[bool]) -> None:
    assert unpack_bits(pack_bits(values), len(values)) == tuple(map(float, values))


def test_packed_values_are_small() -> None:
    """A hundred examples: 4 bytes and 1 bit of each, in base64."""
    assert len(pack_floats([0.5] * 100)) == math.ceil(400 / 3) * 4
    assert len(pack_bits([True] * 100)) == math.ceil(13 / 3) * 4


def test_the_standard_error_is_scipys() -> None:
    values = np.random.default_rng(0).normal(3, 2, 50)
    assert standard_error(values.tolist()) == pytest.approx(scipy.stats.sem(values), rel=1e-12)
    assert math.isnan(standard_error([1.0]))
    assert math.isnan(standard_error([]))


def test_paired_differences_are_those_of_a_paired_t_test() -> None:
    chance = np.random.default_rng(1)
    hard = chance.normal(3, 1, 40)  # what both find hard
    one, other = hard + chance.normal(0.02, 0.01, 40), hard
    found = paired_difference(one.tolist(), other.tolist())
    wanted = scipy.stats.ttest_rel(one, other)
    assert found.mean / found.stderr == pytest.approx(wanted.statistic, rel=1e-9)
    assert (found.mean, found.pairs) == (pytest.approx(np.mean(one - other), rel=1e-9), 40)
    apart = math.hypot(scipy.stats.sem(one), scipy.stats.sem(other))
    assert found.beyond(2)
    assert abs(found.mean) < 0.5 * apart  # which the two standard errors alone cannot tell


def test_what_cannot_be_paired_is_refused() -> None:
    for one, other in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match=f"{len(one)} values cannot be paired with {len(other)}"):
            paired_difference(one, other)
    assert not paired_difference([5.0], [1.0]).beyond(1)  # one pair has no spread to judge by


def test_a_mean_over_tasks_adds_variances() -> None:
    parts = [paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 1.0]), paired_difference([0.0, 1.0], [1.0, 1.0])]
    found = mean_difference(parts)
    assert found.mean == pytest.approx((1 / 3 - 1 / 2) / 2)
    assert found.stderr == pytest.approx(math.hypot(parts[0].stderr, parts[1].stderr) / 2)
    assert found.pairs == 5
    with pytest.raises(ValueError, match="nothing to average"):
        mean_difference([])
