"""Where the hypervolume of each objective is measured from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import (
    DENSE_NLL,
    TARGETS,
    MadeUpPool,
    loss,
    open_study,
    runner,
    score_of,
)

from actors.types import Allocation, KlScore, TextScore
from search.pool import Job, Outcome
from search.records import Objective
from search.runner import hypervolumes, minimised, reference_point


def test_the_hypervolume_is_measured_from_ten_times_the_dense_perplexity(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    runner(study, MadeUpPool(), trials=3).run()
    assert reference_point(study) is None
    assert hypervolumes(study).tolist() == []
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    runner(study, MadeUpPool(), trials=4).run()
    budget, nll = reference_point(study) or (0, 0)
    assert budget == 1.0
    assert math.exp(nll) == pytest.approx(10 * math.exp(DENSE_NLL))


def test_the_hypervolume_is_measured_from_log_ten_nats_of_divergence(tmp_path: Path) -> None:
    """The dense model's own divergence is 0."""

    def diverging(job: Job) -> Outcome:
        score = score_of(job.allocation)
        return Outcome(job, replace(score, kl=KlScore(8, nats=0.0, tokens=score.text.tokens, stderr=0.0)))

    study = open_study(tmp_path, objectives=(Objective("budget.model", True), Objective("kl", True)))
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    runner(study, MadeUpPool(diverging), trials=1).run()
    assert [row.values for row in study.rows()] == [(1.0, 0.0)]
    assert reference_point(study) == (1.0, pytest.approx(math.log(10)))


def test_the_hypervolume_of_a_corpus_is_measured_from_its_own_dense_loss(tmp_path: Path) -> None:
    def scored(job: Job) -> Outcome:
        text = TextScore("c4@32", nats=500.0, tokens=100, stderr=0.0)
        return Outcome(job, replace(score_of(job.allocation), corpora={"c4": text}))

    study = open_study(tmp_path, objectives=(Objective("budget.model", True), Objective("nll.c4", True)))
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    runner(study, MadeUpPool(scored), trials=1).run()
    assert reference_point(study) == (1.0, pytest.approx(5 + math.log(10)))


def test_maximised_objectives_have_their_sign_turned(tmp_path: Path) -> None:
    objectives = (Objective("budget.model", True), Objective("reasoning.margin", False))
    study = open_study(tmp_path, objectives=objectives)
    runner(study, MadeUpPool(), trials=3).run()
    values, numbers = minimised(study)
    assert numbers.tolist() == [0, 1, 2]
    assert values[:, 1].tolist() == [-0.25] * 3
    assert values[:, 0].tolist() == [row.budget_model for row in study.rows()]
    assert all(loss(row.allocation) > 0 for row in study.rows())
