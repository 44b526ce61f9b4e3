"""How many workers a refinement gets, and what becomes of those that die. That they do their work is in
`tests/actors/test_team.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

import search.worker
from actors.refinement import REFIT, RefinementSpec
from actors.types import Allocation, Prepared, RankfrontError, ReplicaSpec
from search.cluster import Machine, Nodes, Room
from search.config import Config, parse_config
from search.folder import StudyFolder
from search.worker import _Remote, mistakes_named, refiner, worker_count


def config(replicas: dict[str, Any] | None = None, **refine: Any) -> Config:
    """Of a step of six windows."""
    return parse_config(
        {
            "study": "s",
            "model": {"source": "org/model"},
            "text": {"source": "org/text"},
            "calibration": {"window": 256},
            "refine": refine,
            "replicas": replicas or {},
        }
    )


@pytest.mark.parametrize(
    ("workers", "cores", "gpus", "expected"),
    [
        ("auto", 16, 0, 1),
        ("auto", 16, 4, 4),
        ("auto", 2, 4, 2),
        ("auto", 64, 8, 6),
        (3, 4, 0, 3),
        (4, 8, 4, 4),
    ],
)
def test_workers_are_one_for_each_gpu_and_window_or_as_many_as_asked_for(
    workers: int | str, cores: int, gpus: int, expected: int
) -> None:
    machine = Machine(cores, gpus, memory=0)
    assert worker_count(config(workers=workers), machine) == expected
    assert worker_count(config(workers=workers, method="refit"), machine) == 1


@pytest.mark.parametrize(("gpus", "each"), [(0, "a CPU; 2 at most"), (1, "a CPU and a GPU; 1 at most")])
def test_more_than_ever_run_at_once_are_refused_where_no_node_joins(gpus: int, each: str) -> None:
    with pytest.raises(RankfrontError, match=f"refine.workers: 4 never run at once: each needs {each}"):
        worker_count(config(workers=4), Machine(2, gpus, memory=0))
    assert worker_count(config(workers=4), Machine(2, gpus, memory=0, grows=True)) == 4


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [({"gpus": 1, "max": 4}, 4), ({"gpus": 0.5, "count": 4}, 2), ({"gpus": 1}, 1), ({"max": 4}, 1)],
    ids=str,
)
def test_where_gpus_are_yet_to_come_workers_are_one_for_each_that_replicas_wait_for(
    replicas: dict[str, Any], expected: int
) -> None:
    machine = Machine(cores=8, gpus=0, memory=0, grows=True)
    assert worker_count(config(replicas, workers="auto"), machine) == expected


HEAD, GPU_NODE = Room(cpus=4, gpus=0, memory=1), Room(cpus=16, gpus=4, memory=1)
WAITS = ["the worker takes a GPU, and no node has one: waiting for a node that has"]


@pytest.mark.parametrize(
    ("machine", "now", "replicas", "workers", "asked", "said"),
    [
        (Machine(2, 0, 1), (), {}, 1, (0, 2, None), []),
        (Machine(16, 4, 1), (), {"gpus": 2}, 4, (1, 4, None), []),
        (Machine(16, 4, 1), (), {"threads": 3}, 1, (1, 3, None), []),
        # a study that comes from where there was a GPU
        (Machine(4, 0, 1), (), {"gpus": 1}, 1, (0, 4, None), []),
        (Machine(4, 0, 1, grows=True), (HEAD,), {"gpus": 1}, 1, (1, 4, None), WAITS),
        (Machine(4, 0, 1, grows=True), (HEAD, GPU_NODE), {"gpus": 0.5}, 2, (1, 8, None), []),
        (Machine(4, 0, 1, grows=True), (HEAD,), {}, 1, (0, 4, None), []),
        (Machine(64, 0, 1, grows=True), (Room(8, 0, 1),) * 8, {}, 1, (0, 8, "SPREAD"), []),
    ],
    ids=str,
)
def test_a_worker_takes_a_gpu_where_replicas_do_and_threads_of_one_node(
    machine: Machine,
    now: tuple[Room, ...],
    replicas: dict[str, Any],
    workers: int,
    asked: tuple[int, int, str | None],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`now` are the nodes when it starts."""
    options: list[dict[str, Any]] = []
    specs: list[ReplicaSpec] = []

    def class_with(**given: Any) -> Any:
        options.append(given)
        return SimpleNamespace(remote=lambda spec, files: specs.append(spec))

    remote = SimpleNamespace(options=class_with)
    monkeypatch.setattr(
        search.worker, "ray", SimpleNamespace(remote=lambda kind: remote, kill=lambda actor: None)
    )
    nodes = Nodes(dict(zip("abcdefgh", now, strict=False)))
    monkeypatch.setattr(search.worker, "cluster_nodes", lambda: nodes)
    prepared = Prepared("", "", (), 1, {}, {}, {}, {}, reused=True)
    heard: list[str] = []
    with refiner(StudyFolder(tmp_path, config(replicas), prepared), machine, workers, heard.append):
        pass
    ([given], [spec]) = (options, specs)
    threads = int(given["runtime_env"]["env_vars"]["OMP_NUM_THREADS"])
    assert (given["num_cpus"], given["num_gpus"], threads) == (1, *asked[:2])
    assert (given.get("scheduling_strategy"), spec.threads) == (asked[2], threads)
    assert heard == said


