"""What a factor store notices, builds over, goes on with, and leaves behind when it fails."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from stores import MIXED, SPEC, Setting, build, names, one_block, setting_of, weight, write

import actors.factors
from actors.factors import FactorStore, StoreBuilder, store_problem
from actors.types import RankfrontError


@pytest.fixture(scope="module")
def setting(biased_llama: Path, ids: torch.Tensor) -> Setting:
    return setting_of(biased_llama, ids)


@pytest.fixture(scope="module")
def few(setting: Setting) -> Setting:
    return one_block(setting)


FILE = "model.layers.1.mlp.up_proj.feature.safetensors"


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)


def cut_a_byte(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def manifest_is(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(text) and None


def manifest_says(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (flip_a_byte, f"{FILE} fails its checksum"),
        (cut_a_byte, f"{FILE} fails its checksum"),
        (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "there is none"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff" * 99), "cannot be read"),
        (manifest_is("\0" * 99), "cannot be read"),
        (manifest_is('{"format": 1, "fin'), "cannot be read"),
        (manifest_is("[]"), "cannot be read"),
        (manifest_is("{}"), "cannot be read"),
        (manifest_is("null"), "cannot be read"),
        (manifest_is("7"), "cannot be read"),
        (manifest_says(files={}), "its manifest fails its checksum"),
        (manifest_says(files=[]), "cannot be read"),
        (manifest_says(targets=[]), "its manifest fails its checksum"),
        (manifest_says(bias="none"), "its manifest fails its checksum"),
    ],
)
def test_damage_is_noticed_and_built_over(
    damage: Callable[[Path], None], problem: str, few: Setting, tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    build(folder, few)
    damage(folder)
    assert problem in (store_problem(folder, "print") or "")
    build(folder, few)
    assert store_problem(folder, "print") is None


def test_a_store_whose_manifest_is_damaged_says_so(few: Setting, tmp_path: Path) -> None:
    build(tmp_path / "store", few)
    (tmp_path / "store" / "manifest.json").write_text("")
    with pytest.raises(RankfrontError, match=r"factor store .*store: its manifest\.json is damaged: "):
        FactorStore(tmp_path / "store")


def test_another_fingerprint_another_format_and_no_store_at_all(
    few: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "store", few)
    assert store_problem(tmp_path / "store", "other") == "its fingerprint is another's"
    assert store_problem(tmp_path / "nowhere", "print") == "there is none"
    monkeypatch.setattr(actors.factors, "FORMAT", actors.factors.FORMAT + 1)
    assert store_problem(tmp_path / "store", "print") == "its fingerprint is another's"


def test_what_is_written_is_not_written_again(setting: Setting, tmp_path: Path) -> None:
    """Another builder of the same store goes on with what one that died has left, method by method."""
    first = StoreBuilder(tmp_path / "store", MIXED, setting[1])
    for target in setting[1][:4]:
        first.write(target, weight(setting, target), setting[2][target.name])
    half_done = first.partial / f"{setting[1][3].name}.weight.safetensors"
    half_done.unlink()
    killed = first.partial / f"{setting[1][4].name}.feature.safetensors.99.tmp"
    killed.write_bytes(b"half a file")
    before = {path.name: path.stat().st_ino for path in first.partial.iterdir() if path != killed}
    second = StoreBuilder(tmp_path / "store", MIXED, setting[1])
    assert second.pending() == setting[1][3:]
    write(second, setting)
    assert second.pending() == ()
    assert {name: (second.partial / name).stat().st_ino for name in before} == before
    second.finish("print")
    assert store_problem(tmp_path / "store", "print") is None
    build(tmp_path / "whole", setting, MIXED)
    assert names(tmp_path / "store") == names(tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_said_and_leaves_whole_targets_only(
    failure: Exception, few: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = StoreBuilder(tmp_path / "store", SPEC, few[1])
    save, room = actors.factors.save_file, [1] * 3

    def save_while_there_is_room(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if room:
            room.pop()
            save(tensors, path)
        else:
            path.write_bytes(b"half a file")
            raise failure

    with monkeypatch.context() as patch:
        patch.setattr(actors.factors, "save_file", save_while_there_is_room)
        with pytest.raises(
            RankfrontError, match=r"factor store .*/store: .*No space left on device"
        ) as caught:
            write(builder, few)
    assert caught.value.__cause__ is failure
    assert names(builder.partial) == sorted(f"{t.name}.feature.safetensors" for t in few[1][:3])
    assert builder.pending() == few[1][3:]
    write(builder, few)
    builder.finish("print")
    assert store_problem(tmp_path / "store", "print") is None


def test_a_disk_that_is_full_for_real_looks_the_same(setting: Setting, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the same failing write, from the same libraries."""
    builder = StoreBuilder(tmp_path / "store", SPEC, setting[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(RankfrontError, match=r"factor store .*/store: .*File too large"):
            write(builder, setting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(builder.partial) == []


def test_a_disk_that_is_full_at_the_end_leaves_every_target(
    few: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = StoreBuilder(tmp_path / "store", SPEC, few[1])
    write(builder, few)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(RankfrontError, match=r"factor store .*/store: .*No space left"):
            builder.finish("print")
    assert store_problem(tmp_path / "store", "print") == "there is none"
    assert builder.pending() == ()


def test_a_weight_that_is_no_number_is_refused(setting: Setting, tmp_path: Path) -> None:
    builder = StoreBuilder(tmp_path / "store", SPEC, setting[1])
    target = setting[1][0]
    bad = weight(setting, target).clone()
    bad[3, 4] = torch.nan
    with pytest.raises(RankfrontError, match=rf"{target.name}: 1 non-finite values in its weight") as caught:
        builder.write(target, bad, setting[2][target.name])
    assert caught.value.__cause__ is None  # no disk's fault: see Builder.build
    builder.discard()
    assert names(tmp_path) == []
