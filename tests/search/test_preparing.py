"""A preparation on a real local Ray: builders that share it, builders that die, a driver that refuses."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import tiny

import search.pool
import search.preparing
from actors.factors import FactorStore, store_problem
from actors.replica import Preparer
from actors.types import PreparationSpec, Prepared, Progress, RankfrontError
from search.cluster import Room
from search.config import parse_config
from search.pool import Machine
from search.preparing import builder_count, places, prepare

MACHINE = Machine(cores=2, gpus=0, memory=1 << 30)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=search.pool.OBJECT_STORE_BYTES,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preparing")
    tiny.tiny_config(root)
    return root


def spec_of(root: Path, runs: Path, **overrides: Any) -> PreparationSpec:
    return parse_config(tiny.tiny_config(root, runs=str(runs), **overrides)).preparation()


class Watched:
    """A preparation and all that it told its driver."""

    def __init__(self, spec: PreparationSpec, builders: int, machine: Machine = MACHINE) -> None:
        self.said: list[str] = []
        self.shown: list[Progress] = []
        self.checked: list[Mapping[str, str]] = []
        self._ask = (spec, machine, builders, self.said.append, self.shown.append, self.checked.append)

    def run(self) -> Prepared:
        return prepare(*self._ask)


@pytest.fixture(scope="module")
def by_one(root: Path) -> Prepared:
    """What one builder prepares."""
    watched = Watched(spec_of(root, root / "one"), builders=1)
    prepared = watched.run()
    decomposed = [progress for progress in watched.shown if progress.step == "decomposing"]
    assert decomposed == [Progress("decomposing", done, 21) for done in range(1, 22)]
    assert watched.shown[0].step == "calibrating"
    assert watched.checked == [prepared.fingerprints]
    return prepared


def same_store(found: Prepared, expected: Prepared) -> None:
    """Every target approximated alike at every rank; the vectors may change their sign."""
    assert store_problem(Path(found.factor_store), expected.fingerprints["factors"]) is None
    ours, theirs = FactorStore(found.factor_store), FactorStore(expected.factor_store)
    assert ours.targets == theirs.targets
    for target in theirs.targets:
        for rank in (1, 5, target.full_rank):
            products = []
            for store in (ours, theirs):
                left, right, _ = store.rank(target.name, rank)
                products.append(left.T.double() @ right.double())
            assert (products[0] - products[1]).norm() < 1e-5 * products[1].norm(), (target.name, rank)


def test_two_builders_make_what_one_makes(root: Path, by_one: Prepared, tmp_path: Path) -> None:
    """Begun where one has room and the other waits, aloud, for a cluster that grows: this one has."""
    watched = Watched(spec_of(root, tmp_path), 2, replace(MACHINE, cores=1, grows=True))
    prepared = watched.run()
    [waits] = [line for line in watched.said if "waiting for the cluster to grow" in line]
    assert waits.startswith("calibration.builders: 2 need a CPU each and there are 1 CPUs")
    assert not prepared.reused
    assert prepared.fingerprints == by_one.fingerprints
    assert not list(tmp_path.rglob("*.tmp")), "what told whether the builders see one folder"
    same_store(prepared, by_one)
    assert watched.shown[-1] == Progress("decomposing", 21, 21)
    assert [progress.total for progress in watched.shown if progress.step == "calibrating"][-1] == 8


def dying(folder: Path, method: str, after: int, times: int) -> type:
    """A preparer whose process ends in the call of `method` that comes after so many, `times` times in all.

    It is counted by files in `folder`. A class made here travels to the workers by value.
    """
    marks = str(folder)

    class Dying(Preparer):
        def _live(self, name: str) -> None:
            import os
            from pathlib import Path

            if name != method:
                return
            self._calls = getattr(self, "_calls", 0) + 1
            deaths = len(list(Path(marks).glob("death-*")))
            if self._calls > after and deaths < times:
                (Path(marks) / f"death-{deaths}").touch()
                os._exit(1)

        def collect(self, *arguments: Any) -> Any:
            self._live("collect")
            yield from super().collect(*arguments)

        def part(self, name: str) -> Any:
            self._live("part")
            return super().part(name)

        def build(self, name: str, *others: Any) -> None:
            self._live("build")
            super().build(name, *others)

    return Dying


def deaths(folder: Path) -> int:
    return len(list(folder.glob("death-*")))


def test_a_builder_that_others_wait_for_dies_and_what_was_written_is_kept(
    root: Path, by_one: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its moments were to be an argument of another's task, which fails in its stead."""
    monkeypatch.setattr(search.preparing, "Preparer", dying(tmp_path, "part", after=5, times=1))
    watched = Watched(spec_of(root, tmp_path / "runs"), builders=2)
    prepared = watched.run()
    assert deaths(tmp_path) == 1
    same_store(prepared, by_one)
    assert len([line for line in watched.said if "died; beginning again" in line]) == 1
    [kept] = [line for line in watched.said if "targets are done already" in line]
    left = int(kept.split("decomposing ")[1].split()[0])
    assert left < 21
    decomposed = [progress for progress in watched.shown if progress.step == "decomposing"]
    assert decomposed[-left:] == [Progress("decomposing", done, left) for done in range(1, left + 1)]


