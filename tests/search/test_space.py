"""Optuna parameters <-> allocations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise, product

import numpy as np
import pytest
from fakes import CHOOSING, SHAPES, TARGETS, cost_model, space_of
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution

from actors.types import METHOD_NAMES, Allocation, FactorSpec, RankfrontError, TargetSpec
from search.cost import CostModel
from search.space import Space

KINDS = [("target", 1), ("module", 1), ("module", 3), ("block", 1), ("curve", 1)]
every_kind = pytest.mark.parametrize(("group", "segments"), KINDS)


@st.composite
def factors(draw: st.DrawFn) -> FactorSpec:
    """Configured methods by pattern; the search chooses among no methods, or among these and perhaps more."""
    patterns = draw(st.lists(st.sampled_from(["0.*", "*.m0", "*.m1", "1.m0", "*"]), unique=True, max_size=3))
    method, *others = (draw(st.sampled_from(METHOD_NAMES)) for _ in range(len(patterns) + 1))
    configured = {method, *others}
    choices = draw(st.permutations(METHOD_NAMES))[: draw(st.sampled_from([0, 2, 3]))]
    offered = tuple(choices) if configured <= set(choices) else draw(st.sampled_from([(), METHOD_NAMES]))
    return FactorSpec(method, tuple(zip(patterns, others, strict=True)), offered)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Space, FactorSpec]:
    """Spaces of models with targets of all shapes, also where rank 1 stores as much as dense or more."""
    group, segments = draw(st.sampled_from(KINDS))
    blocks = draw(st.integers(1, 7 if group == "curve" else 4))
    lengths = st.integers(1, 4) | st.integers(6, 60)
    shapes = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=3))
    targets = tuple(
        TargetSpec(f"{block}.m{kind}", rows, cols, kind == 0, block, f"m{kind}")
        for block in range(blocks)
        for kind, (rows, cols) in enumerate(shapes)
    )
    storage = draw(st.sampled_from(["auto", "pivoted", "factored"]))
    bias, itemsize = draw(st.sampled_from(["mean", "none"])), draw(st.sampled_from([2, 4]))
    cost = CostModel(targets, 10**6, storage, bias, itemsize)
    spec = draw(factors())
    levels, floor, knots = draw(st.integers(1, 40)), draw(st.floats(0.01, 1)), draw(st.integers(1, 5))
    return Space(cost, spec, group, segments, levels, floor, knots), spec


def some_params(space: Space, data: st.DataObject) -> dict[str, int | str]:
    """Any parameters of a space; highest levels often, so that module types are dense as a whole too."""
    return {
        name: data.draw(st.just(distribution.high) | st.integers(distribution.low, distribution.high))
        if isinstance(distribution, IntDistribution)
        else data.draw(st.sampled_from(distribution.choices))
        for name, distribution in space.distributions.items()
    }


@settings(max_examples=100, deadline=None)
@given(spaces(), st.data())
def test_parameters_of_an_allocation_of_the_space_give_it_back(
    made: tuple[Space, FactorSpec], data: st.DataObject
) -> None:
    space, _ = made
    allocation = space.allocation(some_params(space, data))
    params = space.params(allocation)
    assert space.allocation(params) == allocation
    assert list(params) == list(space.distributions)
    space.check(params)


@settings(max_examples=100, deadline=None)
@given(spaces(), st.data())
def test_a_target_names_its_method_where_it_differs_from_the_configured_one(
    made: tuple[Space, FactorSpec], data: st.DataObject
) -> None:
    """So two sets of parameters that give one model give one key, whatever they say of dense targets."""
    space, spec = made
    params = some_params(space, data)
    allocation = space.allocation(params)
    named = dict(allocation.methods)
    for name, rank in allocation:
        configured = spec.method_of(name)
        chosen = params.get(f"method/{name.split('.')[1]}", configured)
        assert named.pop(name, None) == (None if rank is None or chosen == configured else chosen)
    assert not named


@every_kind
@pytest.mark.parametrize("bias", ["none", "mean"])
@pytest.mark.parametrize("storage", ["auto", "pivoted", "factored"])
def test_a_target_that_no_rank_makes_smaller_stays_dense(
    storage: str, bias: str, group: str, segments: int
) -> None:
    """Of a vector rank 1 is all there is. It is dense at every level, and the others are as without it."""
    targets = (TargetSpec("0.gate", 1, 64, False, 0, "gate"), TargetSpec("0.up", 48, 24, False, 0, "up"))
    cost = CostModel(targets, 10**4, storage, bias)
    space = space_of(cost, group=group, segments=segments)
    for level in range(11):
        allocation = space.allocation(dict.fromkeys(space.distributions, level))
        expected = cost.largest_rank(targets[1], 0.2 + 0.8 * level / 10)
        assert allocation == Allocation((("0.gate", None), ("0.up", expected)))
        assert space.allocation(space.params(allocation)) == allocation


@every_kind
def test_one_parameter_for_each_group(group: str, segments: int) -> None:
    space = space_of(cost_model(), group=group, segments=segments)
    expected = {
        ("target", 1): [target.name for target in TARGETS],
        ("module", 1): list(SHAPES),
        ("module", 3): [f"{module}/{part}of3" for part in (1, 2, 3) for module in SHAPES],
        ("block", 1): [f"block.{block}" for block in range(4)],
        ("curve", 1): [f"{module}@{block}" for module in SHAPES for block in range(4)],
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


# -- curves -----------------------------------------------------------------------------------


def deep(blocks: Iterable[int], rows: int = 40) -> CostModel:
    """One module type in some blocks, another in all of them up to the last one."""
    blocks = list(blocks)
    some = [TargetSpec(f"{block}.a", rows, 30, False, block, "a") for block in blocks]
    every = [TargetSpec(f"{block}.b", 30, rows, False, block, "b") for block in range(max(blocks) + 1)]
    targets = sorted([*some, *every], key=lambda target: target.block)
    return CostModel(tuple(targets), 10**6, "pivoted", "none")


def levels_of(space: Space, cost: CostModel, params: dict[str, int], levels: int) -> dict[str, int]:
    """The level of each target, read off its rank; every level has a rank of its own here."""
    shared = space_of(cost, group="target", levels=levels, floor=0.1)
    return {name: int(level) for name, level in shared.params(space.allocation(params)).items()}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_between_knots_levels_are_on_a_straight_line(data: st.DataObject, knots: int) -> None:
    """numpy's, rounded half up, over the blocks that have the module."""
    blocks = sorted(data.draw(st.sets(st.integers(0, 11), min_size=1, max_size=8)))
    cost = deep(blocks)
    space = space_of(cost, group="curve", levels=12, floor=0.1, knots=knots)
    params = some_params(space, data)
    found = levels_of(space, cost, params, 12)
    for module, own in (("a", blocks), ("b", list(range(max(blocks) + 1)))):
        names = [name for name in params if name.startswith(f"{module}@")]
        at = [int(name.partition("@")[2]) for name in names]
        assert len(names) == min(knots, len(own))
        assert set(at) <= set(own)
        assert len(at) == 1 or (at[0], at[-1]) == (own[0], own[-1])
        line = np.interp(own, at, [int(params[name]) for name in names])
        expected = np.floor(line + 0.5 + 1e-9).astype(int)
        assert [found[f"{block}.{module}"] for block in own] == expected.tolist()


