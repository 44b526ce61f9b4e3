"""Names of models and data: the three forms, what is refused, and fingerprints of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from actors import sources
from actors.sources import Source, fingerprint_files
from actors.types import RankfrontError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that fails when it is run."""
    folder = tmp_path / "site" / "tiny_packaged"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('a data package was run')")
    (folder / "data" / "model.gguf").write_text("weights")
    (tmp_path / "site" / "secret.txt").write_text("not of the package")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.mark.parametrize(
    ("name", "hub_id", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("hub:org/name@main", "org/name", "main"),
    ],
)
def test_hub_ids(
    name: str, hub_id: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Source.parse(name)
    assert (place.hub_id, place.revision, place.path) == (hub_id, revision, None)


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("./models", "~/models", str(tmp_path / "models"), "./models/../models"):
        place = Source.parse(name)
        assert place.path == (tmp_path / "models").resolve()
        assert place.name == str(place.path)  # a saved config means the same from any folder
        assert place.hub_id is None


def test_a_home_of_nobody_is_named() -> None:
    with pytest.raises(RankfrontError, match=r"^'~nobody-is-called-so/x': there is no such home; ~/\.\.\."):
        Source.parse("~nobody-is-called-so/x")


def test_a_local_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RankfrontError, match=r"no file or folder .*/nowhere"):
        Source.parse(str(tmp_path / "nowhere"))


def test_packaged_file_is_found_without_running_the_package(package: Path) -> None:
    place = Source.parse("package:tiny_packaged/data/model.gguf")
    assert place.path == (package / "data" / "model.gguf").resolve()
    assert place.name == "package:tiny_packaged/data/model.gguf"


@pytest.mark.parametrize("inner", ["../secret.txt", "data/../../secret.txt", "/etc/hostname", "link.txt"])
def test_nothing_outside_a_package_is_reached_through_it(package: Path, inner: str) -> None:
    (package / "link.txt").symlink_to(package.parent / "secret.txt")
    with pytest.raises(RankfrontError, match="leaves the package 'tiny_packaged'"):
        Source.parse(f"package:tiny_packaged/{inner}")


def test_missing_packages_and_files(package: Path) -> None:
    with pytest.raises(RankfrontError, match=r"the package 'tiny_packaged' has no 'data/other\.gguf'"):
        Source.parse("package:tiny_packaged/data/other.gguf")
    for name in ("no_such_package/x", "colorsys/x", "tiny_packaged.data/model.gguf", "/x", ""):
        with pytest.raises(RankfrontError, match="no Python package"):
            Source.parse(f"package:{name}")