def test_one_that_dies_again_and_again_gets_there_if_each_leaves_something(
    root: Path, by_one: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.preparing, "Preparer", dying(tmp_path, "build", 8, times=9))
    watched = Watched(spec_of(root, tmp_path / "runs"), builders=1)
    same_store(watched.run(), by_one)
    assert deaths(tmp_path) == 2  # 8 targets, 8, and the last 5


def test_one_that_always_dies_ends_the_preparation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.preparing, "Preparer", dying(tmp_path, "build", after=0, times=99))
    with pytest.raises(RankfrontError, match="the preparation's process died"):
        Watched(spec_of(root, tmp_path / "runs"), builders=1).run()
    assert deaths(tmp_path) == 1


class RefusedError(Exception):
    pass


def test_a_check_that_refuses_stops_before_anything_is_measured(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.preparing, "Preparer", dying(tmp_path, "collect", after=0, times=99))
    seen: list[Mapping[str, str]] = []

    def refuse(fingerprints: Mapping[str, str]) -> None:
        seen.append(fingerprints)
        raise RefusedError

    shown: list[Progress] = []
    with pytest.raises(RefusedError):
        prepare(spec_of(root, tmp_path / "runs"), MACHINE, 2, lambda line: None, shown.append, refuse)
    assert [{*fingerprints} for fingerprints in seen] == [
        {"model", "tokenizer", "calibration", "search", "choice", "test", "factors"}
    ]
    assert shown == []
    assert deaths(tmp_path) == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def apart(folder: Path, marks: Path) -> type:
    """A preparer that, if it is not the first, has another folder under the path of the first one's, as on a
    node that shares none; measuring leaves a file in `marks`."""

    class Apart(dying(marks, "collect", after=0, times=99)):  # type: ignore[misc]
        def __init__(self, spec: PreparationSpec, threads: int) -> None:
            from dataclasses import replace

            try:
                (folder / "first").mkdir()
            except FileExistsError:
                spec = replace(spec, cache=str(folder / "elsewhere"))
            super().__init__(spec, threads)

    return Apart


