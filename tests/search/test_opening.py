"""Opening a study: what its preparation says is on the screen, what it runs on, what is left of a failure."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import MODEL_PARAMETERS, TARGETS, score_of
from rich.console import Console

import search.opening
import search.replicas
from actors.types import Prepared, RankfrontError
from search.cluster import Need, Room
from search.config import Config, parse_config
from search.database import open_database
from search.events import silent
from search.folder import CONFIG, StudyFolder
from search.identity import FIXED_FINGERPRINTS
from search.journal import JOURNAL, LOCK, open_journal
from search.pool import Machine
from search.replicas import elastic_of, lengths_of, replica_plan, tenure_of
from search.study import IDENTITY

TOKENS = {"search": 90, "search.forward": 100, "choice.forward": 50, "test.forward": 400}
PREPARED = Prepared("", "", (), 10**9, {}, TOKENS, {}, {}, reused=True)


def config_of(tmp_path: Path, **sections: Any) -> Config:
    """Of a study whose factor store is nowhere, so with a sampler that reads none."""
    hub = {"model": {"source": "org/model"}, "text": {"source": "org/text"}}
    return parse_config(
        {"study": "s", "runs": str(tmp_path), "sampler": {"name": "random"}, **hub, **sections}
    )


def folder_of(config: Config) -> StudyFolder:
    return StudyFolder(config.folder, config, PREPARED)


def test_all_that_the_preparation_says_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets too, which a terminal's markup would swallow."""
    lines = ["model: no family of its own for 'x': every linear layer is a target", "model: ./a[b]/[red]c"]

    def prepare(spec: Any, machine: Any, count: int, say: Any, *rest: Any) -> Prepared:
        for line in lines:
            say(line)
        raise RankfrontError("enough")

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", prepare)
    shown = io.StringIO()
    config = config_of(tmp_path)
    with pytest.raises(RankfrontError, match="enough"), search.opening.opened(config, Console(file=shown)):
        pass
    assert [line.partition(" s  ")[2] for line in shown.getvalue().splitlines()] == lines
    assert not config.folder.exists()


