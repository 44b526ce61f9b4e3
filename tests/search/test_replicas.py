"""How many replicas a study gets, what each may use, and what is refused or said before they start."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openings import PREPARED, TOKENS, config_of, folder_of
from rich.console import Console

import search.opening
import search.replicas
from actors.types import Prepared, RankfrontError
from search.cluster import Need, Room
from search.events import silent
from search.pool import Machine
from search.replicas import elastic_of, lengths_of, replica_plan, tenure_of


@pytest.mark.parametrize(
    ("machine", "section", "plan"),
    [
        (Machine(cores=16, gpus=4, memory=1), {}, (4, 4)),
        (Machine(cores=8, gpus=0, memory=2**40), {}, (8, 1)),
        (Machine(cores=8, gpus=0, memory=2**40), {"threads": 4}, (2, 4)),
        (Machine(cores=8, gpus=0, memory=1), {}, (1, 8)),
        (Machine(cores=8, gpus=0, memory=1), {"count": 2}, (2, 4)),
    ],
    ids=str,
)
def test_a_gpu_each_or_what_cores_and_memory_allow(
    machine: Machine, section: dict[str, Any], plan: tuple[int, int], tmp_path: Path
) -> None:
    assert replica_plan(config_of(tmp_path, replicas=section), PREPARED, machine) == plan


@pytest.mark.parametrize(("section", "threads"), [({}, 1), ({"count": 2}, 1), ({"threads": 3}, 3)], ids=str)
def test_threads_do_not_follow_the_replicas_of_a_deterministic_search(
    section: dict[str, Any], threads: int, tmp_path: Path
) -> None:
    """Sums over other numbers of threads differ."""
    config = config_of(tmp_path, replicas=section, run={"deterministic": True})
    for machine in (Machine(8, 0, 2**40), Machine(16, 4, 2**40)):
        assert replica_plan(config, PREPARED, machine)[1] == threads


def test_a_lag_that_leaves_replicas_waiting_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.replicas, "Pool", lambda *arguments: None)
    said: list[str] = []
    for count in (2, 3):
        config = config_of(tmp_path, replicas={"count": count}, run={"deterministic": True, "lag": 3})
        search.replicas._start_pool(folder_of(config), Machine(8, 0, 2**40), said.append, silent)
    assert [line for line in said if line.startswith("run.lag")] == [
        "run.lag: 3 lets 4 trials be under way, the replicas could take 6"
    ]


def test_other_splits_may_take_longer_by_their_tokens() -> None:
    """Twice, as the first score on a replica may measure the dense model, and once to read them."""
    assert lengths_of(TOKENS) == {"choice": 2.0, "test": 9.0}


TWO_NODES = (Room(cpus=16, gpus=4, memory=2.0**40), Room(cpus=8, gpus=1, memory=2.0**40))


@pytest.mark.parametrize(
    ("machine", "section", "plan"),
    [
        (Machine(16, 4, 1), {"gpus": 1}, (4, 4)),
        (Machine(16, 4, 1), {"gpus": 2}, (2, 8)),
        (Machine(16, 4, 1), {"gpus": 0.5}, (8, 2)),
        (Machine(6, 4, 1), {"gpus": 0.25}, (6, 1)),  # more would wait for a core
        (Machine(24, 5, 1, True, TWO_NODES), {"gpus": 2}, (2, 8)),  # the other node's GPU is no half of two
        (Machine(24, 5, 1, True, TWO_NODES), {"gpus": 0.5}, (10, 2)),
        (Machine(24, 5, 1, True, TWO_NODES), {"gpus": 4, "count": 3}, (3, 8)),
        # Nodes are to be brought, which may have fewer cores than the head.
        (Machine(16, 0, 1, True, (Room(16, 0, 1),)), {"gpus": 1, "max": 8}, (8, 1)),
        (Machine(16, 0, 1, True), {"gpus": 0.5, "max": 8}, (8, 1)),
        (Machine(16, 0, 1, True, (Room(16, 0, 1),)), {"gpus": 2, "max": 3, "threads": 4}, (3, 4)),
        (Machine(72, 1, 1, True, (Room(64, 0, 1), Room(8, 1, 1))), {"gpus": 2, "max": 2}, (2, 8)),
    ],
    ids=str,
)
def test_replicas_take_shares_of_gpus_or_several(
    machine: Machine, section: dict[str, Any], plan: tuple[int, int], tmp_path: Path
) -> None:
    config = config_of(tmp_path, replicas=section)
    assert replica_plan(config, PREPARED, machine) == plan
    assert elastic_of(config, PREPARED, machine, plan[1]).need == Need(plan[1], section["gpus"])


@pytest.mark.parametrize(
    ("machine", "section", "words"),
    [
        (Machine(16, 4, 1), {"gpus": 8}, "takes 8 GPUs of one node, and there are 4; 4 at most"),
        (Machine(8, 0, 1), {"gpus": 0.5}, "takes 0.5 of a GPU of one node, and there is none; auto"),
        (Machine(8, 0, 1), {"gpus": 1, "count": 2}, "takes a GPU of one node, and there is none; auto"),
        (
            Machine(24, 5, 1, True, TWO_NODES),
            {"gpus": 8},
            "takes 8 GPUs of one node, and nodes have 4, 1; 4 at most, a share of one, or auto; or name",
        ),
    ],
    ids=str,
)
def test_gpus_that_no_node_has_are_refused_before_anything_is_prepared(
    machine: Machine, section: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.opening, "connect", lambda: machine)
    monkeypatch.setattr(search.opening, "prepare", lambda *_: pytest.fail("the long work has begun"))
    config = config_of(tmp_path, runs=str(tmp_path / "runs"), replicas=section)
    with (
        pytest.raises(RankfrontError, match=f"replicas.gpus: each {re.escape(words)}"),
        search.opening.opened(config, Console(file=io.StringIO())),
    ):
        pass
    assert not config.folder.exists()
    with pytest.raises(RankfrontError, match=re.escape(words)):
        search.replicas._start_pool(folder_of(config), machine, print, silent)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"threads": 16}, r"^replicas\.threads: 16, this machine has 2 cores, .*; 2 at most, or auto"),
        ({"threads": 16, "count": 4}, r"^replicas\.threads: 16, this machine has 2 cores"),
        ({"min": 3}, r"^replicas\.min: 3 never run at once: each takes 1 of 2 cores.*; 2 at most"),
        ({"min": 2, "threads": 2}, r"^replicas\.min: 2 never run at once: each takes 2 of 2 .*; 1 at most"),
    ],
    ids=str,
)
def test_replicas_that_never_run_at_once_are_refused_before_anything_is_prepared(
    section: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that no node joins. Of a study that is prepared, as its replicas start."""
    machine = Machine(2, 0, 2**40)
    monkeypatch.setattr(search.opening, "connect", lambda: machine)
    monkeypatch.setattr(search.opening, "prepare", lambda *_: pytest.fail("the long work has begun"))
    config = config_of(tmp_path, runs=str(tmp_path / "runs"), replicas=section)
    with (
        pytest.raises(RankfrontError, match=words),
        search.opening.opened(config, Console(file=io.StringIO())),
    ):
        pass
    assert not config.folder.exists()
    with pytest.raises(RankfrontError, match=words):
        search.replicas._start_pool(folder_of(config), machine, print, silent)


