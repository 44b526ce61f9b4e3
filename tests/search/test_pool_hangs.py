"""Replicas on a real local Ray that hang as they score or load. The bare rule is in test_hangs.py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import ray
from pools import PATIENCE_SECONDS, allocation, attempts_of, drain, turn_until

from actors.types import RankfrontError
from search.events import Note
from search.hangs import FIRST, LEAST_LOAD, LEAST_SCORE, TIMES
from search.pool import Job

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_driver_that_was_held_up_blames_no_replica(pool_of: Any) -> None:
    """As by a storage that was away while both scored."""
    now = [0.0]
    pool = pool_of({1: ["meet"], 2: ["meet"]}, trial_seconds=60.0, clock=lambda: now[0])
    turn_until(pool, lambda: pool.size == 2 and all(slot.loaded for slot in pool._slots))
    for rank in (1, 2):
        pool.submit(Job(rank, allocation(rank)))
    answers = [slot.queue[0][0] for slot in pool._slots]
    assert ray.wait(answers[:1], timeout=PATIENCE_SECONDS)[0]
    looks = pool.wait(0.25)
    found = [next(looks)]
    assert ray.wait(answers, num_returns=2, timeout=PATIENCE_SECONDS)[1] == []
    now[0] += 100.0
    found += [*looks, *pool.wait(0.25)]
    assert all(outcome.score is not None for outcome in found)
    assert len(found) == 2
    assert [replica.starts for replica in pool.health()] == [1, 1]


def test_a_longer_split_may_take_longer(pool_of: Any) -> None:
    now = [0.0]
    pool = pool_of({1: ["hang"]}, count=1, trial_seconds=10.0, lengths={"test": 3.0}, clock=lambda: now[0])
    turn_until(pool, lambda: pool._slots[0].loaded)
    pool.submit(Job(1, allocation(1), "test"))
    now[0] = 29.0
    assert [*pool.wait(0.01)] == []
    assert not pool._slots[0].overdue
    now[0] = 31.0
    assert [*pool.wait(0.01)] == []
    assert pool._slots[0].overdue
    [outcome] = drain(pool, [], known=(1,)).values()
    assert outcome.score is not None


def test_a_hanging_trial_is_noticed_without_a_figure_once_others_were_scored(pool_of: Any) -> None:
    """A score said 90 seconds, that of a split with thrice the tokens: 30 for those of the search split."""
    now = [0.0]
    pool = pool_of(
        {2: ["hang"]},
        count=1,
        trial_seconds="auto",
        lengths={"test": 3.0},
        seconds=90.0,
        clock=lambda: now[0],
    )
    turn_until(pool, lambda: pool._slots[0].loaded)
    pool.submit(Job(1, allocation(1), "test"))
    assert drain(pool, [], known=(1,))[1].score is not None
    pool.submit(Job(2, allocation(2)))
    most = max(LEAST_SCORE, 30.0 * TIMES)
    now[0] += most - 1
    assert [*pool.wait(0.01)] == []
    assert not pool._slots[0].overdue
    now[0] += 2
    assert drain(pool, [], known=(2,))[2].score is not None
    assert pool.health()[0].failure == f"no score within {most} seconds, replica stopped"


def test_a_score_that_was_stopped_at_a_stage_tells_nothing_of_how_long_a_whole_one_takes(
    pool_of: Any,
) -> None:
    now = [0.0]
    behaviour = {1: ["part"], 2: ["hang"]}
    pool = pool_of(behaviour, count=1, trial_seconds="auto", seconds=2.0, clock=lambda: now[0])
    drain(pool, [1])
    pool.submit(Job(2, allocation(2)))
    for now[0], overdue in ((FIRST - 1, False), (FIRST + 1, True)):
        assert [*pool.wait(0.01)] == []
        assert pool._slots[0].overdue == overdue
    assert drain(pool, [], known=(2,))[2].score is not None


def test_a_replica_that_hangs_as_it_loads_is_started_again(pool_of: Any) -> None:
    """Without a figure, as another has loaded, in a few looks at the clock."""
    later, looks = [0.0], itertools.count()
    said: list[str] = []
    hung = {"replica-1": 1}
    clock = lambda: later[0] + next(looks) / 1000  # noqa: E731
    pool = pool_of({}, hung_starts=hung, load_seconds="auto", clock=clock, say=said.append)
    good, bad = pool._slots
    turn_until(pool, lambda: good.loaded and bad.node is not None)
    later[0] = LEAST_LOAD - 60
    assert [*pool.wait(0.01)] == []
    assert bad.starts == 1
    assert bad.actor is not None
    later[0] = LEAST_LOAD + 60
    turn_until(pool, lambda: bad.actor is None)
    reason = f"not loaded {LEAST_LOAD:g} seconds after it was on node {bad.node}, stopped"
    assert said == [f"replicas: replica-1 could not start: {reason}"]
    assert pool.health()[1].failure == f"it could not start: {reason}"
    later[0] += 60
    turn_until(pool, lambda: bad.loaded)
    assert (bad.starts, pool.size) == (2, 2)


def test_where_every_replica_hangs_as_it_loads_the_search_ends(pool_of: Any) -> None:
    pool = pool_of({}, count=1, hung_starts={"replica-0": 9}, load_seconds=0.5)
    with pytest.raises(RankfrontError, match=r"replicas cannot start: not loaded 0\.5 seconds after"):
        drain(pool, [1])


def test_a_hanging_trial_is_killed_and_tried_again(pool_of: Any, tmp_path: Path) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    note: Note = lambda event, **facts: heard.append((event, facts))  # noqa: E731
    pool = pool_of({3: ["hang"]}, count=1, trial_seconds=1.0, note=note)
    [before] = pool.health()
    assert (before.state, before.starts, before.node, before.failure) == ("loading", 1, None, None)
    found = drain(pool, [1, 2, 3, 4])
    assert all(outcome.score is not None for outcome in found.values())
    assert [attempts_of(tmp_path, rank) for rank in (1, 2, 3, 4)] == [1, 1, 2, 1]
    [replica] = pool.health()
    says = "no score within 1.0 seconds, replica stopped"
    assert (replica.name, replica.state, replica.starts) == ("replica-0", "idle", 2)
    assert (replica.node, replica.trials, replica.failure) == ("made-up", (), says)
    told = [event for event, _ in heard]
    assert [event for event in told if event != "dispatched"] == [
        "replica started",
        "replica died",
        "retried",
        "replica started",
    ]
    tries = [(facts["trial"], facts["attempt"]) for event, facts in heard if event == "dispatched"]
    assert sorted(set(tries)) == [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1)]
    assert [facts["starts"] for event, facts in heard if event == "replica started"] == [1, 2]
    assert next(facts["reason"] for event, facts in heard if event == "replica died") == says


def test_a_trial_that_always_hangs_fails_with_its_reason(pool_of: Any, tmp_path: Path) -> None:
    """Its second attempt is the first trial of a new replica, which is no excuse to wait for ever."""
    found = drain(pool_of({2: ["hang"] * 9}, count=1, trial_seconds=0.5), [1, 2])
    assert found[2].score is None
    assert "no score within 0.5 seconds" in (found[2].reason or "")
    assert found[2].lost
    assert "attempt 2 of 2" in (found[2].reason or "")
    assert attempts_of(tmp_path, 2) == 2
