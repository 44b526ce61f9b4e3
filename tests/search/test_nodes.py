"""Real nodes that join, drain and die under a pool, and a driver that is killed: nothing is lost, or kept."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.exceptions import RayActorError

import search.crew
import search.pool
import search.slots
from actors.lease import NotHolderError
from actors.types import Allocation, ReplicaSpec
from search.cluster import NAMESPACE, OBJECT_STORE_BYTES, Need, cluster_nodes
from search.elastic import Elastic
from search.failures import cause_of
from search.hangs import Bounds
from search.jobs import Job, Outcome
from search.pool import Pool
from search.tenure import Tenure, prompt

# Something that does not happen would be waited for without end.
PATIENCE_SECONDS = 60
STORE = {"object_store_memory": OBJECT_STORE_BYTES}
# A node that died without a word is noticed in two seconds instead of twenty.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, **STORE}
SPEC = ReplicaSpec("replica-0", None, None, threads=1)  # type: ignore[arg-type]
# Ranks below this are scored at once; others when the test lets them.
HELD_BACK = 100
ALONE_SECONDS = 10.0
# The driver dies in the middle of a trial: it prints its replica's process, and is killed by the test.
DRIVER = """
import sys
sys.path.insert(0, {here!r})
import test_nodes
test_nodes.drive({folder!r}, {address!r})
"""


def replica_class(folder: str) -> type:
    """A replica without a model, which travels to the workers by value; loads leave marks in `folder`."""

    class MadeUpReplica:
        def __init__(self, spec: Any) -> None:
            import os
            from pathlib import Path

            (Path(folder) / f"loaded-{os.getpid()}").touch()
            self.name = spec.name

        def ready(self) -> Any:
            import os

            from actors.types import Place

            return Place("made-up", os.getpid())

        def score(self, allocation: Any, split: str, rivals: Any) -> Any:
            import time
            from pathlib import Path

            from actors.types import Score, TextScore

            [(_, rank)] = allocation
            (Path(folder) / f"begun-{rank}").touch()
            while rank >= 100 and not (Path(folder) / f"go-{rank}").exists():
                time.sleep(0.01)
            text = TextScore("made-up", nats=float(rank), tokens=1, stderr=0.0)
            return Score(split, text, {}, forward_tokens=1, seconds=0.0, replica=self.name)

    return MadeUpReplica


def drive(folder: str, address: str) -> None:
    """What the driver does that is killed: its replica is in the middle of a trial."""
    ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    search.pool.Replica = replica_class(folder)  # type: ignore[misc]
    pool = Pool(
        [SPEC], 0, attempts=1, tenure=Tenure("study", ALONE_SECONDS, token="first", silent_seconds=1.0)
    )
    pool.submit(Job(HELD_BACK, Allocation((("t", HELD_BACK),))))
    until(pool, lambda: (Path(folder) / f"begun-{HELD_BACK}").exists())
    print(pool.health()[0].pid, flush=True)
    signal.pause()


def until(pool: Pool, done: Any) -> list[Outcome]:
    """Look after a pool until something holds; every outcome of that time."""
    deadline, found = time.monotonic() + PATIENCE_SECONDS, []
    while not done():
        assert time.monotonic() < deadline, pool.health()
        found += pool.wait(0.1)
        if not pool.outstanding:
            time.sleep(0.02)  # it has nothing to wait for, the test has
    return found


def score_all(pool: Pool, ranks: list[int]) -> dict[int, Outcome]:
    for rank in ranks:
        pool.submit(Job(rank, Allocation((("t", rank),))))
    return {outcome.job.key: outcome for outcome in until(pool, lambda: not pool.outstanding)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that has room for no replica; nodes of one core join it.

    In a folder of its own, short enough for the names of sockets: in Ray's own it would leave its address,
    and tests that start a cluster beside this one would join it instead.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray-") as folder:
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Cluster(initialize_head=True, head_node_args=HEAD | {"temp_dir": folder})
        ray.init(made.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.pool, "Replica", replica_class(str(tmp_path)))


def states(pool: Pool) -> list[str]:
    return sorted(each.state for each in pool.health())


@pytest.mark.usefixtures("kind")
def test_replicas_follow_nodes_that_join_drain_and_die(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one attempt a trial: what a node that left was scoring costs none."""
    for module in (search.crew, search.slots):
        monkeypatch.setattr(module, "SEAT_SECONDS", 2.0)
    said: list[str] = []
    elastic = Elastic(1, 2, follow=True, need=Need(1), nodes=cluster_nodes)
    pool = Pool([SPEC], 0, attempts=1, elastic=elastic, say=said.append)
    try:
        until(pool, lambda: pool.size == 0)
        assert states(pool) == ["waiting"]
        until(pool, lambda: said)
        assert said == ["replicas: 0 loaded, 1 needed: waiting for nodes that have room"]

        first = cluster.add_node(num_cpus=1, **STORE)
        assert {outcome.reason for outcome in score_all(pool, [1, 2, 3]).values()} == {None}
        assert said[1:] == ["replicas: 1 loaded, going on"]

        second = cluster.add_node(num_cpus=1, **STORE)
        until(pool, lambda: states(pool) == ["idle", "idle"])

        for rank in (HELD_BACK, HELD_BACK + 1):
            pool.submit(Job(rank, Allocation((("t", rank),))))
        until(pool, lambda: all((tmp_path / f"begun-{HELD_BACK + each}").exists() for each in (0, 1)))
        drain(first.node_id)
        until(pool, lambda: any(slot.leaving for slot in pool._slots))
        [runs] = [slot.queue[0][1].key for slot in pool._slots if slot.leaving]
        lost = 2 * HELD_BACK + 1 - runs
        for rank in (4, 5):
            pool.submit(Job(rank, Allocation((("t", rank),))))
        cluster.remove_node(second, allow_graceful=False)
        (tmp_path / f"go-{runs}").touch()
        ended = until(pool, lambda: states(pool) == ["waiting", "waiting"])
        assert [outcome.job.key for outcome in ended] == [runs], "what ran on the drained node ended there"

        (tmp_path / f"go-{lost}").touch()
        third = cluster.add_node(num_cpus=2, **STORE)
        ended += until(pool, lambda: not pool.outstanding)
        assert {outcome.job.key: outcome.reason for outcome in ended} == dict.fromkeys((4, 5, 100, 101))
        until(pool, lambda: states(pool) == ["idle", "idle"])
        assert {slot.node for slot in pool._slots} == {third.node_id}
    finally:
        pool.close()
    cluster.remove_node(third)


