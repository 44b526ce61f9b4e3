"""How many workers a refinement gets, and what becomes of those that die. That they do their work is in
`tests/actors/test_team.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

import search.worker
from actors.refinement import REFIT, RefinementSpec
from actors.types import Allocation, RankfrontError
from search.cluster import Machine
from search.config import Config, parse_config
from search.worker import _Remote, mistakes_named, worker_count


def config(**refine: Any) -> Config:
    """Of a step of six windows."""
    return parse_config(
        {
            "study": "s",
            "model": {"source": "org/model"},
            "text": {"source": "org/text"},
            "calibration": {"window": 256},
            "refine": refine,
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
