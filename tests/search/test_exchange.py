"""Our sampler: budgets kept and covered, members mixed, what is learned of a loss that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product

import numpy as np
import optuna
import pytest
from fakes import CHOOSING, OBJECTIVES, cost_model, landscape, space_of
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from actors.types import Allocation
from search import aims, exchange
from search.exchange import FILL, MIX, MOVES, TRADE, ExchangeSampler
from search.lagged import Snapshot
from search.landscape import Landscape
from search.packing import PLAN, RESULT, failure_of
from search.reach import BEYOND
from search.reading import MOVE
from search.records import Objective
from search.samplers import reseed

COST = cost_model()
DENSE = COST.linear_parameters
LAND = landscape(space_of(COST, group="target", levels=20), COST)
# What a parameter truly loses over what is predicted for it.
TRUE = np.exp(np.random.default_rng(5).normal(0, 0.6, len(LAND.names)))


class TestAsAnyOfOptuna(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Without a landscape it proposes in any space, as Optuna's own contract for samplers asks."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return ExchangeSampler


def study_of(sampler: ExchangeSampler, land: Landscape = LAND, directions: int = 2) -> optuna.Study:
    return optuna.create_study(directions=["minimize"] * directions, sampler=sampler)


def sampler_of(land: Landscape = LAND) -> ExchangeSampler:
    return ExchangeSampler(lambda: land, seed=0)


def levels_of(params: dict[str, int], land: Landscape = LAND) -> np.ndarray:
    return np.array([params[name] for name in land.names])


def values_of(levels: np.ndarray, multipliers: np.ndarray = TRUE, land: Landscape = LAND) -> list[float]:
    losses, size = land.of_levels(levels)
    return [size / DENSE, 2.0 + float(multipliers @ losses)]


def add(study: optuna.Study, levels: np.ndarray, land: Landscape = LAND, **changes: object) -> None:
    usual = {
        "params": dict(zip(land.names, levels.tolist(), strict=True)),
        "distributions": dict(list(study.sampler.infer_relative_search_space(study, None).items())),  # type: ignore[arg-type]
        "values": values_of(levels, land=land),
    }
    study.add_trial(create_trial(**{**usual, **changes}))  # type: ignore[arg-type]


def warm(sampler: ExchangeSampler, budgets: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)) -> optuna.Study:
    """Dense, and what the predictions alone make of some budgets."""
    study = study_of(sampler)
    add(study, np.full(len(LAND.names), 20))
    for budget in budgets:
        add(study, sampler._steps.fill(np.ones(len(LAND.names)), budget * DENSE))
    return study


def ask(study: optuna.Study, sampler: ExchangeSampler, tell: bool = True) -> FrozenTrial:
    reseed(sampler, 0, len(study.get_trials(deepcopy=False)))
    trial = study.ask(sampler.infer_relative_search_space(study, None))  # type: ignore[arg-type]
    if tell:
        study.tell(trial, values_of(levels_of(trial.params)))
    return study.get_trials(deepcopy=False)[trial.number]


def only(monkeypatch: pytest.MonkeyPatch, move: str) -> None:
    monkeypatch.setattr(exchange, "FIRST", {each: float(each == move) for each in MOVES})


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


def test_a_mixture_takes_every_level_from_members_of_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two members that split the targets between them: any mixture has levels of the one or the other,
    before its size is restored."""
    sampler = sampler_of()
    study = study_of(sampler)
    first = np.where(np.arange(len(LAND.names)) % 2, 16, 5)
    second = np.where(np.arange(len(LAND.names)) % 2, 4, 16)
    for levels in (first, second):  # the smaller one loses more: both are on the front
        size = LAND.of_levels(levels)[1] / DENSE
        add(study, levels, values=[size, 3.0 - size])
    only(monkeypatch, MIX)
    mixed = []
    monkeypatch.setattr(
        type(sampler._steps), "restore", lambda self, levels, *given: mixed.append(levels) or levels
    )
    for _ in range(6):
        ask(study, sampler, tell=False)
    assert len(mixed) >= 6
    for levels in mixed:
        assert ((levels == first) | (levels == second)).all()
    assert len({tuple(levels) for levels in mixed}) > 3