@pytest.mark.parametrize("database", [None, "${STUDIES}"], ids=["journal", "database"])
def test_what_was_begun_without_a_trial_follows_the_config(
    database: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a search leaves it that was stopped at once: neither directions nor their number stay."""
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    prints = iter(f"f{number}" for number in range(9))

    def prepare(spec: Any, machine: Any, count: int, say: Any, bar: Any, check: Any, *rest: Any) -> Prepared:
        found = dict.fromkeys(FIXED_FINGERPRINTS, next(prints))
        check(found)
        return replace(
            PREPARED, targets=TARGETS, model_parameters=MODEL_PARAMETERS, fingerprints=found, reused=False
        )

    def opening(*objectives: str) -> contextlib.AbstractContextManager[search.opening.Session]:
        scoring = {"tasks": ["boolq"]}
        config = config_of(tmp_path, database=database, objectives=objectives, scoring=scoring)
        return search.opening.opened(config, Console(file=io.StringIO()))

    monkeypatch.setattr(search.opening, "prepare", prepare)
    for objectives in (("budget.model", "nll"), ("nll", "budget.linear", "reasoning.acc")):
        with opening(*objectives) as session:
            assert session.folder.open_study().rows() == ()
    with opening("budget.model", "reasoning.acc") as session:
        study = session.folder.open_study()
        planned = study.propose("random")
        study.complete(planned, score_of(planned.allocation))
        plain = optuna.load_study(study_name="s", storage=session.folder._storage())
        assert [direction.name for direction in plain.directions] == ["MINIMIZE", "MAXIMIZE"]
        assert study.signs.tolist() == [1.0, -1.0]
        assert [trial.number for trial in plain.best_trials] == [row.number for row in study.front] == [0]
        if database is not None:
            assert plain.user_attrs[IDENTITY]["config"]["objectives"] == ["budget.model", "reasoning.acc"]
    before = content(tmp_path)
    with pytest.raises(RankfrontError, match="objectives: was"), opening("budget.model", "nll"):
        pass
    assert content(tmp_path) == before


@pytest.mark.parametrize("database", [None, "${STUDIES}"], ids=["journal", "database"])
def test_what_is_refused_after_the_preparation_saves_nothing(
    database: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", lambda *_: replace(PREPARED, targets=TARGETS))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")

    def opening(*check: Any, **stop: int) -> contextlib.AbstractContextManager[search.opening.Session]:
        config = config_of(tmp_path, database=database, stop=stop)
        return search.opening.opened(config, Console(file=io.StringIO()), None, *check)

    def check(session: search.opening.Session) -> None:
        assert session.folder.prepared.targets == TARGETS
        raise RankfrontError("not these targets")

    with pytest.raises(RankfrontError, match="not these targets"), opening(check, trials=7):
        pass
    assert not (tmp_path / "s").exists()
    with opening(trials=7) as session:
        session.folder.open_study().propose("random")
    before = content(tmp_path)
    with pytest.raises(RankfrontError, match="not these targets"), opening(check, trials=9):
        pass
    assert content(tmp_path) == before


def test_what_a_command_refuses_is_refused_before_the_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: what it says is not said again of what was prepared."""
    done = replace(PREPARED, targets=TARGETS, reused=False)
    happened: list[str] = []

    def prepare(*arguments: Any) -> Prepared:
        foresee = arguments[-1]
        foresee(done)
        foresee(done)  # a build that was begun again
        happened.append("factors")
        return done

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", prepare)

    def refuse(session: search.opening.Session) -> None:
        raise RankfrontError(f"not {len(session.folder.cost.targets)} targets")

    def agree(session: search.opening.Session) -> None:
        happened.append("asked")

    config = config_of(tmp_path)
    with pytest.raises(RankfrontError, match=f"not {len(TARGETS)} targets"):
        search.opening.opened(config, Console(file=io.StringIO()), None, refuse).__enter__()
    assert happened == []
    assert not config.folder.exists()
    with search.opening.opened(config, Console(file=io.StringIO()), None, agree):
        assert happened == ["asked", "factors"]


def test_trials_that_another_program_added_are_not_taken_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study in a database that no driver prepared: its trials bind all the same."""
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", lambda *_: PREPARED)
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    storage = open_database("${STUDIES}")
    optuna.create_study(study_name="s", storage=storage, directions=["maximize"]).enqueue_trial({"x": 1})
    config = config_of(tmp_path, database="${STUDIES}")
    with (
        pytest.raises(RankfrontError, match=r"'s': its objectives are unnamed \(maximize\); those of this"),
        search.opening.opened(config, Console(file=io.StringIO())),
    ):
        pass
    assert not config.folder.exists()


@pytest.mark.parametrize("to", [None, "${OTHERS}"], ids=["journal", "another"])
@pytest.mark.parametrize("has", ["none", "one", "unknown"])
def test_a_study_leaves_a_database_that_is_known_to_have_no_trial_of_it(
    has: str, to: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", lambda *_: replace(PREPARED, targets=TARGETS))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    monkeypatch.setenv("OTHERS", f"sqlite:///{tmp_path / 'others.db'}")
    config = config_of(tmp_path, database="${STUDIES}")
    with search.opening.opened(config, Console(file=io.StringIO())) as session:
        if has == "one":
            session.folder.open_study().propose("random")
    if has == "unknown":
        monkeypatch.delenv("STUDIES")
    refusal = pytest.raises(
        RankfrontError, match=rf"database: was '\${{STUDIES}}', now {re.escape(repr(to))}"
    )
    with (
        contextlib.nullcontext() if has == "none" else refusal,
        search.opening.opened(config_of(tmp_path, database=to), Console(file=io.StringIO())) as session,
    ):
        assert session.folder.open_study().propose("random").number == 0


def content(path: Path) -> dict[str, bytes]:
    """Every file but the locks, which say when they were taken."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != LOCK)
    return {str(file): file.read_bytes() for file in files}


def test_a_study_in_a_database_is_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another machine: what it was begun with is in the database, and binds the config there too."""
    prints = dict.fromkeys(FIXED_FINGERPRINTS, "f1")
    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")

    def drive(runs: str, fingerprint: str = "f1", **changes: Any) -> int:
        def prepare(
            spec: Any, machine: Any, count: int, say: Any, bar: Any, check: Any, *rest: Any
        ) -> Prepared:
            check({**prints, "search": fingerprint})
            return replace(PREPARED, targets=TARGETS, fingerprints=prints)

        monkeypatch.setattr(search.opening, "prepare", prepare)
        config = config_of(tmp_path, **{"runs": str(tmp_path / runs), "database": "${STUDIES}", **changes})
        with search.opening.opened(config, Console(file=io.StringIO())) as session:
            planned = session.folder.open_study().propose("random")
            assert not (config.folder / JOURNAL).exists()
            return planned.number

    assert drive("here") == 0
    assert drive("there", sampler={"name": "random"}) == 1
    with pytest.raises(RankfrontError, match="objectives: was"):
        drive("there", objectives=["budget.linear", "nll"])
    with pytest.raises(RankfrontError, match="search: the content differs"):
        drive("elsewhere", "f2")
    with pytest.raises(RankfrontError, match=r"database: was '\${STUDIES}', now None"):
        drive("there", database=None)
    (tmp_path / "journal" / "s").mkdir(parents=True)
    (tmp_path / "journal" / "s" / CONFIG).write_text(config_of(tmp_path).to_yaml())
    journal = open_journal(tmp_path / "journal" / "s")
    optuna.create_study(study_name="s", storage=journal).enqueue_trial({"x": 1})
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'others.db'}")
    with pytest.raises(RankfrontError, match="database: was None, now"):
        drive("journal")
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    assert StudyFolder.open(tmp_path / "there" / "s").open_study().propose("random").number == 2


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
