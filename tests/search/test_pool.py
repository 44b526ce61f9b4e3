"""The pool on a real local Ray: replicas that die or refuse; every job answered exactly once."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from pools import PATIENCE_SECONDS, allocation, attempts_of, drain, turn_until

import search.pool
from actors.types import RankfrontError
from search.pool import Job, Outcome, connect

pytestmark = pytest.mark.usefixtures("local_ray")


def test_connect_joins_what_is_there() -> None:
    machine = connect()
    assert (machine.cores, machine.gpus) == (4, 0)
    assert machine.memory > 0


@pytest.mark.parametrize(("container", "free"), [(3e9, 3e9), (64e9, 8e9)])
def test_free_memory_heeds_the_limit_of_a_container(
    container: float, free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8_000_000_000))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "memory": container})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert connect().memory == free


def test_connect_joins_no_cluster_that_was_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options))
    connect()
    assert [options["address"] for options in asked] == ["local"]


def test_scores_belong_to_their_jobs_and_both_replicas_work(pool_of: Any) -> None:
    pool = pool_of({1: ["meet"], 2: ["meet"]})
    assert (pool.size, pool.outstanding, pool.free) == (2, 0, 4)
    assert list(pool.wait(0.0)) == []
    pool.submit(Job(1, allocation(1)))
    assert (pool.outstanding, pool.free) == (1, 3)
    pool.submit(Job(2, allocation(2), "test"))
    found: dict[int, Outcome] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pool.outstanding and time.monotonic() < deadline:
        found |= {outcome.job.key: outcome for outcome in pool.wait(0.25)}
    scores = {key: outcome.score for key, outcome in found.items()}
    assert {key: score.text.nats for key, score in scores.items() if score} == {1: 1.0, 2: 2.0}
    assert {key: score.split for key, score in scores.items() if score} == {1: "search", 2: "test"}
    assert {score.replica for score in scores.values() if score} == {"replica-0", "replica-1"}
    assert [each.gpus for each in pool.health()] == [(1.0, 0.0)] * 2


def test_fifty_jobs_with_deaths_are_answered_once_each(pool_of: Any, tmp_path: Path) -> None:
    """Two jobs kill their replica once, one kills every replica; all others are scored.

    A dying process may take the answer before with it, so a neighbour may be charged for the death: five
    attempts are more than job 7, which comes again when 21 does, is charged by chance.
    """
    behaviour = {7: ["die"], 21: ["die"] * 9, 40: ["die"]}
    found = drain(pool_of(behaviour, attempts=5), list(range(1, 51)))
    assert [rank for rank, outcome in found.items() if outcome.score is None] == [21]
    assert all(outcome.score.text.nats == rank for rank, outcome in found.items() if outcome.score)
    reason = found[21].reason
    assert reason is not None
    assert "died" in reason
    assert "attempt 5 of 5" in reason
    assert found[21].lost
    assert attempts_of(tmp_path, 21) >= 3
    assert all(attempts_of(tmp_path, rank) >= 2 for rank in (7, 40))


def test_a_job_that_raises_is_tried_again_and_then_reported(pool_of: Any, tmp_path: Path) -> None:
    """And the replica stays: a mistake of one trial costs no restart, a model takes minutes to load."""
    behaviour = {1: ["refuse"], 2: ["refuse"] * 3, 4: ["short"] * 3, 5: ["break"] * 3}
    pool = pool_of(behaviour, count=1, attempts=3)
    actor = pool._slots[0].actor
    found = drain(pool, [5, 1, 2, 3, 4])
    assert {rank for rank, outcome in found.items() if outcome.score is None} == {2, 4, 5}
    reasons = (2, "nll is nan on the search", False), (4, "out of memory", True), (5, "a mistake in", True)
    for rank, says, lost in reasons:
        assert says in (found[rank].reason or "")
        assert found[rank].lost == lost
        assert "attempt 3 of 3" in (found[rank].reason or "")
    assert [attempts_of(tmp_path, rank) for rank in (1, 2, 3, 4, 5)] == [2, 3, 1, 3, 3]
    assert pool._slots[0].actor is actor


@pytest.mark.parametrize("count", [1, 2])
def test_a_replica_that_fails_at_all_that_comes_is_replaced(pool_of: Any, count: int) -> None:
    """It fails sooner than others score, and would be given nearly every trial."""
    found = drain(pool_of({3: ["ruin"]}, count=count), list(range(1, 21)))
    assert [outcome.reason for outcome in found.values() if outcome.score is None] == []


def test_what_ray_says_of_a_process_that_it_ended_for_memory_is_no_end(
    pool_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an actor's error, as Ray has it."""
    pool = pool_of({}, count=1)
    drain(pool, [1])
    fetch, waiting = ray.get, ["once"]

    def get(reference: Any) -> Any:
        if pool._slots[0].queue and waiting:
            waiting.clear()
            raise ray.exceptions.OutOfMemoryError("memory on the node was about to run out")
        return fetch(reference)

    monkeypatch.setattr(search.pool.ray, "get", get)
    assert drain(pool, [2])[2].score is not None
    [replica] = pool.health()
    assert (replica.starts, replica.failure) == (
        2,
        "replica replica-0 died: memory on the node was about to run out",
    )


