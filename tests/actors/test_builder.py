"""Builders that are interrupted, share the work, or meet: the store comes out whole and the same."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import SafetensorError

import actors.builder
import actors.factors
from actors.builder import Builder
from actors.factors import FactorStore, store_problem
from actors.models import load_model
from actors.moments import Moments, merge
from actors.preparation import prepare
from actors.types import BuildPlan, PreparationSpec, Prepared, Progress, RankfrontError, TextSource
from search.config import parse_config

TESTS = Path(tiny.__file__).parent
# A process that imports torch and loads the model takes seconds, tens of them on a busy machine.
PATIENCE_SECONDS = 180


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("builder")
    tiny.tiny_config(root)
    return root


def spec_of(root: Path, cache: Path | str, **overrides: Any) -> PreparationSpec:
    return parse_config(tiny.tiny_config(root, runs=str(cache), **overrides)).preparation()


def prepared_by(spec: PreparationSpec) -> tuple[list[Any], Prepared]:
    *said, prepared = prepare(spec)
    assert isinstance(prepared, Prepared)
    return said, prepared


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """The store of an uninterrupted build."""
    return Path(prepared_by(spec_of(root, root / "whole"))[1].factor_store)


def plan_of(builder: Builder) -> BuildPlan:
    *_, made = builder.inspect()
    assert isinstance(made, BuildPlan)
    return made


def products(store: Path) -> dict[tuple[str, int], torch.Tensor]:
    opened = FactorStore(store)
    found = {}
    for target in opened.targets:
        for rank in (1, 5, target.full_rank):
            left, right, _ = opened.rank(target.name, rank)
            found[target.name, rank] = left.T.double() @ right.double()
    return found


def same_store(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Every target approximated alike at every rank; the vectors may change their sign."""
    ours, theirs = products(found), products(expected)
    assert ours.keys() == theirs.keys()
    for key, product in theirs.items():
        assert (ours[key] - product).norm() < tolerance * product.norm(), key
    files = [sorted(path.name for path in store.iterdir()) for store in (found, expected)]
    assert files[0] == files[1]


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def finish_what_is_left(spec: PreparationSpec, done: int, whole: Path) -> None:
    """Prepare after an interruption: targets that are done stay as they are, the rest is built."""
    [partial] = Path(spec.cache).glob("*.partial")
    before = marks(partial)
    assert len(before) == done
    said, prepared = prepared_by(spec)
    assert any(f"{done} of 21 targets are done already" in item for item in said if isinstance(item, str))
    assert Progress("decomposing", 21 - done, 21 - done) in said
    assert not prepared.reused
    store = Path(prepared.factor_store)
    after = marks(store)
    assert {name: after[name] for name in before} == before
    assert store_problem(store, prepared.fingerprints["factors"]) is None
    same_store(store, whole)
    assert not list(Path(spec.cache).glob("*.partial"))


