"""What a sampler may know of a space before any trial: what each level stores, and what it should lose.

A parameter of the space that is a level stands for its targets; sizes and predicted losses are their sums.
Finished trials are read by the ranks they were scored at, not by the levels nearest to them: a seed gives
every target its own rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.types import TargetSpec
from search.constraints import Constraint
from search.cost import CostModel
from search.records import Objective
from search.space import Space

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Landscape:
    """Sizes and predicted losses of a space with p parameters that are levels, of L + 1 each, over t targets.

    `sizes` and `losses` (p, L + 1) are stored parameters and nats/token of each level; the last is dense,
    at loss 0. `owner` (t,) is the parameter of each target; a target at rank r has `rank_sizes` and
    `rank_losses` at `offsets` (t,) + r, dense as rank 0. `kinds` and `blocks` (t,) number the module types
    and decoder blocks. `methods` are the choices of each categorical parameter. `budgets` (d,) says which
    objectives are costs, `rooms` (d,) beyond what loss of an objective a model is of no use (infinite where
    nothing is known). `wanted` (w,) are sizes that a model is to be chosen at, `most` the largest that keeps
    to the bounds on costs, `least` the smallest that is of interest beside those that are wanted.
    """

    names: tuple[str, ...]
    sizes: Integers
    losses: Floats
    owner: Integers
    offsets: Integers
    rank_sizes: Integers
    rank_losses: Floats
    kinds: Integers
    blocks: Integers
    methods: Mapping[str, tuple[str, ...]]
    budgets: NDArray[np.bool_]
    rooms: Floats
    wanted: Integers
    most: int
    least: int

    def of_ranks(self, ranks: Sequence[int | None]) -> tuple[Floats, int]:
        """Predicted loss (p,) of each parameter's targets, and the stored size, at a rank for each target."""
        at = self.offsets + np.array([rank or 0 for rank in ranks], dtype=np.int64)
        losses = np.bincount(self.owner, weights=self.rank_losses[at], minlength=len(self.names))
        return np.asarray(losses, dtype=np.float64), int(self.rank_sizes[at].sum())

    def of_levels(self, levels: Integers) -> tuple[Floats, int]:
        """The same at a level (p,) for each parameter."""
        at = np.arange(len(self.names)), levels
        return np.asarray(self.losses[at], dtype=np.float64), int(self.sizes[at].sum())


def landscape_of(
    space: Space,
    cost: CostModel,
    objectives: Sequence[Objective],
    rooms: Sequence[float],
    predicted: Mapping[str, Floats] | None,
    wanted: Sequence[float] = (),
    constraints: Iterable[Constraint] = (),
    lowest: float | None = None,
) -> Landscape:
    """The landscape of a study; `predicted` is each target's loss (k,), nats/token, at each rank 1..k;
    `wanted`, and `lowest` of those of interest, are budgets of all parameters of the model.

    Without losses every target is taken to lose the square of the share of its parameters that it lacks, in
    proportion to its parameters: an even allocation is then the best guess.
    """
    names = space.level_names
    number = {name: index for index, name in enumerate(names)}
    owner = np.array([number[space.group_of(target)] for target in cost.targets])
    tables = [_table(cost, target, predicted) for target in cost.targets]
    lengths = [len(sizes) for sizes, _ in tables]
    count = len(space.ranks_of(cost.targets[0]))
    sizes, losses = np.zeros((len(names), count), dtype=np.int64), np.zeros((len(names), count))
    for index, target in enumerate(cost.targets):
        at = [rank or 0 for rank in space.ranks_of(target)]
        sizes[owner[index]] += tables[index][0][at]
        losses[owner[index]] += tables[index][1][at]
    return Landscape(
        names=names,
        sizes=sizes,
        losses=losses,
        owner=owner,
        offsets=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        rank_sizes=np.concatenate([table[0] for table in tables]),
        rank_losses=np.concatenate([table[1] for table in tables]),
        kinds=_numbered([target.module for target in cost.targets]),
        blocks=_numbered([target.block for target in cost.targets]),
        methods=space.choices,
        budgets=np.array([objective.name.startswith("budget.") for objective in objectives]),
        rooms=np.array(rooms, dtype=np.float64),
        wanted=np.array([math.floor(cost.linear_room(budget)) for budget in wanted], dtype=np.int64),
        most=_most(cost, constraints),
        least=0 if lowest is None else math.ceil(max(0.0, cost.linear_room(lowest))),
    )


def _most(cost: CostModel, constraints: Iterable[Constraint]) -> int:
    """Parameters that all targets may store within every bound on costs; indices are not counted."""
    rooms: list[float] = [cost.linear_parameters]
    for each in constraints:
        if each.metric == "budget.linear":
            rooms.append(each.bound * cost.linear_parameters)
        elif each.is_cost:
            whole = cost.model_parameters * cost.itemsize if each.metric == "bytes" else 1
            rooms.append(cost.linear_room(each.bound / whole))
    return math.floor(min(rooms))


def _table(
    cost: CostModel, target: TargetSpec, predicted: Mapping[str, Floats] | None
) -> tuple[Integers, Floats]:
    """Sizes and losses (k + 1,) of a target at rank 0, which stands for dense, and at each rank 1..k."""
    stored = [cost.compressed(target, rank) for rank in range(1, target.full_rank + 1)]
    sizes = np.array([target.parameters, *stored], dtype=np.int64)
    if predicted is not None:
        return sizes, np.append(0.0, np.maximum(predicted[target.name], 0.0))
    lacking = np.maximum(1 - sizes / target.parameters, 0.0)
    return sizes, lacking**2 * target.parameters / cost.linear_parameters


def _numbered(values: Sequence[object]) -> Integers:
    order = {value: index for index, value in enumerate(dict.fromkeys(values))}
    return np.array([order[value] for value in values], dtype=np.int64)