def test_knots_are_evenly_spread() -> None:
    space = space_of(deep(range(30)), group="curve", knots=4)
    assert [name for name in space.distributions if name.startswith("a")] == ["a@0", "a@9", "a@19", "a@29"]
    assert len(space.distributions) == 8


def test_a_single_knot_is_the_module_types_level() -> None:
    cost = cost_model()
    curve, module = space_of(cost, group="curve", knots=1), space_of(cost, group="module")
    assert list(curve.distributions) == [f"{module}@0" for module in SHAPES]
    levels = (3, 10, 7)
    assert curve.allocation(dict(zip(curve.distributions, levels, strict=True))) == module.allocation(
        dict(zip(module.distributions, levels, strict=True))
    )


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_a_foreign_allocation_is_told_as_the_nearest_curve(data: st.DataObject, knots: int) -> None:
    """By trying every curve: least sum of differences of stored parameters, target by target."""
    cost = deep([0, 1, 2, 4, 5], rows=24)
    space = space_of(cost, group="curve", levels=4, floor=0.2, knots=knots)
    ranks = {t.name: data.draw(st.none() | st.integers(1, t.full_rank)) for t in cost.targets}
    allocation = Allocation.of(ranks, cost.targets)

    def distance(params: dict[str, int | str], module: str) -> int:
        told = space.allocation(params).to_dict()
        own = [target for target in cost.targets if target.module == module]
        return sum(
            abs(cost.stored(t, told[t.name]).parameters - cost.stored(t, ranks[t.name]).parameters)
            for t in own
        )

    nearest = space.params(allocation)
    for module in ("a", "b"):
        names = [name for name in space.distributions if name.startswith(f"{module}@")]
        curves = product(range(5), repeat=len(names))
        least = min(
            distance({**nearest, **dict(zip(names, levels, strict=True))}, module) for levels in curves
        )
        assert distance(nearest, module) == least