def test_replicas_that_cannot_start_end_the_search_with_the_first_error(pool_of: Any) -> None:
    pool = pool_of({}, start="libcuda.so.1: cannot open shared object file")
    with pytest.raises(RankfrontError, match=r"(?s)replicas cannot start.*libcuda\.so\.1: cannot open"):
        drain(pool, [1, 2, 3])


def test_a_replica_that_cannot_start_is_tried_again_later_each_time(pool_of: Any) -> None:
    """The other one scores meanwhile, and the first error is said in full."""
    now = [0.0]
    said: list[str] = []
    pool = pool_of({}, count=2, bad_starts={"replica-1": 3}, clock=lambda: now[0], say=said.append)
    bad = pool._slots[1]
    for number, wait in enumerate((1.0, 2.0, 4.0), start=1):
        turn_until(pool, lambda n=number: bad.starts == n and bad.actor is None)  # type: ignore[misc]
        assert (bad.starts, bad.retry_at - now[0]) == (number, wait)
        assert pool.health()[1].state == "failed"
        assert all(outcome.score for outcome in drain(pool, [10 * number, 10 * number + 1]).values())
        assert bad.actor is None, "not before its time"
        now[0] += wait
    turn_until(pool, lambda: bad.loaded)
    assert (pool.size, bad.starts) == (2, 4)
    [line] = said
    assert line.startswith("replicas: replica-1 could not start")
    assert "no device 1" in line
    assert "in __init__" in line, "in full"


def test_a_process_that_is_killed_or_stopped_is_replaced_and_gone(pool_of: Any, tmp_path: Path) -> None:
    """A stopped one holds its memory, and hears nothing that Ray asks of it."""
    processes = []

    def note(event: str, **facts: Any) -> None:
        if event == "replica started":
            processes.append(facts["pid"])

    pool = pool_of({2: ["stop"], 4: ["kill"]}, count=1, trial_seconds=8.0, note=note)
    found = drain(pool, [1, 2, 3, 4, 5], heard=tmp_path)
    assert [outcome.reason for outcome in found.values() if outcome.score is None] == []
    assert [attempts_of(tmp_path, rank) for rank in range(1, 6)] == [1, 2, 1, 2, 1]
    assert len(processes) == 3
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(map(_holds_memory, processes[:2])):
        assert time.monotonic() < deadline, "a replica that was given up still holds its memory"
        time.sleep(0.05)


def _holds_memory(process: int) -> bool:
    """Whether a process is there and no zombie, as Linux tells."""
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_closed_pool_holds_no_replica(pool_of: Any) -> None:
    """The cluster has 4 cores: a pool that kept its three would leave none for the next one's."""
    for ranks in ([1, 2, 3], [4, 5, 6]):
        pool = pool_of({rank: ["meet"] for rank in ranks}, count=3)
        found = drain(pool, ranks)
        assert len({outcome.score.replica for outcome in found.values() if outcome.score}) == 3
        pool.close()
        assert pool.size == 0