@pytest.mark.parametrize("prefix", ["", "hub:"])
@pytest.mark.parametrize("revision", ["", "@v1.0"])
@pytest.mark.parametrize("local", ["org/name", "name"])
def test_a_hub_id_is_refused_where_a_folder_is_called_so(
    local: str, revision: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers and datasets are given the bare id, and prefer the folder."""
    (tmp_path / local).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    says = rf"a hub id, but {tmp_path / local} is here too: write \./{local} for that; .* elsewhere or rename"
    with pytest.raises(RankfrontError, match=says):
        Source.parse(f"{prefix}{local}{revision}")
    assert Source.parse(f"./{local}").path == (tmp_path / local).resolve()
    monkeypatch.chdir(tmp_path / local)
    assert Source.parse(f"{prefix}{local}{revision}").hub_id == local


@pytest.mark.parametrize("prefix", ["", "hub:"])
def test_a_file_called_like_an_id_with_its_revision_is_refused_too(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "name@v1.0").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RankfrontError, match=r"write \./name@v1\.0 for that"):
        Source.parse(f"{prefix}name@v1.0")


@pytest.mark.parametrize("name", ["", "two words", "org/name/more", "https://host/x", "org/name@", "C:\\x"])
def test_what_is_no_source(name: str) -> None:
    with pytest.raises(RankfrontError, match="is no source: write a hub id"):
        Source.parse(name)


def tree(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"0123456789")
    (folder / "inner" / "config.json").write_bytes(b"{}")
    return folder


def test_fingerprint_is_of_names_and_contents_not_of_the_place(tmp_path: Path) -> None:
    here, there = tree(tmp_path / "here"), tree(tmp_path / "there")
    assert fingerprint_files(here) == fingerprint_files(there)
    (there / ".lock").write_bytes(b"hidden files do not count")
    assert fingerprint_files(here) == fingerprint_files(there)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.safetensors").write_bytes(b"0123456780"),
        lambda folder: (folder / "a.safetensors").write_bytes(b"012345678"),
        lambda folder: (folder / "a.safetensors").rename(folder / "b.safetensors"),
        lambda folder: (folder / "inner" / "config.json").rename(folder / "config.json"),
        lambda folder: (folder / "empty.json").write_bytes(b""),
        lambda folder: shutil.rmtree(folder / "inner"),
    ],
    ids=["content", "size", "name", "folder", "added", "removed"],
)
def test_fingerprint_changes_with(change: object, tmp_path: Path) -> None:
    folder = tree(tmp_path / "model")
    before = fingerprint_files(folder)
    change(folder)  # type: ignore[operator]
    assert fingerprint_files(folder) != before


def test_suffixes_choose_files_of_a_folder(tmp_path: Path) -> None:
    folder = tree(tmp_path / "model")
    before = fingerprint_files(folder, (".safetensors",))
    (folder / "inner" / "config.json").write_bytes(b"changed")
    assert fingerprint_files(folder, (".safetensors",)) == before
    (folder / "a.safetensors").write_bytes(b"changed")
    assert fingerprint_files(folder, (".safetensors",)) != before


def test_large_files_are_sampled_at_both_ends_and_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, sample, samples = 10_000, 100, 11
    monkeypatch.setattr(sources, "_WHOLE_FILE_BYTES", 1_000)
    monkeypatch.setattr(sources, "_SAMPLE_BYTES", sample)
    monkeypatch.setattr(sources, "_SAMPLES", samples)
    file = tmp_path / "model.gguf"

    def fingerprint_with(position: int | None, length: int = size) -> str:
        content = bytearray(length)
        if position is not None:
            content[position] = 1
        file.write_bytes(content)
        return fingerprint_files(file)

    plain = fingerprint_with(None)
    starts = [round(i * (size - sample) / (samples - 1)) for i in range(samples)]
    for start in starts:  # the first and the last byte of every sample, so of the file too
        assert fingerprint_with(start) != plain
        assert fingerprint_with(start + sample - 1) != plain
    assert fingerprint_with(None, size + 1) != plain
    assert fingerprint_with(starts[1] - 1) == plain  # between two samples: sampled, not read whole
    assert fingerprint_with(None) == plain


def large_safetensors(file: Path, header: bytes, length: int | None = None) -> Path:
    """A sparse file of 300 MB, zeros behind its header; `length` is what it says of the header's."""
    with file.open("wb") as stream:
        stream.write((len(header) if length is None else length).to_bytes(8, "little") + header)
        stream.truncate(300 * 2**20)
    return file


def header_of(*lengths: int) -> bytes:
    """Tensors of so many bytes, one behind the other, and one that takes the rest of 300 MB; 4096 bytes."""
    lengths = (*lengths, 300 * 2**20 - 8 - 4096 - sum(lengths))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for index, length in enumerate(lengths):
        offsets = [start, start + length]
        entries[f"t{index}"] = {"dtype": "U8", "shape": [length], "data_offsets": offsets}
        start += length
    return json.dumps(entries).encode().ljust(4096)


def patched(file: Path, position: int) -> str:
    """The fingerprint with another byte at a position, which is restored."""
    with file.open("rb+") as stream:
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
        stream.flush()
        found = fingerprint_files(file)
        stream.seek(position)
        stream.write(bytes([byte]))
    return found


def test_a_change_in_any_tensor_of_a_large_file_counts(tmp_path: Path) -> None:
    """Norms and biases are small, and the samples of 300 MB are 1.2 MB apart."""
    lengths = [100_000, 4_096, 0, 400_000, 4_096]
    file = large_safetensors(tmp_path / "model.safetensors", header_of(*lengths))
    with safe_open(file, "np") as opened:
        assert len(opened.keys()) == len(lengths) + 1
    data = 8 + 4096
    starts = [data + sum(lengths[:index]) for index in range(len(lengths) + 1)]
    beyond = starts[3] + 64 * 2**10
    within = [starts[1], starts[1] + 4_095, starts[3], beyond - 1, starts[4], starts[4] + 4_095, starts[5]]
    plain = fingerprint_files(file)
    assert all(patched(file, position) != plain for position in within)
    assert patched(file, beyond) == plain  # far inside a tensor: sampled, not read whole
    other = file.rename(tmp_path / "model.gguf")
    assert fingerprint_files(other) != plain
    assert {patched(other, position) for position in within} == {fingerprint_files(other)}


def test_the_header_of_a_large_file_counts(tmp_path: Path) -> None:
    """Behind the first sample too: two tensors of one shape may have changed names there."""
    many = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(3_000)}
    header = json.dumps(many).encode()
    assert len(header) > 2 * 64 * 2**10
    file = large_safetensors(tmp_path / "model.safetensors", header)
    assert patched(file, 8 + header.index(b'"t2999"') + 1) != fingerprint_files(file)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"no JSON", None),
        (b"\xff\xfe\xfd", None),
        (b"[1, 2]", None),
        (b"[" * 100_000, None),
        (b'{"t": 1}', None),
        (b'{"t": {"dtype": "U8"}}', None),
        (b'{"t": {"data_offsets": null}}', None),
        (b'{"t": {"data_offsets": [0]}}', None),
        (b'{"t": {"data_offsets": [0.0, 8.0]}}', None),
        (b'{"t": {"data_offsets": ["0", "8"]}}', None),
        (b'{"t": {"data_offsets": [-1, 8]}}', None),
        (b'{"t": {"data_offsets": [8, 0]}}', None),
        (b'{"t": {"data_offsets": [0, 314572800]}}', None),
        (b"{}", 0),
        (b"{}", 250 * 2**20),
        (b"{}", 2**64 - 1),
    ],
)
def test_a_large_file_whose_header_cannot_be_read_is_sampled(
    header: bytes, length: int | None, tmp_path: Path
) -> None:
    file = large_safetensors(tmp_path / "model.safetensors", header, length)
    found = fingerprint_files(file)
    assert found == fingerprint_files(file.rename(tmp_path / "model.gguf"))


def test_what_is_hashed_whole_or_is_of_another_format_keeps_its_fingerprint(tmp_path: Path) -> None:
    """A store and a study of an earlier version are found by these; the values are that version's."""
    whole = tmp_path / "small.safetensors"
    whole.write_bytes(len(header_of(9)).to_bytes(8, "little") + header_of(9))
    assert fingerprint_files(whole) == "83af90f74ac2d44490e5433df4c2867b6aa72b1476830156abc29de6989ad8c0"
    other = large_safetensors(tmp_path / "model.gguf", header_of(9))
    assert fingerprint_files(other) == "14e414884b3336393ebc72d2d2701fc6270942713008b8cef6ab8da767b05df2"
