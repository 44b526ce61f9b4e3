"""Pools of made-up replicas on a real local Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import search.pool
from actors.types import Allocation, ReplicaSpec
from search.events import Note, silent
from search.hangs import Bounds, Seconds
from search.pool import Job, Outcome, Pool

# A pool that lost a job would be waited for without end.
PATIENCE_SECONDS = 180


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
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
