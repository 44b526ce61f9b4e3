"""What a sampler is told of a space: sizes and losses, summed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import CHOOSING, OBJECTIVES, TARGETS, cost_model, landscape, space_of

from search.constraints import Constraint
from search.landscape import landscape_of
from search.records import Objective
from search.space import Space

COST = cost_model()


@pytest.mark.parametrize("group", ["target", "module", "block"])
def test_levels_are_the_sums_over_their_targets(group: str) -> None:
    space = space_of(COST, group=group)
    found = landscape(space, COST)
    for index, level in [(0, 0), (1, 4), (len(found.names) - 1, 10)]:
        targets = [target for target in TARGETS if space.group_of(target) == found.names[index]]
        ranks = [space.ranks_of(target)[level] for target in targets]
        size = sum(COST.stored(t, rank).parameters for t, rank in zip(targets, ranks, strict=True))
        losses = [
            0.0 if r is None else (1 - r / t.full_rank) ** 2 for t, r in zip(targets, ranks, strict=True)
        ]
        assert found.sizes[index, level] == size
        assert found.losses[index, level] == pytest.approx(sum(losses))
    assert not found.losses[:, -1].any()
    assert found.sizes[:, -1].sum() == COST.linear_parameters


@pytest.mark.parametrize("group", ["target", "module", "block"])
def test_an_allocation_of_the_space_is_the_same_by_ranks_and_by_levels(group: str) -> None:
    space = space_of(COST, group=group)
    found = landscape(space, COST)
    levels = np.arange(len(found.names)) % 11
    allocation = space.allocation(dict(zip(found.names, levels.tolist(), strict=True)))
    by_ranks = found.of_ranks([rank for _, rank in allocation])
    by_levels = found.of_levels(levels)
    assert by_ranks[0] == pytest.approx(by_levels[0])
    assert by_ranks[1] == by_levels[1] == COST.linear(allocation)


def test_without_predictions_an_even_allocation_is_the_best_guess() -> None:
    space = space_of(COST, group="target")
    found = landscape_of(space, COST, OBJECTIVES, (np.inf, np.inf), None)
    assert found.losses[:, 0] == pytest.approx(
        (1 - found.sizes[:, 0] / found.sizes[:, -1]) ** 2 * found.sizes[:, -1] / COST.linear_parameters
    )
    assert (np.diff(found.losses, axis=1) <= 0).all()


def test_wanted_sizes_are_those_of_the_targets_in_a_model_of_that_budget() -> None:
    space = space_of(COST, group="target")
    found = landscape_of(space, COST, OBJECTIVES, (np.inf, np.inf), None, (0.9, 0.75))
    others = COST.model_parameters - COST.linear_parameters
    for size, budget in zip(found.wanted, (0.9, 0.75), strict=True):
        assert (size + others) / COST.model_parameters <= budget < (size + 1 + others) / COST.model_parameters
    assert not len(landscape(space, COST).wanted)


def test_the_least_size_is_that_of_the_targets_in_the_smallest_model_of_interest() -> None:
    def least(lowest: float | None) -> int:
        return landscape_of(space_of(COST), COST, OBJECTIVES, (np.inf, np.inf), None, lowest=lowest).least

    others = COST.model_parameters - COST.linear_parameters
    assert (least(0.75) - 1 + others) / COST.model_parameters < 0.75
    assert (least(0.75) + others) / COST.model_parameters >= 0.75
    assert least(None) == least(0.01) == 0, "the other parameters alone are more"


def test_objectives_and_methods_are_named() -> None:
    objectives = (Objective("nll", True), Objective("budget.bytes", True), Objective("reasoning.acc", False))
    space: Space = space_of(COST, group="module", factors=CHOOSING)
    found = landscape_of(space, COST, objectives, (2.0, np.inf, np.inf), None)
    assert found.budgets.tolist() == [False, True, False]
    assert found.names == ("q_proj", "up_proj", "down_proj")
    assert list(found.methods) == ["method/q_proj", "method/up_proj", "method/down_proj"]
    assert set(found.methods.values()) == {CHOOSING.choices}


def test_bounds_on_costs_are_the_size_they_leave_to_the_targets() -> None:
    """The tightest of them; bounds on what is measured are none."""
    rest = COST.model_parameters - COST.linear_parameters
    size = COST.model_parameters * COST.itemsize
    bounds = {
        "budget.linear": (0.5, 0.5 * COST.linear_parameters),
        "budget.model": (0.6, 0.6 * COST.model_parameters - rest),
        "budget.bytes": (0.7, 0.7 * COST.model_parameters - rest),
        "bytes": (0.8 * size, 0.8 * COST.model_parameters - rest),
        "perplexity": (30.0, COST.linear_parameters),
    }
    space = space_of(COST)

    def most(*metrics: str) -> int:
        constraints = [Constraint(metric, bounds[metric][0]) for metric in metrics]
        return landscape_of(space, COST, OBJECTIVES, (np.inf, np.inf), None, (), constraints).most

    for metric, (_, expected) in bounds.items():
        assert most(metric) == pytest.approx(expected, abs=1)
    assert most(*bounds) == min(most(metric) for metric in bounds)
    assert most() == COST.linear_parameters
