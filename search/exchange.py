"""Our sampler: it keeps the front's members and moves parameters between them, at sizes covered evenly.

A proposal is made in four steps, all on arrays.

1. *Aim*: the half of the range of sizes whose turn it is, and in it the size that promises most
   (`search.aims`). The range goes from the smallest size that is of interest and whose loss is still of use
   up to dense, or to what the bounds on costs allow. Where models are to be chosen at some sizes, each of
   them in turn for a share of the proposals.
2. *Learn*: how much more or less each parameter loses than predicted, from the trials nearest in size
   (`search.multipliers`), as the posterior's mean or as a draw from it, more or less of its spread.
3. *Move*, in one of three ways, those more often that reached the front lately:
   `fill` shares the parameters out anew; `trade` takes the nearest member of the front, brought to the size,
   and makes only the trades worth most; `mix` takes each level from one of two members.
4. *Restore* the size that was aimed at by the cheapest steps (`search.trades`).

Invariant: a proposal follows from the study's trials, the trial's number and the generators' state alone.
What is kept between proposals is what was read of finished trials, which never change; so a restart goes on
the same. Losses of trials that failed or were pruned are not learned from, nor are those of another space.
Where small trials failed or violate a bound, ever fewer are proposed (`search.reach`); a failure that is none
of the model's, as where a replica died, says nothing and counts for nothing.

Tried on made-up losses and no help: multipliers of single parameters without those of module types and
blocks (less hypervolume up to 100 trials); aiming at a plain sequence, without the expected gain; mixing for
a third of the proposals; the posterior's whole spread from the first trial on; acting on half of what is
learned until eight trials of its own are done, though the first two after a ladder of seeds may be poor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.study import Study
from optuna.trial import FrozenTrial

from search.aims import draw, expected_gains, part_of, staircase
from search.features import Features
from search.landscape import Landscape
from search.multipliers import Learned, learn, of_size
from search.reach import Reach, reach
from search.reading import MOVE, Finding, Place, Reader
from search.trades import Steps

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FILL, TRADE, MIX = MOVES = ("fill", "trade", "mix")
# Each move's share of proposals before any is known to succeed: the model is good from the first trial on.
FIRST = {FILL: 20.0, TRADE: 2.0, MIX: 1.0}
# Moves of so many last proposals decide how often each is made.
LATELY = 48
# Of the posterior's spread around its mean; drawn anew for each proposal. Zero alone learns nothing new, one
# alone leaves what is known unused.
HEATS = (0.0, 0.25, 0.5, 1.0)
# Finished trials at which half of that spread is used: at first, filling the range with what is predicted
# pays more than learning where the prediction is wrong.
WARM_UP = 100.0
# Every which proposal aims at a size that a model is to be chosen at. The others come near it by chance, and
# a little below it their loss is above what a seed has there. Odd: both parts of the range give up turns.
WANTED_EVERY = 5
# Trials that are learned from, nearest in size: the equations of 256 are solved in about a millisecond.
NEAREST = 256
# A trial that is this share of the dense size away counts with twice the error.
REACH = 0.2
# Share of the parameters that a `trade` takes from `fill`, at least one; restoring the size moves others.
TRADED = 0.1
# Members of the front, nearest in size, that a `mix` chooses two from.
PARENTS = 4
# No parameter is taken to lose less than this share of what is predicted: the prediction is a sum of squares.
LEAST = 0.1
# A proposal that is in the study already is made again, this often.
ATTEMPTS = 8


@dataclass(frozen=True)
class _Trials:
    """Finished trials (n) by number: their sizes and the `totals` (n,) predicted for them.

    `losses` (n, o) are increases over dense of the objectives that are no budget, all minimised; `loss` (n,)
    is one mixture of them. `kept` index those that keep to the constraints or, where none does, violate them
    least; `members` are the front of these, of size and the mixture. `broken` are sizes of all others, and of
    trials that failed.
    """

    findings: list[Finding]
    sizes: Integers
    totals: Floats
    losses: Floats
    loss: Floats
    kept: NDArray[np.intp]
    members: NDArray[np.intp]
    broken: Integers


@dataclass(frozen=True)
class _Near:
    """Trials (n) that are learned from, nearest first: `sizes` as shares of the dense one, their `loss`, the
    loss `predicted` (n, p) of each parameter, their `methods` (n, c), and the `spread` of their errors."""

    sizes: Floats
    loss: Floats
    predicted: Floats
    methods: Integers
    spread: Floats


class ExchangeSampler(BaseSampler):
    """See the module. `landscape` is asked for once, at the first proposal.

    Without a landscape there is nothing to exchange: every parameter is drawn independently.
    """

    def __init__(self, landscape: Callable[[], Landscape] | None = None, seed: int | None = None) -> None:
        self._rng = LazyRandomState(seed)
        self._independent = RandomSampler(seed=seed)
        self._make_landscape = landscape

    # -- the edge: trials and parameters -------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._make_landscape is None:
            return {}
        top = self._landscape.sizes.shape[1] - 1
        found: dict[str, BaseDistribution] = {name: IntDistribution(0, top) for name in self._landscape.names}
        return found | {
            name: CategoricalDistribution(choices) for name, choices in self._landscape.methods.items()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._make_landscape is None or not search_space:
            return {
                name: self.sample_independent(study, trial, name, distribution)
                for name, distribution in search_space.items()
            }
        if len(study.directions) != len(self._landscape.budgets):
            raise ValueError(
                f"the study has {len(study.directions)} objectives, "
                f"the landscape {len(self._landscape.budgets)}"
            )
        findings, failed, taken = self._reader.read(study)
        trials = self._trials(findings, failed)
        for _ in range(ATTEMPTS):
            move, place = self._propose(trial.number, trials)
            if place.key not in taken:
                break
        study._storage.set_trial_system_attr(trial._trial_id, MOVE, move)
        chosen = zip(self._landscape.methods.items(), place.methods, strict=True)
        levels = place.levels.tolist()
        return dict(zip(self._landscape.names, levels, strict=True)) | {
            name: choices[index] for (name, choices), index in chosen
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self._rng.rng.seed()
        self._independent.reseed_rng()

    @cached_property
    def _landscape(self) -> Landscape:
        assert self._make_landscape is not None
        return self._make_landscape()

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self._landscape)

    @cached_property
    def _features(self) -> Features:
        return Features.of(self._landscape)

    @cached_property
    def _dense(self) -> int:
        return int(self._landscape.sizes[:, -1].sum())

    @cached_property
    def _steps(self) -> Steps:
        return Steps.of(self._landscape.sizes, self._landscape.losses)

    # -- arrays --------------------------------------------------------------------------------

    def _trials(self, findings: list[Finding], failed: Sequence[int] = ()) -> _Trials:
        """The trials, their losses mixed by random weights where several objectives are no budget."""
        land, rng = self._landscape, self._rng.rng
        kept = ~land.budgets
        weights = rng.dirichlet(np.ones(kept.sum())) if kept.any() else np.empty(0)
        sizes = np.array([each.size for each in findings], dtype=np.int64)
        totals = np.array([each.total for each in findings], dtype=np.float64)
        losses = np.array([each.values for each in findings]).reshape(len(findings), len(kept))[:, kept]
        if findings:
            dense = np.flatnonzero(totals == 0)
            losses = losses - (losses[dense[0]] if len(dense) else losses.min(axis=0))
        scales = np.maximum(losses.std(axis=0), np.finfo(float).tiny) if len(findings) > 1 else 1.0
        loss = losses @ (weights / scales) if len(weights) > 1 else losses.sum(axis=1)
        violations = np.array([each.violation for each in findings], dtype=np.float64)
        best = np.flatnonzero(violations == violations.min(initial=np.inf))
        members = best[staircase(sizes[best], loss[best])]
        broken = np.append(np.delete(sizes, best), np.array(failed, dtype=np.int64))
        return _Trials(findings, sizes, totals, losses, loss, best, members, broken)

    def _propose(self, number: int, trials: _Trials) -> tuple[str, Place]:
        """The move made, and where it leads."""
        rng, steps = self._rng.rng, self._steps
        within = self._reach(trials)
        candidates = self._candidates(number, within)
        near = self._nearest(trials, float(candidates.mean()))
        learned = self._learn(near)
        count = len(trials.findings)
        heat = HEATS[rng.randint(len(HEATS))] * count / (count + WARM_UP) if learned.scale > 0 else 0.0
        coefficients = learned.mean + heat * (learned.draw - learned.mean)
        multipliers = np.maximum(self._features.multipliers(coefficients), LEAST)
        aim = self._aim(candidates, trials, near, learned.scale, multipliers, within.high)
        methods = self._features.methods(coefficients if learned.scale > 0 else learned.draw)
        move = self._move(trials)
        levels = steps.fill(multipliers, aim)
        if move == TRADE:
            [parent, *_] = self._parents(trials, aim)
            levels, methods = self._trade(parent, levels, multipliers, aim), parent.place.methods
        elif move == MIX:
            parents = self._parents(trials, aim)
            first, second = (parents[rng.randint(len(parents))] for _ in range(2))
            mixed = np.where(rng.random_sample(len(levels)) < 0.5, first.place.levels, second.place.levels)
            methods = np.where(
                rng.random_sample(len(methods)) < 0.5, first.place.methods, second.place.methods
            )
            levels = steps.restore(mixed, multipliers, aim)
        return move, Place(levels, methods)

    def _candidates(self, number: int, within: Reach) -> Floats:
        """Sizes (c,) that a trial of this number may aim at; one that is wanted may be below the range."""
        wanted = self._landscape.wanted
        wanted = wanted[(wanted >= within.limit) & (wanted < within.high)]
        if len(wanted) and number % WANTED_EVERY == 0:
            turn = number // WANTED_EVERY % len(wanted)
            return wanted[turn : turn + 1].astype(np.float64)
        return part_of(number, within.low, within.high)

    def _reach(self, trials: _Trials) -> Reach:
        """The sizes worth aiming at."""
        smallest, most = int(self._steps.size(self._steps.lowest)), self._landscape.most
        told, kept = self._landscape.least, trials.sizes[trials.kept]
        return reach(smallest, told, self._smallest(trials), most, self._dense, kept, trials.broken)

    def _smallest(self, trials: _Trials) -> int:
        """The smallest size worth aiming at: where some loss would be all the room there is, or what is told.

        Where no objective says how much room it has and nothing is told, the smallest size that was scored.
        """
        land, steps = self._landscape, self._steps
        sizes, predicted = self._frontier(np.ones(len(land.names)))
        rooms = land.rooms[~land.budgets]
        found = max(int(steps.size(steps.lowest)), min(land.least, land.most))
        used = np.flatnonzero(trials.totals > 0)
        for index in np.flatnonzero(np.isfinite(rooms)):
            cost = float(np.median(trials.losses[used, index] / trials.totals[used])) if len(used) else 1.0
            found = max(found, int(sizes[np.argmax(cost * predicted <= rooms[index])]))
        if len(used) and not land.least and not np.isfinite(rooms).any():
            found = max(found, int(trials.sizes.min()))
        return found

    def _frontier(self, multipliers: Floats) -> tuple[Integers, Floats]:
        lowest, _ = self._landscape.of_levels(self._steps.lowest)
        return self._steps.frontier(multipliers, lowest)

    def _aim(
        self,
        candidates: Floats,
        trials: _Trials,
        near: _Near,
        scale: float,
        multipliers: Floats,
        high: int,
    ) -> float:
        """The size among the candidates that promises the most up to `high`; any where nothing is known."""
        rng = self._rng.rng
        if scale <= 0 or not len(trials.members):
            return float(candidates[rng.randint(len(candidates))])
        sizes, predicted = self._frontier(multipliers)
        at = np.maximum(np.searchsorted(sizes, candidates, side="right") - 1, 0)
        members = trials.sizes[trials.members], trials.loss[trials.members]
        known = of_size(sizes[at] / self._dense, near.sizes)
        offset = known @ (near.loss - scale * (near.predicted @ multipliers))
        expected = offset + scale * predicted[at]
        worst = max(float(expected[0]), float(members[1].max()))
        gains = expected_gains(sizes[at].astype(float), expected, members, worst, high)
        return float(candidates[draw(gains, rng)])

    def _nearest(self, trials: _Trials, aim: float) -> _Near:
        """The trials nearest to `aim` whose loss is predicted to be any."""
        away = np.abs(trials.sizes - aim) / (REACH * self._dense)
        order = np.argsort(away, kind="stable")
        near = order[trials.totals[order] > 0][:NEAREST]
        predicted = np.array([trials.findings[index].predicted for index in near]).reshape(
            len(near), len(self._landscape.names)
        )
        methods = np.array([trials.findings[index].place.methods for index in near]).reshape(
            len(near), len(self._landscape.methods)
        )
        return _Near(trials.sizes[near] / self._dense, trials.loss[near], predicted, methods, 1 + away[near])

    def _learn(self, near: _Near) -> Learned:
        features = self._features.of_trials(near.predicted, near.methods)
        totals = near.predicted.sum(axis=1)
        return learn(features, totals, near.loss, near.spread, near.sizes, self._rng.rng)

    def _move(self, trials: _Trials) -> str:
        """Drawn by how often each of our last moves is on the front, as if `FIRST` had been seen before."""
        if not len(trials.members):
            return FILL
        members = set(trials.members.tolist())
        made = [
            (each.move, index in members) for index, each in enumerate(trials.findings) if each.move in MOVES
        ]
        weights = []
        for move in MOVES:
            successes = [good for name, good in made[-LATELY:] if name == move]
            weights.append(FIRST[move] * (1 + sum(successes)) / (2 + len(successes)))
        return str(self._rng.rng.choice(MOVES, p=np.array(weights) / sum(weights)))

    def _parents(self, trials: _Trials, aim: float) -> list[Finding]:
        """Members of the front, nearest in size first."""
        order = np.argsort(np.abs(trials.sizes[trials.members] - aim), kind="stable")
        return [trials.findings[trials.members[index]] for index in order[:PARENTS]]

    def _trade(self, parent: Finding, best: Integers, multipliers: Floats, aim: float) -> Integers:
        """The parent with only those of the changes towards `best` that move the most loss."""
        losses, steps = self._landscape.losses, self._steps
        levels = steps.restore(parent.place.levels, multipliers, aim)
        every = np.arange(len(levels))
        moved = multipliers * np.abs(losses[every, best] - losses[every, levels])
        most = max(1, round(TRADED * len(levels)))
        changed = np.argsort(-moved, kind="stable")[:most]
        levels = levels.copy()
        levels[changed] = best[changed]
        return steps.restore(levels, multipliers, aim)