@pytest.mark.parametrize(
    ("machine", "section", "fit", "each"),
    [
        (Machine(2, 0, 2**40), {"count": 1000}, 2, "1 of 2 cores"),
        (Machine(2, 0, 2**40), {"count": 4, "threads": 2}, 1, "2 of 2 cores"),
        (Machine(16, 4, 1), {"count": 5}, 4, "1 of 16 cores and a GPU"),
        (Machine(2, 0, 2**40), {"count": 2}, 2, None),
        (Machine(2, 0, 2**40, True), {"count": 4, "threads": 16}, 4, None),  # nodes may join
    ],
    ids=str,
)
def test_replicas_of_which_some_wait_are_said_before_anything_is_prepared(
    machine: Machine,
    section: dict[str, Any],
    fit: int,
    each: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And as they start; those that fit are a search all the same."""

    def prepare(*arguments: Any) -> Prepared:
        raise RankfrontError("enough")

    monkeypatch.setattr(search.opening, "connect", lambda: machine)
    monkeypatch.setattr(search.opening, "prepare", prepare)
    monkeypatch.setattr(search.replicas, "Pool", lambda *arguments: None)
    shown, config = io.StringIO(), config_of(tmp_path, replicas=section)
    with pytest.raises(RankfrontError, match="enough"), search.opening.opened(config, Console(file=shown)):
        pass
    said: list[str] = []
    search.replicas._start_pool(folder_of(config), machine, said.append, silent)
    if each is None:
        assert shown.getvalue() == ""
        assert said[0].endswith(" each")
    else:
        assert f"replicas.count: {section['count']}, and {fit} run" in shown.getvalue()
        assert f"each takes {each}; the others wait" in shown.getvalue()
        assert said[0].endswith(f" each, {fit} at once")


def test_replicas_whose_number_is_named_wait_for_a_node_that_has_their_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[Any] = []
    monkeypatch.setattr(search.replicas, "Pool", lambda *arguments: pools.append(arguments))
    machine, said = Machine(24, 5, 1, True, TWO_NODES), list[str]()
    config = config_of(tmp_path, replicas={"gpus": 8, "max": 2})
    search.replicas._start_pool(folder_of(config), machine, said.append, silent)
    assert said[0] == "replicas: 2, 16 threads and 8 GPUs each"
    assert said[1].endswith("and nodes have 4, 1: waiting for a node that has")
    [(specs, gpus, *_)] = pools
    assert ([spec.gpus for spec in specs], gpus) == ([8, 8], 8)
    config = config_of(tmp_path)
    search.replicas._start_pool(folder_of(config), machine, said.append, silent)
    assert said[2] == "replicas: 5, 4 threads and a GPU each"
    assert {spec.gpus for spec in pools[1][0]} == {None}


@pytest.mark.parametrize(
    ("machine", "section", "said"),
    [
        (Machine(8, 0, 2**40, True, (Room(8, 0, 1),)), {}, True),
        (Machine(8, 0, 2**40, True, (Room(8, 0, 1),)), {"gpus": 1, "max": 2}, False),
        (Machine(8, 0, 2**40), {}, False),  # no node joins it
        (Machine(24, 5, 1, True, TWO_NODES), {}, False),
    ],
    ids=str,
)
def test_a_cluster_that_is_taken_for_one_of_cpus_is_told_how_gpu_nodes_come(
    machine: Machine, section: dict[str, Any], said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.replicas, "Pool", lambda *arguments: None)
    lines: list[str] = []
    folder = folder_of(config_of(tmp_path, replicas=section))
    search.replicas._start_pool(folder, machine, lines.append, silent)
    assert any("replicas: {gpus: 1, max: N} waits for nodes" in line for line in lines) == said


def test_what_replicas_keep_counts_as_their_memory(tmp_path: Path) -> None:
    machine = Machine(cores=8, gpus=0, memory=60 * 10**9)
    config = config_of(tmp_path, scoring={"prefix_memory_mb": 12_500.0})
    assert replica_plan(config_of(tmp_path), PREPARED, machine) == (4, 2)
    assert replica_plan(config, PREPARED, machine) == (2, 4)


A_GPU_NODE = Room(cpus=8, gpus=2, memory=2.0**40)


@pytest.mark.parametrize(
    ("machine", "section", "plan"),
    [
        (Machine(8, 0, 2**40), {"max": 2}, (2, 4)),
        (Machine(8, 0, 1), {"min": 2}, (2, 4)),
        (Machine(8, 0, 2**40), {"max": 9}, (8, 1)),
        (Machine(16, 4, 1, True), {"min": 6}, (6, 4)),
        (Machine(16, 4, 1, True), {"max": 9}, (9, 4)),  # five wait for a node, an autoscaler's or anybody's
        (Machine(24, 2, 1, True, (Room(16, 0, 1), A_GPU_NODE)), {}, (2, 4)),  # twelve would fit no GPU's node
        (Machine(12, 0, 2**40, True, (Room(8, 0, 1), Room(4, 0, 1))), {"count": 2}, (2, 4)),
    ],
    ids=str,
)
def test_replicas_stay_within_their_bounds_and_fit_a_node(
    machine: Machine, section: dict[str, Any], plan: tuple[int, int], tmp_path: Path
) -> None:
    assert replica_plan(config_of(tmp_path, replicas=section), PREPARED, machine) == plan


def test_a_minimum_that_no_node_can_join_for_is_refused(tmp_path: Path) -> None:
    section = {"count": "auto", "min": 9, "threads": 1}
    config = config_of(tmp_path, replicas=section)
    assert elastic_of(config, PREPARED, Machine(8, 0, 2**40, grows=True), 1).least == 9
    with pytest.raises(RankfrontError, match=r"replicas\.min: 9 never run at once.*8 at most"):
        elastic_of(config, PREPARED, Machine(8, 0, 2**40), 1)


def test_replicas_outlive_their_driver_where_the_cluster_does(tmp_path: Path) -> None:
    joined, own = Machine(8, 0, 2**40, grows=True), Machine(8, 0, 2**40)
    config = config_of(tmp_path)
    tenure, again = tenure_of(folder_of(config), joined), tenure_of(folder_of(config), joined)
    assert tenure is not None
    assert again is not None
    assert (tenure.study, tenure.alone_seconds) == (again.study, 600.0)
    assert tenure.token != again.token
    assert tenure_of(folder_of(config), own) is None
    assert tenure_of(folder_of(config_of(tmp_path, replicas={"alone_seconds": 0})), joined) is None
    other = tenure_of(replace(folder_of(config), path=tmp_path / "a copy"), joined)
    assert other is not None
    assert other.study != tenure.study