def test_a_store_that_is_whole_is_read_once(root: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold hundreds of gigabytes."""
    looked: list[Path] = []

    def look(folder: Path, fingerprint: str) -> str | None:
        looked.append(folder)
        return store_problem(folder, fingerprint)

    monkeypatch.setattr(actors.builder, "store_problem", look)
    _, prepared = prepared_by(spec_of(root, root / "whole"))
    assert prepared.reused
    assert looked == [whole]


def test_it_is_said_that_a_model_has_no_family_of_its_own(root: Path, tmp_path: Path) -> None:
    for model_type, notes in (("gpt_neox", 1), ("llama", 0)):
        folder = tiny.tiny_model(tmp_path / model_type, model_type)
        spec = spec_of(root, tmp_path / "runs", model={"source": str(folder)})
        said = [item for item in Builder(spec).inspect() if isinstance(item, str)]
        assert said[0] == f"model: {folder}"
        assert len([line for line in said if "model: no family of its own for 'gpt_neox'" in line]) == notes


def test_it_is_said_that_layers_share_their_weight(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(*args: Any) -> Any:
        model: Any = load_model(*args)
        model.model.layers[2].mlp = model.model.layers[1].mlp
        return model

    monkeypatch.setattr(actors.builder, "load_model", shared)
    builder = Builder(spec_of(root, tmp_path / "runs"))
    assert len(builder.targets) == 15
    said = [item for item in builder.inspect() if isinstance(item, str)]
    builder.close()
    assert said[1] == (
        "model: 6 linear layers share their weight and stay dense, such as model.layers.1.mlp.gate_proj"
    )


def test_patterns_that_decide_nothing_are_refused_before_anything_is_measured(
    root: Path, tmp_path: Path
) -> None:
    """With the targets, which are known when the model is loaded; the texts are not even looked at."""
    methods = {"*.q_proj": "weight", "*.q_porj": "feature"}
    spec = spec_of(root, tmp_path / "runs", factors={"methods": methods})
    absent = replace(spec.calibration, text=TextSource(str(tmp_path / "absent.txt")))
    with pytest.raises(RankfrontError, match=r"^factors\.methods: '\*\.q_porj' fits no target"):
        next(prepare(replace(spec, calibration=absent)))
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_build_goes_on_where_it_was(root: Path, whole: Path, tmp_path: Path) -> None:
    spec = spec_of(root, tmp_path)
    steps = prepare(spec)
    for item in steps:
        if isinstance(item, Progress) and (item.step, item.done) == ("decomposing", 5):
            break
    steps.close()
    finish_what_is_left(spec, 5, whole)


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_keeps_the_targets_that_are_done(
    failure: Exception, root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(root, tmp_path)
    save, room = actors.factors.save_file, [1] * 7

    def save_while_there_is_room(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if not room:
            raise failure
        room.pop()
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(actors.factors, "save_file", save_while_there_is_room)
        with pytest.raises(RankfrontError, match="No space left on device"):
            prepared_by(spec)
    finish_what_is_left(spec, 7, whole)


def test_a_build_that_ended_before_its_seal_is_sealed(root: Path, whole: Path, tmp_path: Path) -> None:
    """Every target was written: nothing is left to calibrate."""
    spec = spec_of(root, tmp_path)
    steps = prepare(spec)
    for item in steps:
        if item == Progress("decomposing", 21, 21):
            break
    steps.close()
    said, prepared = prepared_by(spec)
    assert not any(isinstance(item, Progress) for item in said)
    same_store(Path(prepared.factor_store), whole)


PREPARE = """
import os, pickle, signal, sys
sys.path[:0] = {paths!r}
import actors.factors
from actors.preparation import prepare
from actors.types import Progress

spec, killed_at = pickle.loads({spec!r}), {killed_at!r}
save, saved = actors.factors.save_file, []

def save_or_die(tensors, path):
    if len(saved) == killed_at:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(path)
    save(tensors, path)

actors.factors.save_file = save_or_die
for item in prepare(spec, threads=1):
    if item == Progress("decomposing", 1, 21):
        print("building", flush=True)
        sys.stdin.readline()
"""


def process(spec: PreparationSpec, killed_at: int | None = None) -> subprocess.Popen[str]:
    """Another process that prepares. It says when it has its first target, waits for a line, and goes on."""
    paths = [str(TESTS), str(TESTS.parent)]
    script = PREPARE.format(paths=paths, spec=pickle.dumps(spec), killed_at=killed_at)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_a_build_that_was_killed_in_the_middle_of_a_file_goes_on(
    root: Path, whole: Path, tmp_path: Path
) -> None:
    spec = spec_of(root, tmp_path)
    child = process(spec, killed_at=6)
    child.communicate("go on\n", timeout=PATIENCE_SECONDS)
    assert child.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("factors/*.partial/*.tmp"))) == 1  # the half file, which must not stay
    finish_what_is_left(spec, 6, whole)


def test_of_two_processes_one_builds_and_the_other_waits_and_reuses(
    root: Path, whole: Path, tmp_path: Path
) -> None:
    spec = spec_of(root, tmp_path)
    with process(spec) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "building\n"
        found: list[tuple[list[Any], Prepared]] = []
        other = threading.Thread(target=lambda: found.append(prepared_by(spec)))
        other.start()
        other.join(2.0)
        assert not found, "it did not wait"
        assert not list(tmp_path.glob("factors/*/manifest.json"))
        child.stdin.write("go on\n")
        child.stdin.flush()
        assert child.wait(PATIENCE_SECONDS) == 0
        ended = time.time_ns()
        other.join(PATIENCE_SECONDS)
    [(said, prepared)] = found
    assert prepared.reused
    assert not any(isinstance(item, Progress) for item in said)
    store = Path(prepared.factor_store)
    assert all(written < ended for _, written in marks(store).values())
    same_store(store, whole)


def moments_of(builders: Sequence[Builder], made: BuildPlan, group: int) -> dict[str, Moments]:
    """Moments of a group whose text `builders` share, pickled as they travel between actors."""
    for shard, builder in enumerate(builders):
        *_, last = builder.collect(made, group, shard, len(builders))
        assert last.done == last.total
    return {
        name: merge([pickle.loads(pickle.dumps(builder.part(name))) for builder in builders])
        for name in made.groups[group]
    }


@pytest.mark.parametrize("count", [2, 3, 5])
def test_builders_that_share_the_text_measure_what_one_does(count: int, root: Path, tmp_path: Path) -> None:
    """16 windows, which three and five do not divide."""
    spec = spec_of(root, tmp_path)
    first, *others = (Builder(spec) for _ in range(count))
    made = plan_of(first)
    assert made.windows == 16
    alone, shared = (moments_of(builders, made, 0) for builders in ([first], [first, *others]))
    first.close()
    assert [*shared] == [target.name for target in first.targets]
    for name, expected in alone.items():
        found = shared[name]
        assert found.tokens == expected.tokens == 512
        assert found.gradient is not None
        assert expected.gradient is not None
        for one, other in (
            (found.weighted.covariance, expected.weighted.covariance),
            (found.weighted.mean, expected.weighted.mean),
            (found.input_mean, expected.input_mean),
            (found.gradient, expected.gradient),
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * other.abs().max().item())


def test_a_moment_is_handed_over_once(root: Path, tmp_path: Path) -> None:
    """What is given away is not held any longer: memory is for one copy."""
    builder = Builder(spec_of(root, tmp_path))
    made = plan_of(builder)
    [*_] = builder.collect(made, 0, 0, 1)
    name = made.groups[0][0]
    builder.part(name)
    with pytest.raises(KeyError):
        builder.part(name)
    builder.close()
