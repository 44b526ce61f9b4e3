"""Constraints: violations in closed form, in the storage as Optuna's own, in samplers, fronts and choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import optuna
import pytest
from fakes import (
    DENSE_NLL,
    TARGETS,
    MadeUpPool,
    cost_model,
    dies_before_the_state,
    open_study,
    plain,
    propose_and_complete,
    score_of,
    space_of,
    stored,
)
from optuna.samplers import BaseGASampler
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import FrozenTrial, TrialState, create_trial

from actors.samples import pack_floats
from actors.types import Allocation, BiasScore, RankfrontError, TaskScore, TextScore
from search.choosing import chosen
from search.constraints import Constraint, broken, violations
from search.packing import RESULT
from search.pareto import hypervolume_history
from search.pool import Job, Outcome
from search.records import StudySummary
from search.runner import Runner, Stop, hypervolumes, minimised, reference_point
from search.samplers import make_sampler, reseed
from search.sections import SamplerSection, StopSection
from search.session import DenseNotes
from search.study import SearchStudy
from search.terminal import warn_infeasible

COST = cost_model()
PERPLEXITY = Constraint("perplexity", 30.0)
BUDGET = Constraint("budget.model", 0.8)
BOTH = (PERPLEXITY, BUDGET)
NAMES = get_args(SamplerSection.model_fields["name"].annotation)
SPACE = space_of(COST).distributions


def enqueue(study: SearchStudy, *shares: float) -> None:
    """Uniform allocations: their loss rises as their size falls."""
    study.enqueue((COST.uniform(share), "uniform") for share in shares)


def scored() -> dict[str, float]:
    tasks = {"boolq": TaskScore(10, acc=0.6, acc_norm=None, margin=-0.25)}
    bias = {"crows_pairs": BiasScore(10, {"stereotype": 0.7, "likelihood_diff": 3.0}, {})}
    whole = replace(score_of(Allocation.dense(TARGETS), nll=3.0), tasks=tasks, bias=bias)
    return {**whole.metrics, "bytes": 3e8, "budget.model": 0.9}


@pytest.mark.parametrize(
    ("metric", "bound", "violation", "told"),
    [
        ("perplexity", 10.0, 3.0 - math.log(10), "perplexity 20.09 > 10"),
        ("perplexity", 25.0, 3.0 - math.log(25), "perplexity 20.09 <= 25"),
        ("nll", 2.5, 0.5, "nll 3 > 2.5"),
        ("reasoning.boolq.acc", 0.65, 0.05, "reasoning.boolq.acc 0.6 < 0.65"),
        ("reasoning.acc", 0.5, -0.1, "reasoning.acc 0.6 >= 0.5"),
        ("reasoning.boolq.margin", 0.0, 0.25, "reasoning.boolq.margin -0.25 < 0"),
        ("bias.crows_pairs.stereotype", 0.6, 0.1, "bias.crows_pairs.stereotype 0.7 > 0.6"),
        ("bytes", 2e8, math.log(1.5), "bytes 300,000,000 > 200,000,000"),
        ("budget.model", 0.9, 0.0, "budget.model 0.9 <= 0.9"),
    ],
)
def test_a_violation_is_how_far_a_bound_is_passed(
    metric: str, bound: float, violation: float, told: str
) -> None:
    constraint = Constraint(metric, bound)
    [found] = violations([constraint], scored()).values()
    assert found == pytest.approx(violation, abs=1e-12)
    assert constraint.told(found) == told


def test_optuna_alone_reads_the_constraints(tmp_path: Path) -> None:
    """Under their names, beside the values; its best trials are those of the feasible ones."""
    study = open_study(tmp_path, constraints=(PERPLEXITY, BUDGET))
    enqueue(study, 0.95, 0.8, 0.75, 0.5, 0.3)
    propose_and_complete(study, 5)
    seen = plain(tmp_path)
    for trial, row in zip(seen.trials, study.rows(), strict=True):
        assert row.score is not None
        expected = {
            "perplexity": row.score.text.nll - math.log(30),
            "budget.model": row.budget_model - 0.8,
        }
        assert trial.constraints == pytest.approx(expected)
        assert trial.constraints == row.constraints
    feasible = [row.number for row in study.rows() if row.feasible]
    assert feasible
    assert len(feasible) < 5
    assert [trial.number for trial in seen.best_trials] == feasible
    assert open_study(tmp_path).rows() == study.rows()


def test_constraints_are_written_before_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished trials are immutable; a driver that died there writes the same again."""
    study = open_study(tmp_path, constraints=(PERPLEXITY,))
    planned = study.propose("random")
    with dies_before_the_state(study, monkeypatch):
        study.complete(planned, score_of(planned.allocation))
    [before] = stored(tmp_path)
    assert before.state == TrialState.RUNNING
    assert RESULT in before.user_attrs
    again = open_study(tmp_path, constraints=(PERPLEXITY,))
    assert again.replay() == [0]
    [after] = stored(tmp_path)
    assert after.state == TrialState.COMPLETE
    assert after.constraints == before.constraints == again.rows()[0].constraints
    assert len(after.constraints) == 1