def test_builders_that_share_no_folder_are_refused_before_anything_is_measured(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.preparing, "Preparer", apart(tmp_path, tmp_path))
    watched = Watched(spec_of(root, tmp_path / "runs"), builders=2)
    here, stores = re.escape(platform.node()), re.escape(str(tmp_path / "runs" / "factors"))
    says = rf"^factor store: what node {here} writes in {stores} is not seen by node {here} under that path; "
    with pytest.raises(RankfrontError, match=says + "set runs or cache.factors to a folder that all nodes"):
        watched.run()
    assert watched.shown == []
    assert deaths(tmp_path) == 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_driver_that_would_not_see_the_factors_is_told_before_anything_is_measured(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One builder on another node is enough for that. Of a URL the driver makes a copy."""
    marks = str(tmp_path)

    class Away(dying(tmp_path, "collect", after=0, times=1)):  # type: ignore[misc]
        def mark(self) -> Any:
            """What the driver finds nothing of under this path."""
            from dataclasses import replace
            from pathlib import Path

            found = super().mark()
            self.unmark(found)
            return replace(found, file=Path(marks) / "there" / "x.partial" / found.file.name)

    monkeypatch.setattr(search.preparing, "Preparer", Away)
    spec = spec_of(root, tmp_path / "runs")
    there = re.escape(str(tmp_path / "there"))
    says = rf"^factor store: what node .* {there} is not seen by the driver's machine \S+ under that path"
    with pytest.raises(RankfrontError, match=says):
        Watched(spec, builders=1).run()
    assert deaths(tmp_path) == 0
    with pytest.raises(RankfrontError, match="the preparation's process died"):  # as it measured
        Watched(replace(spec, shared=f"file://{tmp_path}/shared", node_cache=str(tmp_path / "n")), 1).run()
    assert deaths(tmp_path) == 1


def test_the_workers_mistakes_are_told_as_they_are(root: Path, tmp_path: Path) -> None:
    """Those of a constructor too: the process is gone then, but of its own will."""
    mistake = {"factors": {"methods": {"*.x": "weight"}}}
    with pytest.raises(RankfrontError, match=r"^factors\.methods: '\*\.x' fits no target"):
        Watched(spec_of(root, tmp_path, **mistake), builders=1).run()


def test_who_has_no_use_for_what_is_foreseen_stops_before_anything_is_measured(
    root: Path, by_one: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is known but where the time goes. Where a store is there, nothing is left to foresee."""
    seen: list[Prepared] = []

    def refuse(prepared: Prepared) -> None:
        seen.append(prepared)
        raise RefusedError

    def run(runs: Path, shown: list[Progress]) -> Prepared:
        spec = spec_of(root, runs)
        return prepare(spec, MACHINE, 1, lambda line: None, shown.append, lambda prints: None, refuse)

    assert run(root / "one", []).reused
    monkeypatch.setattr(search.preparing, "Preparer", dying(tmp_path, "collect", after=0, times=99))
    shown: list[Progress] = []
    with pytest.raises(RefusedError):
        run(tmp_path / "runs", shown)
    assert shown == []
    [foreseen] = seen
    place, seconds = by_one.factor_store, by_one.seconds
    assert replace(foreseen, factor_store=place, seconds=seconds) == by_one


def test_more_builders_than_run_at_once_are_refused_before_anything_is_measured(
    root: Path, by_one: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for each other for ever. A store that is there needs only one."""
    again = Watched(spec_of(root, root / "one"), builders=3)
    assert again.run().reused
    assert again.shown == []
    monkeypatch.setattr(search.preparing, "Preparer", dying(tmp_path, "collect", after=0, times=99))
    watched = Watched(spec_of(root, tmp_path / "runs"), builders=3)
    with pytest.raises(RankfrontError, match=r"^calibration\.builders: 3 .* a CPU .* 2 CPUs; 2 at most"):
        watched.run()
    assert watched.shown == []
    assert deaths(tmp_path) == 0


@pytest.mark.parametrize(
    ("machine", "room", "auto"),
    [
        (Machine(cores=4, gpus=0, memory=1), 4, 1),
        (Machine(cores=16, gpus=8, memory=1), 8, 8),
        (Machine(cores=2, gpus=8, memory=1), 2, 2),
        (Machine(cores=0, gpus=0, memory=1, grows=True), 0, 1),
    ],
    ids=str,
)
def test_a_builder_takes_a_cpu_and_a_gpu_where_there_are_any(machine: Machine, room: int, auto: int) -> None:
    assert places(machine) == room
    assert builder_count("auto", machine) == auto
    assert builder_count(3, machine) == 3


def test_builders_of_several_nodes_have_threads_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cores of the cluster, shared, would be more than a node has."""
    asked: list[Any] = []

    def class_with(**options: Any) -> Any:
        asked.append((options["num_cpus"], options["num_gpus"], options["scheduling_strategy"]))
        asked.append(options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"])
        return SimpleNamespace(remote=lambda spec, threads: asked.append(threads))

    remote = SimpleNamespace(options=class_with)
    monkeypatch.setattr(search.preparing, "ray", SimpleNamespace(remote=lambda kind: remote))
    rooms = tuple(Room(cpus, 0, 1) for cpus in (8, 8, 6))
    search.preparing._start(None, Machine(22, 0, 1, True, rooms), 2)  # type: ignore[arg-type]
    assert asked == [(1, 0, "SPREAD"), "6", 6]


def test_no_more_builders_than_windows(root: Path, by_one: Prepared, tmp_path: Path) -> None:
    """A text of one window is asked for as more: the second builder would have nothing to measure."""
    tiny.tiny_text(tmp_path / "short", count=1)
    short = {"source": str(tmp_path / "short")}
    spec = spec_of(root, tmp_path, calibration={"text": short, "window": 128, "tokens": 1024})
    prepared = Watched(spec, builders=2).run()
    assert prepared.tokens["calibration"] == 128
    assert prepared.fingerprints["factors"] != by_one.fingerprints["factors"]