def drain(node: str) -> None:
    """As `ray drain-node` and the autoscaler do."""
    client = ray._private.worker.global_worker.gcs_client
    accepted, reason = client.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, "spot", 0)
    assert accepted, reason


def killed_driver(cluster: Cluster, folder: Path) -> int:
    """The process of a replica whose driver was killed; it goes on with what that one asked."""
    code = DRIVER.format(here=str(Path(__file__).parent), folder=str(folder), address=cluster.address)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        driver.kill()
    return pid


@pytest.mark.usefixtures("kind")
def test_the_replica_of_a_killed_driver_serves_the_next_one_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Warm: the same process, loaded once. Then nobody comes, and it ends by itself."""
    cluster.add_node(num_cpus=1, **STORE)
    pid = killed_driver(cluster, tmp_path)
    said: list[str] = []
    (tmp_path / f"go-{HELD_BACK}").touch()
    tenure = Tenure("study", ALONE_SECONDS, token="second", silent_seconds=1.0)
    pool = Pool([SPEC], 0, attempts=1, tenure=tenure, say=said.append)
    assert said == ["replicas: 1 of an earlier driver go on, 0 end: nobody needs what they hold"]
    [outcome] = score_all(pool, [7]).values()
    assert outcome.score is not None
    assert outcome.score.text.nats == 7.0
    assert [each.pid for each in pool.health()] == [pid]
    assert [path.name for path in tmp_path.glob("loaded-*")] == [f"loaded-{pid}"]

    [slot] = pool._slots
    assert ray.get(prompt(slot.actor.take).remote("third")) is None, "its holder is alive"
    with pytest.raises(ray.exceptions.RayTaskError) as refused:
        ray.get(slot.actor.score.remote("first", Allocation((("t", 8),)), "search", ()))
    assert isinstance(cause_of(refused.value), NotHolderError)
    assert not (tmp_path / "begun-8").exists()

    assert ray.wait([slot.actor.ready.remote("second")], timeout=PATIENCE_SECONDS)[0]
    alone = slot.actor.score.remote("second", Allocation((("t", HELD_BACK + 9),)), "search", ())
    with pytest.raises(
        RayActorError
    ):  # nobody looks after it from here on, though it is in the middle of a trial
        ray.get(alone, timeout=PATIENCE_SECONDS)


@pytest.mark.usefixtures("kind")
def test_a_replica_that_hung_when_its_driver_was_killed_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """It says whom it serves, and is through with nothing."""
    cluster.add_node(num_cpus=1, **STORE)
    pid = killed_driver(cluster, tmp_path)
    tenure = Tenure("study", ALONE_SECONDS, token="second", silent_seconds=1.0)
    pool = Pool([SPEC], 0, attempts=1, bounds=Bounds.asked(3.0, None), tenure=tenure)
    [outcome] = score_all(pool, [7]).values()
    assert outcome.score is not None
    [replica] = pool.health()
    assert (replica.starts, replica.failure) == (2, "no answer within 3.0 seconds of being taken over")
    assert replica.pid != pid
    pool.close()
