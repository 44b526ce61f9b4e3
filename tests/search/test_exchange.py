"""Our sampler: members mixed, parameters traded, what is learned of a loss that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import cycle, product

import numpy as np
import optuna
import pytest
from exchanges import (
    COST,
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
from fakes import CHOOSING, OBJECTIVES, landscape, space_of
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState, create_trial

from actors.types import Allocation
from search import aims, exchange
from search.exchange import FILL, MIX, TRADE, ExchangeSampler
from search.lagged import Snapshot
from search.packing import PLAN, RESULT, failure_of
from search.reading import MOVE
from search.records import Objective
from search.samplers import reseed


class TestAsAnyOfOptuna(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Without a landscape it proposes in any space, as Optuna's own contract for samplers asks."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return ExchangeSampler


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