# -- methods ----------------------------------------------------------------------------------

METHOD_PARAMETERS = ["method/q_proj", "method/up_proj", "method/down_proj"]


def cut(**methods: str) -> Allocation:
    """All of q_proj at rank 3, the rest dense; `methods` by block: `_0="weight"`."""
    ranks = {f"layers.{block}.q_proj": 3 for block in range(4)}
    return Allocation.of(
        ranks, TARGETS, methods={f"layers.{b[1:]}.q_proj": method for b, method in methods.items()}
    )


@every_kind
def test_one_method_for_each_module_type(group: str, segments: int) -> None:
    kind = {"group": group, "segments": segments}
    plain, choosing = space_of(cost_model(), **kind), space_of(cost_model(), factors=CHOOSING, **kind)
    added = {name: d for name, d in choosing.distributions.items() if name not in plain.distributions}
    assert list(choosing.distributions) == [*plain.distributions, *METHOD_PARAMETERS]
    assert set(added.values()) == {CategoricalDistribution(("weight", "feature", "curvature"))}


def test_targets_of_one_module_type_are_cut_by_one_method() -> None:
    """Whatever is configured for each: layers.0.q_proj by weight, the other q_proj by feature."""
    space = space_of(cost_model(), factors=CHOOSING)
    levels = {"q_proj": 3, "up_proj": 10, "down_proj": 3}
    methods = {"method/q_proj": "weight", "method/up_proj": "weight", "method/down_proj": "feature"}
    allocation = space.allocation({**levels, **methods})
    assert allocation.methods == tuple((f"layers.{block}.q_proj", "weight") for block in (1, 2, 3))
    as_configured = space.allocation({**levels, **methods, "method/q_proj": "feature"})
    assert as_configured.methods == (("layers.0.q_proj", "feature"),)
    assert as_configured.ranks == allocation.ranks
    assert as_configured.key != allocation.key


@pytest.mark.parametrize(
    ("allocation", "told"),
    [
        (cut(), "feature"),  # configured: one by weight, three by feature
        (cut(_1="curvature", _2="curvature", _3="curvature"), "curvature"),
        (cut(_1="curvature", _3="weight"), "weight"),  # two by weight, one each by the others
        (cut(_1="weight"), "weight"),  # two by each: the first target's
        (cut(_0="feature", _1="weight", _2="weight"), "feature"),  # two by each, the other way round
        (Allocation.dense(TARGETS), "weight"),  # configured for the first target
    ],
)
def test_mixed_methods_are_told_as_the_usual_one(allocation: Allocation, told: str) -> None:
    params = space_of(cost_model(), factors=CHOOSING).params(allocation)
    assert params["method/q_proj"] == told
    assert params["method/up_proj"] == "curvature", "dense, so as configured"
    assert params["method/down_proj"] == "feature"


def test_dense_targets_have_no_say_in_the_method() -> None:
    one = Allocation.of({"layers.3.q_proj": 3}, TARGETS, methods={"layers.3.q_proj": "curvature"})
    assert space_of(cost_model(), factors=CHOOSING).params(one)["method/q_proj"] == "curvature"


@pytest.mark.parametrize("method", ["svd", None, 1, ["weight"]])
def test_a_method_outside_is_refused(method: object) -> None:
    space = space_of(cost_model(), factors=CHOOSING)
    params = space.params(Allocation.dense(TARGETS)) | {"method/up_proj": method}
    with pytest.raises(RankfrontError, match=r"method/up_proj: .* is not one of weight, feature, curvature"):
        space.allocation(params)  # type: ignore[arg-type]
    with pytest.raises(RankfrontError, match="method/up_proj"):
        space.check({"method/up_proj": method})


def test_a_module_type_without_a_method_is_refused() -> None:
    space = space_of(cost_model(), factors=CHOOSING)
    with pytest.raises(RankfrontError, match="method/q_proj"):
        space.allocation({"q_proj": 1, "up_proj": 1, "down_proj": 1})
    space.check({"q_proj": 1})  # what another program enqueues may leave parameters open
