"""The pool on a real local Ray: replicas that die, hang, refuse; every job answered exactly once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import search.pool
from actors.types import Allocation, RankfrontError, ReplicaSpec
from search.events import Note, silent
from search.hangs import FIRST, LEAST_LOAD, LEAST_SCORE, TIMES, Bounds, Seconds
from search.pool import Job, Outcome, Pool, connect

# A pool that lost a job would be waited for without end.
PATIENCE_SECONDS = 180


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=search.pool.OBJECT_STORE_BYTES,
        )
        yield
        ray.shutdown()


def replica_class(
    folder: Path,
    behaviour: dict[int, list[str]],
    start: str = "",
    bad_starts: dict[str, int] | None = None,
    hung_starts: dict[str, int] | None = None,
    seconds: float = 0.0,
) -> type:
    """A replica without a model. The rank of its one target says which job it is.

    `behaviour[rank]` says what happens at the first, second, ... attempt at that job: `die`, `hang`, `kill`
    or `stop` (by a signal, once the driver has heard of the job before: what it answered last, a process may
    take along), `refuse`, `short` of memory, `break`, `ruin`: break at this job and at every other that
    comes, or `meet`: wait for all jobs that meet, which takes a replica for each. A score after that, which
    says that it took so many `seconds`. `bad_starts` says how often a replica cannot start, `hung_starts`
    how often, before any other start, it never ends loading. A class made here travels to the workers by
    value.
    """
    marks = str(folder)
    meeting = [rank for rank, acts in behaviour.items() if "meet" in acts]

    class MadeUpReplica:
        def __init__(self, spec: Any) -> None:
            if start:
                raise RuntimeError(start)
            from pathlib import Path

            self.name, self.last, self.ruined = spec.name, None, False
            before = len(list(Path(marks).glob(f"{spec.name}-start-*")))
            (Path(marks) / f"{spec.name}-start-{before}").touch()
            if before < (hung_starts or {}).get(spec.name, 0):
                import threading

                threading.Event().wait()
            if before < (bad_starts or {}).get(spec.name, 0):
                raise RuntimeError("no device 1")

        def ready(self) -> Any:
            import os

            from actors.types import Place

            return Place("made-up", os.getpid())

        def score(self, allocation: Any, split: str, rivals: Any) -> Any:
            import os
            import signal
            import threading
            import time
            from pathlib import Path

            from actors.types import Score, ScoringError, ShortOfMemoryError, TextScore

            [(_, rank)] = allocation
            before = len(list(Path(marks).glob(f"{rank}-*")))
            (Path(marks) / f"{rank}-{before}").touch()
            plan = behaviour.get(rank, [])
            act = plan[before] if before < len(plan) else "score"
            if act == "die":
                os._exit(1)
            if act == "hang":
                threading.Event().wait()
            if act in ("kill", "stop"):
                while self.last is not None and not (Path(marks) / f"heard-{self.last}").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL if act == "kill" else signal.SIGSTOP)
                threading.Event().wait()  # other threads may take the signal, some time later
            while act == "meet" and not all(list(Path(marks).glob(f"{other}-*")) for other in meeting):
                time.sleep(0.01)
            if act == "short":
                raise ShortOfMemoryError(f"out of memory on the {split} split")
            if act == "refuse":
                raise ScoringError(f"nll is nan on the {split} split")
            self.ruined |= act == "ruin"
            if act == "break" or self.ruined:
                raise ZeroDivisionError("a mistake in the code")
            self.last = rank
            text = TextScore("made-up", nats=float(rank), tokens=1, stderr=0.0)
            busy = (1e9, 0.0)  # of two GPUs: all of any time, and none
            stopped_by = 0 if act == "part" else None
            return Score(split, text, {}, 1, seconds, replica=self.name, busy=busy, stopped_by=stopped_by)

    return MadeUpReplica


@pytest.fixture
def pool_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Pool] = []

    def make(
        behaviour: dict[int, list[str]],
        count: int = 2,
        attempts: int = 2,
        trial_seconds: Seconds = None,
        load_seconds: Seconds = None,
        start: str = "",
        note: Note = silent,
        bad_starts: dict[str, int] | None = None,
        hung_starts: dict[str, int] | None = None,
        seconds: float = 0.0,
        **more: Any,
    ) -> Pool:
        kind = replica_class(tmp_path, behaviour, start, bad_starts, hung_starts, seconds)
        monkeypatch.setattr(search.pool, "Replica", kind)
        specs = [ReplicaSpec(f"replica-{index}", None, None, threads=1) for index in range(count)]  # type: ignore[arg-type]
        bounds = Bounds.asked(trial_seconds, load_seconds)
        made.append(Pool(specs, 0, attempts, bounds, note, **more))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def allocation(rank: int) -> Allocation:
    return Allocation((("t", rank),))


def drain(
    pool: Pool, ranks: list[int], heard: Path | None = None, known: tuple[int, ...] = ()
) -> dict[int, Outcome]:
    """Score every rank, refilling as the runner does; one outcome each, of which a file in `heard` tells.
    The pool has those that are `known` already."""
    queue, found = list(ranks), {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while queue or pool.outstanding:
        assert time.monotonic() < deadline, f"no answer for {sorted({*ranks, *known} - {*found})}"
        while queue and pool.free:
            rank = queue.pop(0)
            pool.submit(Job(rank, allocation(rank)))
        for outcome in pool.wait(0.25):
            assert outcome.job.key not in found, "answered twice"
            found[outcome.job.key] = outcome
            if heard is not None:
                (heard / f"heard-{outcome.job.key}").touch()
    assert set(found) == {*ranks, *known}
    return found


def turn_until(pool: Pool, done: Callable[[], bool]) -> None:
    """Look after an idle pool until something holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < deadline, pool.health()
        assert list(pool.wait(0.25)) == []
        time.sleep(0.02)


def attempts_of(folder: Path, rank: int) -> int:
    return len(list(folder.glob(f"{rank}-*")))


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
