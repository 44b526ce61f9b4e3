"""When a candidate stops, against the paired t-test of scipy; and when it is asked at all."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from actors.samples import pack_floats
from actors.stages import STOP_ERRORS, Judge, Rival

WINDOW = 32


def rival(trial: int = 7, **values: list[float]) -> Rival:
    return Rival(trial, {name: pack_floats(found) for name, found in values.items()})


def judge(*rivals: Rival, stages: tuple[int, ...] = (WINDOW,)) -> Judge:
    return Judge(stages, WINDOW, rivals)


def test_a_candidate_stops_where_its_paired_t_is_beyond_the_errors() -> None:
    """Over the windows scored so far, whatever the rival's others are."""
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(200):
        count = int(rng.integers(2, 20))
        hardness = rng.normal(3, 1, count)
        other = (hardness + rng.normal(0, 0.05, count)).tolist()
        mine = (hardness + rng.normal(0, 0.05, count) + rng.uniform(0, 0.1)).tolist()
        expected = scipy.stats.ttest_rel(mine, other).statistic > STOP_ERRORS
        asked = judge(rival(nll=[*other, 1000.0, -1000.0]))
        assert asked.stops({"nll": mine}) == expected
        assert asked.stopped_by == (7 if expected else None)
        stopped += expected
    assert 30 < stopped < 170, "both sides were seen"


def test_chances_are_as_stated() -> None:
    assert 1 / scipy.stats.t.sf(STOP_ERRORS, df=3) == pytest.approx(35, abs=0.5)
    assert 1 / scipy.stats.t.sf(STOP_ERRORS, df=15) == pytest.approx(220, abs=5)


def test_every_objective_must_be_worse() -> None:
    worse, better = [2.0, 2.1, 2.0, 2.1], [1.0, 1.1, 1.05, 1.0]
    both = rival(nll=better, kl=better)
    assert judge(both).stops({"nll": worse, "kl": worse})
    assert not judge(both).stops({"nll": worse, "kl": better})
    assert not judge(both).stops({"nll": better, "kl": worse})
    assert judge(rival(kl=better)).stops({"nll": better, "kl": worse}), "nll is no objective of this study"


def test_the_first_rival_that_dominates_is_named() -> None:
    mine = [1.0, 1.1, 1.0, 1.1]
    weak, strong = [2.0] * 4, [0.5, 0.6, 0.5, 0.7]
    asked = judge(rival(3, nll=weak), rival(4, nll=strong), rival(5, nll=strong))
    assert asked.stops({"nll": mine})
    assert asked.stopped_by == 4


def test_equal_values_never_stop_nor_does_one_window() -> None:
    values = [1 / 3, 2 / 3, 0.1]
    assert not judge(rival(nll=values)).stops({"nll": values}), "rounded to float32 on one side alone"
    assert not judge(rival(nll=[1.0])).stops({"nll": [50.0]})
    assert judge(rival(nll=[1.0, 1.0])).stops({"nll": [1.5, 1.5]}), "a difference without any noise"


def test_a_stage_ends_once_with_the_batch_that_reaches_it() -> None:
    asked = judge(rival(nll=[1.0] * 9), stages=(64, 100, 160))
    assert [asked.due(windows) for windows in range(1, 8)] == [False, True, False, True, True, False, False]
    skipping = judge(rival(nll=[1.0] * 9), stages=(64, 100, 160))
    assert [skipping.due(windows) for windows in (4, 5, 6)] == [True, True, False]
    assert not any(judge(stages=(64,)).due(windows) for windows in range(9)), "nobody to be held against"