def test_a_part_has_the_constraints_that_need_no_score(tmp_path: Path) -> None:
    study = open_study(tmp_path, constraints=(PERPLEXITY, BUDGET))
    planned = study.propose("random")
    part = replace(score_of(planned.allocation), stopped_by=0, tasks={})
    study.prune(planned, part)
    [trial] = stored(tmp_path)
    size = COST.budgets(planned.allocation)["budget.model"]
    assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"budget.model": size - 0.8})


def test_a_failed_trial_has_none(tmp_path: Path) -> None:
    study = open_study(tmp_path, constraints=(PERPLEXITY,))
    study.fail(study.propose("random").number, "broken")
    assert stored(tmp_path)[0].constraints == {}


# -- samplers ---------------------------------------------------------------------------------


def history(folder: Path, sampler: str) -> SearchStudy:
    """One generation of fourteen uniform allocations, all on one front where nobody heeds the bound: six of
    them keep to it."""
    study = open_study(folder, sampler, population=14, constraints=(PERPLEXITY,))
    enqueue(study, *np.linspace(0.3, 0.95, 14))
    propose_and_complete(study, 14)
    assert sum(row.perplexity <= 30 for row in texts(study)) == 5
    return study


def texts(study: SearchStudy) -> list[TextScore]:
    return [row.score.text for row in study.rows() if row.score is not None]


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_parents_are_feasible(tmp_path: Path, name: str) -> None:
    """Five of fourteen keep to the bound; whoever is sixth violates it least."""
    study = history(tmp_path, name)
    sampler = make_sampler(SamplerSection(name=name, population=6))
    assert isinstance(sampler, BaseGASampler)
    parents = {trial.number for trial in sampler.select_parent(study._mirror, 1)}
    by_perplexity = sorted(range(14), key=lambda number: texts(study)[number].nll)
    assert parents == set(by_perplexity[:6])


def test_tpe_learns_from_the_feasible(tmp_path: Path) -> None:
    """Its better part is of feasible trials only."""
    study = history(tmp_path, "tpe")
    trials = study._mirror.get_trials()
    below, above = _split_trials(study._mirror, trials, 4)
    assert len(below) == 4
    assert all(row.perplexity <= 30 for row in (texts(study)[trial.number] for trial in below))
    assert len(above) == 10


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe"])
def test_a_search_moves_to_where_the_bound_holds(tmp_path: Path, sampler: str) -> None:
    """Small models at random, of which few keep to it."""
    bound = Constraint("nll", DENSE_NLL + 0.8)
    study = open_study(tmp_path, sampler, levels=40, constraints=(bound,))
    propose_and_complete(study, 90)
    kept = [row.feasible for row in study.rows()]
    assert sum(kept[-30:]) > sum(kept[:30]) + 8


@pytest.mark.parametrize("sampler", ["exchange", "gp"])
def test_a_sampler_that_predicts_keeps_to_the_bound_soon(tmp_path: Path, sampler: str) -> None:
    """Three proposals after ten trials; at random about one in thirty keeps to it."""
    study = open_study(tmp_path, sampler, levels=40, constraints=(Constraint("nll", DENSE_NLL + 0.8),))
    propose_and_complete(study, 13)
    assert sum(row.feasible for row in study.rows()[10:]) >= 2


def test_random_heeds_no_bound(tmp_path: Path) -> None:
    free, bound = (tmp_path / name for name in ("free", "bound"))
    for folder in (free, bound):
        folder.mkdir()
    studies = open_study(free, "random"), open_study(bound, "random", constraints=(Constraint("nll", 1.0),))
    unbounded, bounded = (propose_and_complete(study, 15) for study in studies)
    assert unbounded == bounded


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_that_another_program_completed_without_constraints_ends_no_search(
    tmp_path: Path, name: str
) -> None:
    """It told values and no violation; every sampler goes on, also after a restart."""
    study = open_study(tmp_path, name, constraints=BOTH)
    propose_and_complete(study, 11)
    others = plain(tmp_path)
    others.tell(others.ask(dict(SPACE)), [0.5, 2.5])
    propose_and_complete(study, 1)
    propose_and_complete(open_study(tmp_path, name, constraints=BOTH), 1)
    assert [trial.number for trial in stored(tmp_path) if not trial.constraints] == [11]


