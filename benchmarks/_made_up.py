"""A made-up model and losses, for what is measured of samplers: no weights, no text."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from actors.types import Allocation, FactorSpec, Score, TargetSpec, TextScore
from search.cost import CostModel
from search.landscape import Landscape, landscape_of
from search.records import Objective
from search.seeds import Curve, curves_of
from search.space import Space

# The 224 targets of a 7B model, a sixty-fourth as wide.
BLOCKS = 32
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (64, 64)),
    **dict.fromkeys(("gate_proj", "up_proj"), (172, 64)),
    "down_proj": (64, 172),
}
TARGETS = tuple(
    TargetSpec(f"layers.{block}.{module}", rows, cols, False, block, module)
    for block in range(BLOCKS)
    for module, (rows, cols) in SHAPES.items()
)
OBJECTIVES = (Objective("budget.model", True), Objective("nll", True))
DENSE_NLL = 3.0
ROOM = float(np.log(10))

# Predicted losses: exponential in the share of ranks left out, as those of SmolLM2 are, with a spread that
# makes seeds lose some 0.03 nats at 90% and 0.8 at 60%, uniform allocations 0.2 and 1.8: about as there.
STEEPNESS, LEVEL, MIDDLE = (5.0, 9.0), (-6.8, 0.6), 0.5
# What the losses that are measured are made of; spreads are standard deviations of logarithms. Together they
# scatter measured over predicted losses as 39 trials of SmolLM2 did: by some 11% over 21 parameters.
SCALE, OF_KINDS, OF_BLOCKS, OF_TARGETS = 2.2, 0.25, 0.2, 0.3
SHAPE, NEIGHBOURS, NOISE = 0.15, 0.15, 0.004


class MadeUp:
    """One made-up model: the losses its factors predict, and those a trial would measure.

    A target's measured loss is its predicted one times a random multiplier, to a random power near 1;
    neighbouring blocks lose more together than apart; a trial adds noise of a paired comparison.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.cost = CostModel(TARGETS, int(sum(t.parameters for t in TARGETS) * 1.25), "auto", "none")
        kinds = {module: rng.normal(0, OF_KINDS) for module in SHAPES}
        blocks = rng.normal(0, OF_BLOCKS, BLOCKS)
        self.predicted, self._measured = {}, {}
        for target in TARGETS:
            steepness, level = rng.uniform(*STEEPNESS), rng.lognormal(*LEVEL)
            left_out = 1 - np.arange(1, target.full_rank + 1) / target.full_rank
            tail = level * np.expm1(steepness * left_out) / np.expm1(steepness * MIDDLE)
            own = SCALE * np.exp(kinds[target.module] + blocks[target.block] + rng.normal(0, OF_TARGETS))
            middle, power = tail[target.full_rank // 2], 1 + rng.normal(0, SHAPE)
            self.predicted[target.name] = tail
            self._measured[target.name] = own * middle * (tail / middle) ** power
        self._together = NEIGHBOURS * rng.uniform(0, 2, BLOCKS - 1)
        self._noise = np.random.default_rng([seed, 1])

    def nll(self, allocation: Allocation) -> float:
        """Nats/token as a trial would measure them."""
        blocks = np.zeros(BLOCKS)
        for target, (name, rank) in zip(TARGETS, allocation, strict=True):
            if rank is not None:
                blocks[target.block] += self._measured[name][rank - 1]
        loss = blocks.sum() + (self._together * np.sqrt(blocks[1:] * blocks[:-1])).sum()
        return float(DENSE_NLL + loss + NOISE * np.sqrt(loss) * self._noise.standard_normal())

    def score(self, allocation: Allocation) -> Score:
        text = TextScore("made-up", nats=100 * self.nll(allocation), tokens=100, stderr=0.01)
        return Score("search", text, {}, forward_tokens=100, seconds=0.1, replica="made-up")

    def space(self, group: str = "target", segments: int = 1, levels: int = 20, floor: float = 0.2) -> Space:
        return Space(self.cost, FactorSpec(), group, segments, levels, floor)

    def landscape(self, space: Space) -> Landscape:
        return landscape_of(space, self.cost, OBJECTIVES, (np.inf, ROOM), self.predicted)

    @cached_property
    def curves(self) -> list[Curve]:
        """What the seeds are made of."""
        return curves_of(self.cost, 0.2, lambda target: self.predicted[target.name])