class Actor:
    """Has the interface of a handle; what it is asked is answered at once, or by its death. While it is
    `loading` nothing is."""

    def __init__(self, place: int, dies: bool = False) -> None:
        self.place, self.alive, self.loading, self._dies = place, True, False, dies
        self.__ray_ready__ = SimpleNamespace(remote=lambda: Ping(self))
        self.helpers: list[int] = []
        self.score = SimpleNamespace(remote=self._answer)
        self.refine = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._steps))

    def _answer(self, *asked: Any) -> str:
        if self._dies or not self.alive:
            raise ActorDiedError
        return "a score"

    def _steps(self, *asked: Any) -> Any:
        self.helpers = [helper._actor.place for helper in asked[-1] if helper._actor.alive]
        yield "a step"
        yield self._answer()


@dataclass(eq=False)
class Ping:
    actor: Actor


def get(answer: Any) -> Any:
    if isinstance(answer, Ping) and not answer.actor.alive:
        raise ActorDiedError
    return answer


def kill(actor: Actor) -> None:
    actor.alive = False


def wait(pings: list[Ping], num_returns: int, timeout: float) -> tuple[list[Ping], list[Ping]]:
    assert (num_returns, timeout) == (len(pings), search.worker.PING)
    loading = [ping for ping in pings if ping.actor.loading]
    return [ping for ping in pings if ping not in loading], loading


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a refinement is asked for, of actors that are `Actor`s."""
    monkeypatch.setattr(search.worker, "ray", SimpleNamespace(get=get, kill=kill, wait=wait))
    return Allocation((("t", 1),)), RefinementSpec(), {}


def test_workers_that_died_are_started_anew(asked: Any) -> None:
    """All of them: those that helped the one that died know nothing of the next."""
    started: list[Actor] = []

    def start(place: int) -> Actor:
        started.append(Actor(place, dies=not started))
        return started[-1]

    remote = _Remote(start, workers=2)
    with pytest.raises(RankfrontError, match="process died"), mistakes_named():
        list(remote.refine(*asked))
    assert [(actor.place, actor.alive) for actor in started] == [(0, False), (1, False)]
    assert list(remote.refine(*asked)) == ["a step", "a score"]
    assert remote.score(asked[0], "test", None) == "a score"
    assert [(actor.place, actor.alive) for actor in started[2:]] == [(0, True), (1, True)]
    remote.close()
    assert not any(actor.alive for actor in started)


def test_a_helper_that_died_is_started_anew_for_the_next_refinement(asked: Any) -> None:
    """It alone: the others have their models, or are loading them."""
    started: list[Actor] = []

    def start(place: int) -> Actor:
        started.append(Actor(place))
        return started[-1]

    remote = _Remote(start, workers=4)
    list(remote.refine(*asked))
    lead, dead, loading, idle = started
    assert lead.helpers == [1, 2, 3]
    dead.alive, loading.loading = False, True
    list(remote.refine(asked[0], replace(asked[1], method=REFIT), {}))
    assert len(started) == 4, "nobody helps with a refit"
    list(remote.refine(*asked))
    assert [actor.place for actor in started[4:]] == [1]
    assert lead.helpers == [1, 2, 3]
    remote.close()
    assert not any(actor.alive for actor in (lead, loading, idle, *started[4:]))
