"""Optuna parameters <-> allocations."""

from __future__ import annotations

from itertools import pairwise

import pytest
from fakes import SHAPES, TARGETS, cost_model, space_of
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.types import Allocation, RankfrontError, TargetSpec
from search.cost import CostModel
from search.space import Space

KINDS = [("target", 1), ("module", 1), ("module", 3), ("block", 1)]
every_kind = pytest.mark.parametrize(("group", "segments"), KINDS)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Spaces of models with targets of all shapes, where rank 1 stores less than dense."""
    group, segments = draw(st.sampled_from(KINDS))
    blocks = draw(st.integers(1, 4))
    shapes = draw(st.lists(st.tuples(st.integers(6, 60), st.integers(6, 60)), min_size=1, max_size=3))
    targets = tuple(
        TargetSpec(f"{block}.m{kind}", rows, cols, kind == 0, block, f"m{kind}")
        for block in range(blocks)
        for kind, (rows, cols) in enumerate(shapes)
    )
    storage, bias = draw(st.sampled_from(["pivoted", "factored"])), draw(st.sampled_from(["mean", "none"]))
    cost = CostModel(targets, 10**6, storage, bias)
    return Space(cost, group, segments, draw(st.integers(1, 40)), draw(st.floats(0.01, 1)))


@settings(max_examples=150, deadline=None)
@given(spaces(), st.data())
def test_parameters_of_an_allocation_of_the_space_give_it_back(space: Space, data: st.DataObject) -> None:
    params = {
        name: data.draw(st.integers(distribution.low, distribution.high))  # type: ignore[attr-defined]
        for name, distribution in space.distributions.items()
    }
    allocation = space.allocation(params)
    assert space.allocation(space.params(allocation)) == allocation
    levels = space.params(allocation)
    assert all(space.distributions[name]._contains(level) for name, level in levels.items())


@every_kind
def test_one_parameter_for_each_group(group: str, segments: int) -> None:
    space = space_of(cost_model(), group=group, segments=segments)
    expected = {
        ("target", 1): [target.name for target in TARGETS],
        ("module", 1): list(SHAPES),
        ("module", 3): [f"{module}/{part}of3" for part in (1, 2, 3) for module in SHAPES],
        ("block", 1): [f"block.{block}" for block in range(4)],
    }[group, segments]
    assert list(space.distributions) == expected


def test_segments_are_contiguous_and_even() -> None:
    """Four blocks in three segments: one of them has two blocks."""
    space = space_of(cost_model(), group="module", segments=3)
    lowered = {}
    for part in (1, 2, 3):
        params = dict.fromkeys(space.distributions, 10) | {f"q_proj/{part}of3": 0}
        lowered[part] = [name for name, rank in space.allocation(params) if rank is not None]
    blocks = [[int(name.split(".")[1]) for name in names] for names in lowered.values()]
    assert [block for part in blocks for block in part] == [0, 1, 2, 3]
    assert sorted(map(len, blocks)) == [1, 1, 2]


@every_kind
def test_the_highest_level_is_dense(group: str, segments: int) -> None:
    space = space_of(cost_model(), group=group, segments=segments)
    highest = dict.fromkeys(space.distributions, 10)
    assert all(rank is None for _, rank in space.allocation(highest))
    assert space.params(Allocation.dense(TARGETS)) == highest


def test_steps_are_equal_in_parameters() -> None:
    """Level l of 10 above 0.2 stores 0.2 + 0.08 l of the target, less than one rank's cost below it."""
    cost = cost_model("pivoted", "none")
    space = space_of(cost, group="target")
    for level in range(10):
        allocation = space.allocation(dict.fromkeys(space.distributions, level))
        for target, (_, rank) in zip(TARGETS, allocation, strict=True):
            assert rank is not None
            m, n = target.rows, target.cols
            wanted = (0.2 + 0.08 * level) * m * n
            assert rank * (m + n - rank) <= wanted < (rank + 1) * (m + n - rank - 1)


@every_kind
def test_higher_levels_never_store_less(group: str, segments: int) -> None:
    cost = cost_model("pivoted", "mean")
    space = space_of(cost, group=group, segments=segments, levels=40, floor=0.1)
    sizes = [cost.linear(space.allocation(dict.fromkeys(space.distributions, level))) for level in range(41)]
    assert all(low <= high for low, high in pairwise(sizes))
    assert sizes[0] < sizes[20] < sizes[40]


@every_kind
def test_uniform_budgets_at_a_level_are_exact(group: str, segments: int) -> None:
    """0.2, 0.36, ... are levels of the space: the sampler is told exactly what was scored."""
    cost = cost_model()
    space = space_of(cost, group=group, segments=segments)
    for level in range(10):
        uniform = cost.uniform(0.2 + (1 - 0.2) * level / 10)
        params = space.params(uniform)
        assert space.allocation(params) == uniform


@pytest.mark.parametrize("level", [-1, 11, 2.5, "3", None])
def test_a_level_outside_is_refused(level: object) -> None:
    space = space_of(cost_model())
    params = dict.fromkeys(space.distributions, 5) | {"up_proj": level}
    with pytest.raises(RankfrontError, match=r"up_proj.*0\.\.10"):
        space.allocation(params)  # type: ignore[arg-type]


def test_a_group_without_a_level_is_refused() -> None:
    with pytest.raises(RankfrontError, match="down_proj"):
        space_of(cost_model()).allocation({"q_proj": 1, "up_proj": 1})


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_foreign_allocation_is_told_as_the_nearest_levels(data: st.DataObject) -> None:
    """Nearest in stored parameters of each group, by trying every level."""
    cost = cost_model("pivoted", "none")
    space = space_of(cost, group="module", segments=1)
    ranks = {target.name: data.draw(st.none() | st.integers(1, target.full_rank)) for target in TARGETS}
    params = space.params(Allocation.of(ranks, TARGETS))
    for module, (m, n) in SHAPES.items():
        own = [ranks[target.name] for target in TARGETS if target.module == module]
        stored = sum(m * n if rank is None else rank * (m + n - rank) for rank in own)

        def distance(level: int, module: str = module, stored: int = stored, size: int = 4) -> int:
            at = space.allocation(dict.fromkeys(space.distributions, level)).to_dict()[f"layers.0.{module}"]
            m, n = SHAPES[module]
            return abs(size * (m * n if at is None else at * (m + n - at)) - stored)

        assert distance(params[module]) == min(map(distance, range(11)))