def test_a_trade_takes_the_changes_worth_most_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after it the size is restored, which is left out here."""
    sampler = sampler_of()
    study = warm(sampler, budgets=(0.8,))
    [_, parent] = sampler._reader.read(study)[0]
    monkeypatch.setattr(type(sampler._steps), "restore", lambda self, levels, *given: levels)
    best = sampler._steps.fill(TRUE, 0.6 * DENSE)
    for share in (0.1, 0.5):
        monkeypatch.setattr(exchange, "TRADED", share)
        levels = sampler._trade(parent, best, TRUE, 0.6 * DENSE)
        changed = levels != parent.place.levels
        every = np.arange(len(levels))
        moved = TRUE * np.abs(LAND.losses[every, best] - LAND.losses[every, parent.place.levels])
        assert changed.sum() == round(share * len(levels)) < (best != parent.place.levels).sum()
        assert (levels[changed] == best[changed]).all()
        assert moved[changed].min() >= moved[~changed].max()


def test_multipliers_are_learned_and_proposals_beat_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is linear in what is predicted, so the best of every size is known: the true multipliers'."""
    monkeypatch.setattr(exchange, "HEATS", (0.0, 1.0))
    sampler = sampler_of()
    study = warm(sampler)
    for _ in range(60):
        ask(study, sampler)
    findings = sampler._reader.read(study)[0]
    learned = sampler._learn(sampler._nearest(sampler._trials(findings), 0.75 * DENSE))
    found = learned.scale * sampler._features.multipliers(learned.mean)
    ranks = [np.argsort(np.argsort(each)) for each in (found, TRUE)]
    assert np.corrcoef(*ranks)[0, 1] > 0.7
    ones = np.ones(len(LAND.names))
    for budget in (0.9, 0.75, 0.65):
        least, naive, guess = (
            TRUE @ LAND.of_levels(sampler._steps.fill(each, budget * DENSE))[0]
            for each in (TRUE, ones, found)
        )
        assert guess - least < 0.25 * (naive - least)


def test_moves_that_reach_the_front_are_made_more_often() -> None:
    sampler = sampler_of()
    study = warm(sampler, budgets=())
    for number in range(40):
        good, budget = bool(number % 2), 0.99 - number / 100
        levels = sampler._steps.fill(np.ones(len(LAND.names)), budget * DENSE)
        move = TRADE if good else FILL
        add(study, levels, values=[budget, 3 - budget if good else 9.0], system_attrs={MOVE: move})
    trials = sampler._trials(sampler._reader.read(study)[0])
    drawn = Counter(sampler._move(trials) for _ in range(300))
    expected = {FILL: 20 * 1 / 22, TRADE: 2 * 21 / 22, MIX: 1 / 2}
    for move, weight in expected.items():
        assert drawn[move] / 300 == pytest.approx(weight / sum(expected.values()), abs=0.1)


def test_a_trial_is_read_at_the_ranks_it_was_scored_at() -> None:
    sampler = sampler_of()
    study = study_of(sampler)
    ranks = [None if index else 3 for index in range(len(COST.targets))]
    add(study, np.full(len(LAND.names), 20), user_attrs={PLAN: {"ranks": ranks}})
    finding = sampler._reader.read(study)[0][0]
    assert finding.total == pytest.approx(LAND.of_ranks(ranks)[0].sum()) != 0
    assert finding.size == LAND.of_ranks(ranks)[1] < DENSE


def test_members_that_violate_a_constraint_are_parents_only_where_all_do() -> None:
    sampler = sampler_of()
    study = study_of(sampler)
    best, other = np.full(len(LAND.names), 5), np.full(len(LAND.names), 10)
    add(study, best, values=[0.3, 2.1], system_attrs={"constraints:size": 1.0})
    add(study, other, values=[0.5, 2.0], system_attrs={"constraints:size": 2.0})
    broken = sampler._trials(sampler._reader.read(study)[0])
    add(study, other, values=[0.5, 2.4], system_attrs={"constraints:size": -1.0})
    both = sampler._trials(sampler._reader.read(study)[0])
    assert (broken.members.tolist(), both.members.tolist()) == ([0], [2]), "the least violation, then none"


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


