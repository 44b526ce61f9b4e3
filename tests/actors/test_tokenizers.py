"""Tokenizers: what is refused, what their identity is, and which an export gets beside its other files."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_tokenizers import HUB, as_on_the_hub
from tokenizers.normalizers import Lowercase

from actors.models import (
    copy_side_files,
    fingerprint_tokenizer,
    load_tokenizer,
    name_tokenizer,
    same_tokenizers,
)
from actors.types import ModelSource, RankfrontError


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_folder_without_a_tokenizer_says_so(kind: str, llama: Path, tmp_path: Path) -> None:
    """Of some models transformers then makes an empty one."""
    settings = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": kind}))
    with pytest.raises(RankfrontError, match=f"^{tmp_path}: its tokenizer "):
        load_tokenizer(tmp_path, ModelSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("tokenizer.json", {}, "'added_tokens' is missing, or unknown to transformers"),
        ("tokenizer.json", {"added_tokens": [], "model": {}}, ""),
        ("tokenizer.json", 3, ""),
        ("tokenizer_config.json", [], "'list' object has no attribute 'get'"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, ""),
    ],
)
def test_a_tokenizer_that_is_none_is_named_with_its_cause(
    file: str, content: Any, cause: str, llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / file).write_text(json.dumps(content))
    source = ModelSource(str(folder))
    with pytest.raises(RankfrontError, match=rf"^{source.source}: its tokenizer cannot be read: {cause}.*$"):
        load_tokenizer(source.source, source)


def test_tokenizer_fingerprint_is_of_what_it_does(llama: Path) -> None:
    source = ModelSource(str(llama))
    one, other = load_tokenizer(llama, source), load_tokenizer(llama, source)
    assert fingerprint_tokenizer(one) == fingerprint_tokenizer(other)
    other.add_tokens(["<new>"])
    assert fingerprint_tokenizer(one) != fingerprint_tokenizer(other)
    lower = load_tokenizer(llama, source)
    lower.backend_tokenizer.normalizer = Lowercase()
    assert fingerprint_tokenizer(one) != fingerprint_tokenizer(lower)


def test_side_files_leave_weights_and_config_behind(llama: Path, tmp_path: Path) -> None:
    copy_side_files(llama, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_side_files_never_hold_a_pickle(llama: Path, tmp_path: Path) -> None:
    source, destination = tmp_path / "source", tmp_path / "destination"
    shutil.copytree(llama, source)
    destination.mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt", "model.pth", "training_args.bin", "state.pkl"):
        (source / name).write_bytes(pickle.dumps({}))
    copy_side_files(source, destination)
    assert {file.suffix for file in destination.iterdir()} == {".json"}


@pytest.mark.parametrize("model_type", HUB)
def test_an_exports_tokenizer_is_that_of_its_model(model_type: str, tmp_path: Path) -> None:
    """Transformers picks its class by the type of the model too, unless it is named as here."""
    folder, export = tmp_path / "model", tmp_path / "export"
    tiny.tiny_model(folder, model_type)
    as_on_the_hub(folder, model_type)
    export.mkdir()
    copy_side_files(folder, export)
    (export / "config.json").write_text(json.dumps({"model_type": "rankfront"}))
    source = ModelSource(str(folder))
    ours = load_tokenizer(folder, source)
    assert same_tokenizers(ours, load_tokenizer(export, source)) == (model_type == "llama")
    before = (export / "tokenizer_config.json").read_bytes()
    name_tokenizer(export, ours)
    theirs = load_tokenizer(export, source)
    assert same_tokenizers(ours, theirs)
    assert type(theirs) is type(ours)
    after = (export / "tokenizer_config.json").read_bytes()
    named = {"tokenizer_class": json.loads(after)["tokenizer_class"]}
    assert json.loads(after) == json.loads(before) | named
    assert (after == before) == (model_type == "llama"), "what is read alike stays as it is"
