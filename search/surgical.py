"""The paper's surgical search: target by target, last block to first, the smallest rank that costs no more
than is allowed (arXiv 2405.13039, section 3.3, and its released code).

What is decided is apart from how it is scored: `Walk` says which allocations it waits for and which steps
the known answers decide; `search.surgical_run` has them scored.

    rule        `perplexity`: after the t-th target at most dense (1 + growth)^t. `task`: in each of three
                parts of the examples at least the dense accuracy less delta; the rank is the largest of the
                parts' smallest, and taken back if the accuracy over all of them falls by more than delta.
    ladder      `paper`: rank 1 and 10%, 20%, ... 90% of mn/(m+n), where factors begin to save parameters.
                `shares`: the largest ranks that store 10%, 20%, ... 90% of the target's parameters.
    ranks       `scan`: upwards, as the paper does. `bisect`: by halves, which takes acceptance for monotone;
                the larger ranks that pass on the way belong to what the search has found.

A target of which no rank is accepted stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from actors.types import Allocation, RankfrontError, Score, TargetSpec
from search.alone import Cell
from search.cost import CostModel
from search.sections import SurgicalSection

# What the rule says of each candidate, part by part; None where it has no answer yet.
Flags = Sequence[tuple[bool, ...] | None]

# Tenths of full size, as the paper's ladder has them.
STEPS = 10
# Far above the rounding error of an accuracy, far below what one example is to it.
ROUNDING = 1e-9
# Parts of the examples in task mode: a rank must do in each of them.
CHUNKS = 3


class Rule(Protocol):
    """What is accepted, over so many `parts` of the split.

    `visited` counts the targets up to the one in question, itself included.
    """

    @property
    def parts(self) -> int: ...

    def passes(self, score: Score, dense: Score, visited: int) -> tuple[bool, ...]:
        """For each part of the split, whether a score is good enough there."""
        ...

    def holds(self, score: Score, dense: Score) -> bool:
        """Whether the rank that the parts agreed on may stay, seen over the whole split."""
        ...


@dataclass(frozen=True)
class PerplexityRule:
    """Perplexity may grow by `growth` (relative) with every target, compounding."""

    growth: float
    parts: int = 1

    def passes(self, score: Score, dense: Score, visited: int) -> tuple[bool, ...]:
        return (score.text.nll <= dense.text.nll + visited * math.log1p(self.growth),)

    def holds(self, score: Score, dense: Score) -> bool:
        return True


@dataclass(frozen=True)
class TaskRule:
    """The accuracy of `task` may fall by `delta`, in each of CHUNKS parts of its examples and over all."""

    task: str
    delta: float
    parts: int = CHUNKS

    def passes(self, score: Score, dense: Score, visited: int) -> tuple[bool, ...]:
        pairs = zip(self._means(score), self._means(dense), strict=True)
        return tuple(self._keeps(mine, theirs) for mine, theirs in pairs)

    def holds(self, score: Score, dense: Score) -> bool:
        return self._keeps(score.tasks[self.task].acc, dense.tasks[self.task].acc)

    def _keeps(self, mine: float, theirs: float) -> bool:
        """Whether one accuracy is at least another less delta, whatever rounding makes of the difference."""
        return mine - theirs >= -self.delta - ROUNDING

    def _means(self, score: Score) -> list[float]:
        """Accuracy in each part."""
        hits = score.tasks[self.task].samples("acc")
        borders = [len(hits) * part // self.parts for part in range(self.parts + 1)]
        return [sum(hits[low:high]) / (high - low) for low, high in pairwise(borders)]


def make_rule(section: SurgicalSection, examples: Mapping[str, int]) -> Rule:
    """The rule a config names; `examples` of the search split by the tasks that are scored, some task where
    the mode needs one.

    Raises:
        RankfrontError: the task has too few of them.
    """
    if section.mode == "perplexity":
        return PerplexityRule(section.growth)
    task = section.task or next(iter(examples))
    if examples[task] < CHUNKS:
        raise RankfrontError(
            f"surgical.mode: task: {task} has {examples[task]} examples on the search split, too few for "
            f"{CHUNKS} parts; raise scoring.search_fraction, or give it more"
        )
    return TaskRule(task, section.delta)


def ladder(kind: Literal["paper", "shares"], cost: CostModel, target: TargetSpec) -> list[int]:
    """The ranks that are tried for a target, increasing. Its full size is not among them: that is dense."""
    tenths = [step / STEPS for step in range(1, STEPS)]
    if kind == "paper":
        most = target.rows * target.cols // (target.rows + target.cols)
        ranks = [1, *(int(share * most) for share in tenths)]
    else:
        ranks = [cost.largest_rank(target, share) or target.full_rank for share in tenths]
    return sorted({rank for rank in ranks if 1 <= rank <= target.full_rank})


def order(targets: Sequence[TargetSpec], skip_blocks: int) -> tuple[TargetSpec, ...]:
    """Targets from the last block to the first, each block's last first, without the first blocks.

    Raises:
        RankfrontError: no target is left.
    """
    chosen = tuple(target for target in reversed(targets) if target.block >= skip_blocks)
    if not chosen:
        blocks = 1 + max(target.block for target in targets)
        raise RankfrontError(f"surgical.skip_blocks: {skip_blocks} of {blocks} blocks leave no target")
    return chosen


@dataclass(frozen=True)
class Step:
    """A target is decided: it keeps `rank` (None: dense) in every allocation from here on.

    `passed` are allocations with larger ranks of it that were scored on the way of halving, and passed too.
    """

    target: TargetSpec
    rank: int | None
    allocation: Allocation
    passed: tuple[Allocation, ...] = ()

    @property
    def accepted(self) -> tuple[Allocation, ...]:
        """What it adds to the study, the largest first."""
        return self.passed if self.rank is None else (*self.passed, self.allocation)


@dataclass
class Walk:
    """The state of a search. `answer` knows what was scored: a score, None where it failed; it raises
    KeyError for what nobody has scored yet.

    Invariant: state follows from the answers alone, so a walk over the same answers takes the same steps.
    """

    cost: CostModel
    section: SurgicalSection
    rule: Rule
    answer: Callable[[Allocation], Score | None]
    steps: list[Step] = field(default_factory=list)
    wanted: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        self.order = order(self.cost.targets, self.section.skip_blocks)
        self._ranks: dict[str, int | None] = {}

    @property
    def dense(self) -> Allocation:
        return Allocation.dense(self.cost.targets)

    @property
    def done(self) -> bool:
        return len(self.steps) == len(self.order)

    def advance(self) -> Iterator[Step]:
        """Take every step that the answers decide; then `wanted` are the candidates of the next one, the most
        urgent first. The dense model must have been answered.

        Raises:
            RankfrontError: the dense model has no score.
        """
        dense = self.answer(self.dense)
        if dense is None:
            raise RankfrontError("surgical search: the dense model has no score on the search split")
        self.wanted = ()
        while not self.done:
            target = self.order[len(self.steps)]
            cells = [self._cell(target, rank) for rank in ladder(self.section.ladder, self.cost, target)]
            flags = [self._flags(cell, dense) for cell in cells]
            asked = _unscanned(flags) if self.section.ranks == "scan" else _unhalved(flags)
            if asked:
                self.wanted = tuple(cells[index] for index in asked)
                return
            yield self._take(target, cells, flags, dense)

    def _cell(self, target: TargetSpec, rank: int) -> Cell:
        share = self.cost.compressed(target, rank) / target.parameters
        allocation = Allocation.of({**self._ranks, target.name: rank}, self.cost.targets)
        return Cell(target, share, rank, allocation)

    def _flags(self, cell: Cell, dense: Score) -> tuple[bool, ...] | None:
        """What the rule says of a candidate, part by part; None where it is not answered yet."""
        try:
            score = self.answer(cell.allocation)
        except KeyError:
            return None
        if score is None:
            return (False,) * self.rule.parts
        return self.rule.passes(score, dense, visited=len(self.steps) + 1)

    def _take(self, target: TargetSpec, cells: Sequence[Cell], flags: Flags, dense: Score) -> Step:
        if self.section.ranks == "scan":
            first = _first_to_pass(flags)
            passing = [] if first is None else [cells[first]]
        else:
            on_the_way = dict.fromkeys(high for _, high in _spans(flags))
            passing = [cells[high] for high in on_the_way if high < len(cells)]
        held = [cell for cell in passing if self._holds(cell, dense)]
        smallest = passing[-1] if passing else None
        rank = smallest.rank if smallest is not None and smallest in held else None
        self._ranks[target.name] = rank
        passed = tuple(cell.allocation for cell in held if cell is not smallest)
        step = Step(target, rank, Allocation.of(self._ranks, self.cost.targets), passed)
        self.steps.append(step)
        return step

    def _holds(self, cell: Cell, dense: Score) -> bool:
        score = self.answer(cell.allocation)
        return score is not None and self.rule.holds(score, dense)


def _first_to_pass(flags: Flags) -> int | None:
    """The first candidate by which every part has passed, at it or before it.

    None where one never does, or where an answer is missing before that.
    """
    passed: set[int] = set()
    for index, found in enumerate(flags):
        if found is None:
            return None
        passed |= {part for part, good in enumerate(found) if good}
        if len(passed) == len(found):
            return index
    return None


def _unscanned(flags: Flags) -> list[int]:
    """Candidates without an answer that a scan upwards needs, or would need next; empty where it has ended.

    Those above a candidate that passes everywhere are never needed.
    """
    if _first_to_pass(flags) is not None:
        return []
    passing = _lowest_passing(flags)
    return [index for index, found in enumerate(flags[:passing]) if found is None]


def _lowest_passing(flags: Flags) -> int | None:
    return next((index for index, found in enumerate(flags) if found and all(found)), None)


def _spans(flags: Flags) -> Iterator[tuple[int, int]]:
    """What halving leaves open, from the whole on: `low` fails, or is -1, `high` passes, or is dense, behind
    the last.

    Only middles on the way are looked at. What further replicas have answered beside it decides nothing, so
    their number does not either, nor which answers a walk begins with.
    """
    low, high = -1, len(flags)
    yield low, high
    while high - low > 1 and (found := flags[(low + high) // 2]) is not None:
        if all(found):
            high = (low + high) // 2
        else:
            low = (low + high) // 2
        yield low, high


def _unhalved(flags: Flags) -> list[int]:
    """The middle of what halving leaves open, then the middles of its halves (for further replicas), without
    those that are answered; empty where nothing is open."""
    *_, left_open = _spans(flags)
    middles, spans = [], [left_open]
    while spans:
        left, right = spans.pop(0)
        middle = (left + right) // 2
        if left < middle < right:
            middles.append(middle)
            spans += [(left, middle), (middle, right)]
    return [middle for middle in middles if flags[middle] is None]
