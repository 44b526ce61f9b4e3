"""Which sizes our sampler aims at: budgets covered, bounds kept, what breaks left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from exchanges import (
    DENSE,
    LAND,
    TRUE,
    add,
    ask,
    levels_of,
    only,
    sampler_of,
    study_of,
    values_of,
    warm,
)
from optuna.trial import TrialState

from search import exchange
from search.exchange import MOVES, ExchangeSampler
from search.landscape import Landscape
from search.packing import RESULT, failure_of
from search.reach import BEYOND
from search.reading import MOVE
from search.samplers import reseed


@pytest.mark.parametrize("move", MOVES)
def test_the_size_aimed_at_is_kept_within_a_step(monkeypatch: pytest.MonkeyPatch, move: str) -> None:
    sampler = sampler_of()
    study, aims = warm(sampler), []
    aim = ExchangeSampler._aim
    monkeypatch.setattr(
        ExchangeSampler, "_aim", lambda self, *given: aims.append(aim(self, *given)) or aims[-1]
    )
    only(monkeypatch, move)
    for _ in range(12):
        trial = ask(study, sampler)
        size = LAND.of_levels(levels_of(trial.params))[1]
        assert aims[-1] - sampler._steps.width.max() < size <= aims[-1]
        assert trial.system_attrs[MOVE] == move


def test_budgets_are_covered_evenly_from_dense_to_the_smallest_of_use() -> None:
    """Halves take turns, and every quarter gets proposals; the range ends at the smallest that was scored."""
    sampler = sampler_of()
    study = warm(sampler)
    budgets = [ask(study, sampler).values[0] for _ in range(40)]
    counts, _ = np.histogram(budgets, bins=np.linspace(0.6, 1, 5))
    assert counts.sum() >= 36
    assert abs(counts[:2].sum() - counts[2:].sum()) <= 6
    assert counts.min() >= 4


@pytest.mark.parametrize(("least", "lowest"), [(0.8, 0.8), (0.88, 0.88), (0.3, 0.3), (0.95, 0.85)])
def test_no_size_below_the_smallest_of_interest_is_aimed_at(least: float, lowest: float) -> None:
    """Unless it is one that a model is to be chosen at, or bounds on costs are below it: then right below
    these."""
    land = replace(LAND, least=int(least * DENSE), most=int(0.9 * DENSE), wanted=np.array([0.55 * DENSE]))
    sampler = sampler_of(land)
    study = warm(sampler)
    step = max(sampler._steps.width) / DENSE
    sizes = []
    for _ in range(40):
        trial = ask(study, sampler)
        if trial.number % exchange.WANTED_EVERY:
            sizes.append(land.of_levels(levels_of(trial.params))[1] / DENSE)
    assert lowest - step < min(sizes) < lowest + 0.05


def test_room_for_loss_sets_the_smallest_budget() -> None:
    """Half of the greatest predicted loss, at a scale of 1, is where the range begins."""
    room = 0.5 * float(LAND.losses[:, 0].sum())
    land = Landscape(**{**vars(LAND), "rooms": np.array([np.inf, room])})
    sampler = sampler_of(land)
    study = study_of(sampler)
    ones = np.ones(len(LAND.names))
    for budget in (1.0, 0.9, 0.7):
        levels = sampler._steps.fill(ones, budget * DENSE)
        add(study, levels, values=values_of(levels, ones))
    losses = []
    for _ in range(24):
        levels = levels_of(ask(study, sampler).params)
        losses.append(values_of(levels, ones)[1] - 2.0)
    assert 0.6 * room < max(losses) < 1.6 * room


def test_sizes_that_the_constraints_rule_out_are_not_aimed_at() -> None:
    """A bound on costs is where the range ends; one on the loss, a little below what keeps to it."""
    land = replace(LAND, most=round(0.82 * DENSE))
    sampler = sampler_of(land)
    study = study_of(sampler)
    for budget in (1.0, 0.9, 0.8, 0.7, 0.6):
        levels = sampler._steps.fill(np.ones(len(LAND.names)), budget * DENSE)
        bounds = {"constraints:budget.linear": budget - 0.82, "constraints:nll": 0.65 - budget}
        add(study, levels, system_attrs=bounds)
    sizes = []
    for _ in range(20):
        reseed(sampler, 0, len(study.get_trials(deepcopy=False)))
        trial = study.ask(sampler.infer_relative_search_space(study, None))  # type: ignore[arg-type]
        sizes.append(land.of_levels(levels_of(trial.params))[1] / DENSE)
    assert 0.62 < min(sizes) < 0.7 < 0.77 < max(sizes) <= 0.82


def test_where_no_size_keeps_to_the_bounds_the_smallest_are_tried() -> None:
    land = replace(LAND, most=0)
    sampler = sampler_of(land)
    within = sampler._reach(sampler._trials([]))
    assert within.low == within.limit == sampler._steps.size(sampler._steps.lowest)
    assert within.high == within.low + round(BEYOND * DENSE)


@pytest.mark.parametrize("room", [0.2, np.inf])
def test_a_bound_on_costs_below_all_that_was_scored_is_kept_to(room: float) -> None:
    """Though a model loses all that is of use there, or nobody says what is."""
    land = replace(LAND, most=round(0.45 * DENSE), rooms=np.array([np.inf, room]))
    sampler = sampler_of(land)
    study = warm(sampler)
    sizes = [land.of_levels(levels_of(ask(study, sampler).params))[1] for _ in range(12)]
    assert 0.35 * DENSE < min(sizes) < max(sizes) <= land.most


@pytest.mark.parametrize("fails", [False, True])
def test_where_small_models_break_ever_fewer_are_proposed(fails: bool) -> None:
    """By a bound that they violate or without a score; the smallest that do not break are found all the same,
    and no size that a model was to be chosen at is asked for in vain."""
    room = float(LAND.losses[:, 0].sum())
    land = replace(LAND, wanted=np.array([round(0.62 * DENSE)]), rooms=np.array([np.inf, room]))
    sampler = sampler_of(land)
    study = study_of(sampler, land)
    bound = values_of(sampler._steps.fill(TRUE, 0.7 * DENSE))[1]  # the loss of the best model at 70%
    broken, sizes = [], []
    add(study, np.full(len(LAND.names), 20))
    for _ in range(100):
        trial = ask(study, sampler, tell=False)
        values = values_of(levels_of(trial.params))
        broken.append(values[1] > bound)
        sizes.append(values[0])
        if fails and broken[-1]:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study._storage.set_trial_system_attr(trial._trial_id, "constraints:nll", values[1] - bound)
            study.tell(trial.number, values)
    assert 1 <= sum(broken) <= 20  # half of all, where the strip stays as it is
    assert min(size for size, bad in zip(sizes, broken, strict=True) if not bad) < 0.72


def test_only_failures_of_the_model_hold_small_sizes_back() -> None:
    """A replica that died says nothing of a size."""
    reaches = []
    for lost in (None, True, False):
        sampler = sampler_of()
        study = warm(sampler)
        if lost is not None:
            levels = sampler._steps.fill(np.ones(len(LAND.names)), 0.57 * DENSE)
            result = failure_of("broken", lost)
            add(study, levels, state=TrialState.FAIL, values=None, user_attrs={RESULT: result})
        findings, failed, _ = sampler._reader.read(study)
        reaches.append(sampler._reach(sampler._trials(findings, failed)))
    nothing, lost, broken = reaches
    assert lost == nothing
    assert nothing.limit < broken.limit


def test_every_so_many_proposals_aim_at_a_wanted_size_in_turn() -> None:
    wanted = (np.array([0.9, 0.5, 0.01, 1.2]) * DENSE).astype(np.int64)
    land = replace(LAND, wanted=wanted)
    sampler = sampler_of(land)
    study = warm(sampler)
    step = max(sampler._steps.width)
    reached = Counter()
    for _ in range(6 * exchange.WANTED_EVERY):
        trial = ask(study, sampler)
        size = land.of_levels(levels_of(trial.params))[1]
        if trial.number % exchange.WANTED_EVERY == 0:
            [at] = [place for place, aim in enumerate(wanted) if aim - step < size <= aim]
            reached[at] += 1
    assert reached == {0: 3, 1: 3}, "not those that no allocation has, or that are larger than dense"
