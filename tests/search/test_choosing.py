"""The best trial at a budget: by the search text, and by the larger one where that cannot tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import OBJECTIVES, cost_model

from actors.samples import pack_floats
from actors.types import RankfrontError, Score, TextScore
from search.choosing import CANDIDATES, chosen, contenders, untold
from search.records import Evaluation, Objective, StudySummary, TrialRow

COST = cost_model()


def score(nll: float, wobble: float = 0.0, split: str = "search") -> Score:
    """Of four windows; the `wobble` of two is paired against that of the other two."""
    values = [nll + wobble, nll - wobble, nll + wobble, nll - wobble]
    text = TextScore("made-up@32", nll * 124, 124, 0.1, pack_floats(values))
    return Score(split, text, {}, forward_tokens=128, seconds=1.0, replica="made-up")


def row(number: int, share: float, found: Score, state: str = "COMPLETE") -> TrialRow:
    allocation = COST.uniform(share)
    linear, model, size = COST.budgets(allocation).values()
    values, never = (model, found.text.nll), (None, None, None, None)
    return TrialRow(number, state, "seed", allocation, linear, model, size, values, found, *never)


def summary(
    rows: list[TrialRow],
    front: tuple[int, ...],
    choice: dict[int, float] | None = None,
    objectives: tuple[Objective, ...] = OBJECTIVES,
    earlier: tuple[Evaluation, ...] = (),
) -> StudySummary:
    asked = tuple(
        Evaluation(number, "factors", "choice", "f", score(nll, split="choice"))
        for number, nll in (choice or {}).items()
    )
    now = {"choice": "f"}
    return StudySummary(
        "s", "m", objectives, tuple(rows), front, 0.0, (), (*earlier, *asked), {}, fingerprints=now
    )


# At the budget of trial 1: it is the best by the search text, which cannot tell 2 and 3 from it.
ROWS = [
    row(0, 0.95, score(2.0)),
    row(1, 0.7, score(3.0)),
    row(2, 0.6, score(3.01, wobble=0.1)),
    row(3, 0.65, score(3.02, wobble=0.2)),
    row(4, 0.5, score(3.05, wobble=0.001)),
    row(5, 0.55, score(2.9), state="PRUNED"),
]
BUDGET = ROWS[1].budget_model


def numbers(rows: list[TrialRow]) -> list[int]:
    return [each.number for each in rows]


def test_trials_as_good_by_the_search_text_are_contenders_on_the_front_or_not() -> None:
    front = (0, 1, 4)
    assert numbers(contenders(summary(ROWS, front), BUDGET)) == [1, 2, 3]
    assert numbers(contenders(summary(ROWS, front), ROWS[2].budget_model)) == [4, 2]
    other = (Objective("budget.model", True), Objective("reasoning.acc", False))
    assert numbers(contenders(summary(ROWS, (0, 1, 2, 4), objectives=other), BUDGET)) == [1, 2]
    broken = [replace(each, constraints={"bytes": 1.0}) if each.number == 2 else each for each in ROWS]
    assert numbers(contenders(summary(broken, front), BUDGET)) == [1, 3]
    with pytest.raises(RankfrontError, match=r"--budget 0.01: no front point at or under it"):
        contenders(summary(ROWS, front), 0.01)


def test_an_allocation_is_a_contender_once_and_few_are() -> None:
    twice = [*ROWS, replace(ROWS[2], number=6), replace(ROWS[1], number=7)]
    assert numbers(contenders(summary(twice, (0, 7, 4)), BUDGET)) == [7, 2, 3]
    many = [row(n, 0.9 - n / 12, score(3.0 + n / 1000, wobble=n / 10)) for n in range(9)]
    found = contenders(summary(many, tuple(range(9))), 1.0)
    assert numbers(found) == list(range(CANDIDATES))


def test_scores_that_cannot_be_paired_are_told_apart_by_their_mean() -> None:
    bare = [
        replace(each, score=replace(each.score, text=replace(each.score.text, windows=""))) for each in ROWS
    ]
    assert numbers(contenders(summary(bare, (0, 1, 4)), BUDGET)) == [1]


def test_the_larger_text_decides_once_the_first_is_scored_on_it() -> None:
    front = (0, 1, 4)
    for choice, number, left in (
        ({}, 1, [1, 2, 3]),
        ({2: 2.9}, 1, [1, 2, 3]),
        ({1: 3.0, 3: 2.8}, 3, [1, 2, 3]),
        ({1: 3.0, 2: 2.9, 3: 2.8}, 3, []),
        ({1: 2.7, 2: 2.9, 3: 2.8, 4: 1.0}, 1, []),
    ):
        found = summary(ROWS, front, choice)
        assert numbers(chosen(found, budget=BUDGET)) == [number], choice
        assert untold(found, BUDGET) == left


def test_scores_on_what_the_larger_text_was_before_are_no_answers() -> None:
    """Losses on two texts do not compare."""
    on_another = tuple(
        Evaluation(number, "factors", "choice", "g", score(nll, split="choice"))
        for number, nll in ((1, 2.0), (2, 0.5), (3, 1.0))
    )
    for choice, number, left in (
        ({}, 1, [1, 2, 3]),
        ({1: 3.0}, 1, [1, 2, 3]),
        ({1: 3.0, 2: 2.9, 3: 2.8}, 3, []),
    ):
        found = summary(ROWS, (0, 1, 4), choice, earlier=on_another)
        assert numbers(chosen(found, budget=BUDGET)) == [number], choice
        assert untold(found, BUDGET) == left
