"""Shares of a GPU and whole numbers of them: what is refused, and how many replicas a node takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.shares import UNIT, even_share, gpu_places, gpus_problem, in_words, per_gpu


@given(st.integers(1, 400))
def test_the_even_share_of_so_many_fits_them_and_no_more(replicas: int) -> None:
    """In Ray's ten-thousandths: one more for each, and one of them has no room."""
    share = even_share(replicas)
    assert gpus_problem(share) is None
    assert per_gpu(share) >= replicas
    assert replicas * round(share * UNIT) <= UNIT
    assert replicas * (round(share * UNIT) + 1) > UNIT


@pytest.mark.parametrize("value", [1, 2, 8, 2.0, 0.5, 0.25, 0.2, 0.3333, 0.33, 0.125, 0.05, 0.95])
def test_whole_numbers_and_shares_without_a_rest_are_right(value: float) -> None:
    assert gpus_problem(value) is None


@pytest.mark.parametrize("value", [2.5, 1.5, 0, -1, -0.5, True, "two", None, float("nan"), float("inf"), [1]])
def test_what_is_no_number_of_gpus_is_told_what_would_be(value: Any) -> None:
    assert "a whole number of GPUs, or a share of one" in str(gpus_problem(value))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (0.3, "with 3 on a GPU, 0.1 of it is nobody's; 0.3333 is the share for 3, 0.25 for 4"),
        (0.6, "with 1 on a GPU, 0.4 of it is nobody's; 1 is the share for 1, 0.5 for 2"),
        (0.1667, "with 5 on a GPU, 0.1665 of it is nobody's; 0.2 is the share for 5, 0.1666 for 6"),
        (1 / 3, "shares are counted in ten-thousandths of a GPU; 0.3333 is one"),
        (0.00001, "shares are counted in ten-thousandths of a GPU; 0.0001 is one"),
    ],
)
def test_a_share_that_leaves_much_to_nobody_is_refused(value: float, problem: str) -> None:
    assert gpus_problem(value) == problem


@pytest.mark.parametrize(
    ("gpus", "each", "places"),
    [
        (4, 1, 4),
        (4, 2, 2),
        (3, 2, 1),
        (1, 2, 0),
        (4, 0.5, 8),
        (4, 0.3333, 12),  # not thirteen: a share is never of two GPUs
        (2, 0.1, 20),
        (0, 0.5, 0),
        (0, 1, 0),
    ],
)
def test_a_node_takes_as_many_as_its_gpus_are_enough_for(gpus: float, each: float, places: int) -> None:
    assert gpu_places(gpus, each) == places


def test_words_for_what_a_replica_takes() -> None:
    assert [in_words(gpus) for gpus in (1, 2.0, 0.5)] == ["a GPU", "2 GPUs", "0.5 of a GPU"]