@pytest.mark.parametrize("running_then", [False, True])
def test_the_place_of_a_lost_trial_is_free_once_it_is_shown_to_have_failed(running_then: bool) -> None:
    """In a deterministic search one that has ended is shown to run, and holds its place, for a while."""
    sampler = sampler_of()
    study = warm(sampler, ())
    levels = sampler._steps.fill(np.ones(len(LAND.names)), 0.5 * DENSE)
    attributes = {RESULT: failure_of("the replica died", lost=True)}
    add(study, levels, state=TrialState.FAIL, values=None, user_attrs=attributes)
    key = sampler._reader._place(study.get_trials()[1]).key  # type: ignore[union-attr]
    if running_then:
        assert key in sampler._reader.read(Snapshot(study, 1))[2]
    assert key not in sampler._reader.read(study)[2]
    assert key in sampler._reader.read(Snapshot(study, 1))[2]
    add(study, levels)
    assert key in sampler._reader.read(study)[2], "another trial has it"


def test_what_is_in_the_study_is_not_proposed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running or failed. All that a fill can reach is there but for one point."""
    space = space_of(COST, group="module", levels=1)
    land = landscape(space, COST)
    monkeypatch.setattr(exchange, "ATTEMPTS", 200)
    monkeypatch.setattr(aims, "PARTS", 1)  # a trial of any number may be of any size
    fill, ones = sampler_of(land)._steps.fill, np.ones(len(land.names))
    points = np.unique([fill(ones, size) for size in np.linspace(0.2 * DENSE, DENSE, 100)], axis=0)
    for seed, left in product(range(4), range(len(points) - 1)):
        sampler = sampler_of(land)
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        others = [point for number, point in enumerate(points) if number != left]
        for levels, state in zip(others, cycle((TrialState.RUNNING, TrialState.FAIL))):
            params = dict(zip(land.names, levels.tolist(), strict=True))
            study.add_trial(create_trial(state=state, params=params, distributions=space.distributions))
        reseed(sampler, seed, len(others))
        found = levels_of(study.ask(space.distributions).params, land)
        assert (found == points[left]).all()


def test_the_method_that_loses_least_is_learned() -> None:
    """up_proj loses twice as much by one method; the others' make no difference."""
    space = space_of(COST, group="target", levels=20, factors=CHOOSING)
    land = landscape(space, COST)
    sampler = sampler_of(land)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    add(study, np.full(len(land.names), 20), land=land, params=space.params(Allocation.dense(COST.targets)))
    own = np.array(["up_proj" in name for name in land.names])
    chosen = []
    for number in range(1, 60):
        reseed(sampler, 0, number)
        trial = study.ask(space.distributions)
        losses, size = land.of_levels(levels_of(trial.params, land))
        worse = {"weight": 2.0, "feature": 1.5, "curvature": 1.0}[trial.params["method/up_proj"]]
        chosen.append(trial.params["method/up_proj"])
        study.tell(trial, [size / DENSE, 2.0 + worse * losses[own].sum() + losses[~own].sum()])
    assert Counter(chosen[30:])["curvature"] > 18


def test_a_landscape_of_other_objectives_is_refused() -> None:
    sampler = sampler_of()
    study = study_of(sampler, directions=3)
    with pytest.raises(ValueError, match="the study has 3 objectives, the landscape 2"):
        study.ask(sampler.infer_relative_search_space(study, None))  # type: ignore[arg-type]


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


def test_several_objectives_are_mixed_anew_for_each_proposal() -> None:
    objectives = (*OBJECTIVES, Objective("reasoning.acc", False))
    land = landscape(space_of(COST, group="target", levels=20), COST, objectives)
    sampler = sampler_of(land)
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"], sampler=sampler)
    for budget in (1.0, 0.9, 0.8):
        levels = sampler._steps.fill(np.ones(len(land.names)), budget * DENSE)
        size, nll = values_of(levels)
        add(study, levels, land=land, values=[size, nll, 0.7 - 0.3 * (1 - size)])
    findings = sampler._reader.read(study)[0]
    assert [each.values[2] for each in findings] == [-trial.values[2] for trial in study.trials]
    mixtures = [sampler._trials(findings).loss for _ in range(5)]
    assert all((np.diff(loss) > 0).all() and loss[0] == 0 for loss in mixtures)
    assert len({round(float(loss[2]), 9) for loss in mixtures}) == 5