def told(number: int, violated: Mapping[str, float], state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    """A trial as another program may leave it."""
    params = {name: (3 * number + 5 * index) % 11 for index, name in enumerate(SPACE)}
    values = [float(sum(params.values())), -float(min(params.values()))]
    ended = values if state == TrialState.COMPLETE else None
    return create_trial(
        state=state, params=params, distributions=SPACE, values=ended, constraints=dict(violated)
    )


def proposed_by_gp(constraints: tuple[Constraint, ...], last: FrozenTrial) -> dict[str, Any]:
    """After eleven trials, which violate all of `constraints` or none, and `last`."""
    study = optuna.create_study(directions=["minimize"] * 2)
    for number in range(11):
        study.add_trial(told(number, {each.metric: number - 6.0 for each in constraints}))
    study.add_trial(last)
    study.sampler = make_sampler(SamplerSection(name="gp"), constraints=constraints)
    reseed(study.sampler, 0, 12)
    return study.ask(dict(SPACE)).params


@pytest.mark.parametrize("violated", [{}, {"perplexity": 1.0}, {"perplexity": 50.0, "theirs": 50.0}])
def test_gp_learns_nothing_from_a_trial_that_lacks_a_constraint(violated: dict[str, float]) -> None:
    failed = told(11, {}, TrialState.FAIL)
    assert proposed_by_gp(BOTH, told(11, violated)) == proposed_by_gp(BOTH, failed)


@pytest.mark.parametrize("constraints", [(), BOTH])
def test_gp_takes_constraints_by_their_names(constraints: tuple[Constraint, ...]) -> None:
    """Whatever their order in the trial, and beside whatever another program bounds."""
    violated = dict(zip([each.metric for each in constraints], (7.0, -3.0), strict=False))
    others = {"theirs": 2.0, **dict(reversed(violated.items()))}
    assert proposed_by_gp(constraints, told(11, others)) == proposed_by_gp(constraints, told(11, violated))


# -- fronts and choices -----------------------------------------------------------------------


def test_the_front_and_the_hypervolume_are_of_feasible_trials(tmp_path: Path) -> None:
    """As if the others had not been scored, but for the length of the history: they are trials too."""
    study = open_study(tmp_path, constraints=(PERPLEXITY, Constraint("budget.model", 0.95)))
    study.enqueue([(study.dense, "dense")])
    enqueue(study, 0.9, 0.3, 0.8, 0.5)
    propose_and_complete(study, 5)
    assert [row.feasible for row in study.rows()] == [False, True, False, True, False]
    values, numbers = minimised(study)
    assert numbers.tolist() == [1, 3]
    rows = study.rows()
    assert values.tolist() == [list(rows[1].values or ()), list(rows[3].values or ())]
    assert reference_point(study) == (1.0, DENSE_NLL + math.log(10)), "of the dense model, feasible or not"
    first, second = hypervolume_history(values, reference_point(study) or ())
    assert hypervolumes(study).tolist() == [0.0, first, first, second, second]


def test_rivals_are_feasible(tmp_path: Path) -> None:
    """A smaller, better trial that violates a constraint stops nobody."""
    study = open_study(tmp_path, levels=40, constraints=(Constraint("budget.model", 0.8),))
    study.enqueue((COST.uniform(share), "uniform") for share in (0.9, 0.7))
    seen = []

    def answer(job: Job) -> Outcome:
        seen.append([rival.trial for rival in job.rivals])
        score = score_of(job.allocation)
        windows = pack_floats([score.text.nll + gap for gap in (-0.1, 0.1)])
        return Outcome(job, replace(score, text=replace(score.text, windows=windows)))

    Runner(study, MadeUpPool(answer, size=1), StopSection(trials=20), "s", Stop(), staged=True).run()  # type: ignore[arg-type]
    rows = study.rows()
    assert any(seen)
    assert all(rows[number].feasible for rivals in seen for number in rivals)
    assert not all(row.feasible for row in rows)


def test_the_dense_model_that_violates_a_bound_is_said_once(tmp_path: Path) -> None:
    """Of costs it may: it is the largest model there is."""
    constraints = (Constraint("perplexity", 5.0), Constraint("nll", 2.5), Constraint("budget.model", 0.5))
    study = open_study(tmp_path, constraints=constraints)
    said: list[str] = []
    notes = DenseNotes(study, said.append)
    study.enqueue([(study.dense, "dense")])
    notes.look()
    assert said == []
    propose_and_complete(study, 2)
    notes.look()
    notes.look()
    [line] = said
    assert line.startswith("constraints.perplexity: the dense model itself has perplexity 7.389 > 5")


def test_a_trial_that_is_named_by_its_number_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constraints = (PERPLEXITY, Constraint("bytes", 5_000))
    study = open_study(tmp_path, constraints=constraints)
    enqueue(study, 0.9, 0.5)
    propose_and_complete(study, 2)
    rows = study.rows()
    summary = StudySummary("s", "m", study.objectives, rows, (), 0.0, (), (), {}, constraints=constraints)
    warn_infeasible(summary, rows)
    size = COST.model_bytes(rows[0].allocation)
    assert f"trial 0 violates bytes {size:,} > 5,000\n" in capsys.readouterr().out
    assert "perplexity 198.6 > 30" in broken(constraints, rows[1])
    with pytest.raises(RankfrontError, match="the front is empty"):
        chosen(summary, budget=1.0)
    assert chosen(summary, trial=1) == [rows[1]]
