"""Another config than a study was searched by, or a model that cannot be loaded: nothing is changed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from studies import Ended, Study

import search.opening
import search.session
from actors.preparation import prepare
from actors.types import Foreseen, Prepared, RankfrontError
from search.config import load_config
from search.pool import Machine


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    return Study(root, "tiny", address=None)


@pytest.fixture(scope="module")
def searched(study: Study) -> Ended:
    ended = study.run("search", study.config, "--trials", 2)
    assert ended.code == 0, ended.err
    return ended


def test_other_objectives_are_refused_by_name(study: Study, searched: Ended) -> None:
    before = study.content()
    refused = study.here(
        "search", study.config, "--set", "objectives=[budget.linear, nll]", "--set", "space.levels=9"
    )
    assert refused.code == 2
    assert "objectives: was ['budget.model', 'nll'], now ['budget.linear', 'nll']" in refused.err
    assert "space.levels: was 8, now 9" in refused.err
    assert study.content() == before


def prepare_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(spec: Any, *arguments: Any) -> Prepared:
        *_, check, foresee = arguments
        for item in prepare(spec):
            if isinstance(item, Prepared):
                return item
            if isinstance(item, Mapping):
                check(item)
            if isinstance(item, Foreseen):
                foresee(item.prepared)
        raise AssertionError("nothing was prepared")

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=2**30))
    monkeypatch.setattr(search.opening, "prepare", prepared)


def test_another_text_is_refused_by_name(
    study: Study, searched: Ended, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name, another content: found by fingerprint. The preparation runs in this process."""
    prepare_here(monkeypatch)
    rows = [{"text": document.upper()} for document in tiny.documents()]
    other = root / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, rows)))
    before = study.content()
    stores = len(list((root / "runs" / "factors").glob("*/manifest.json")))
    config = load_config(study.config, {"text.source": str(other)})
    with pytest.raises(RankfrontError, match="cannot be resumed") as caught:
        search.session.search(config, Console(file=io.StringIO()))
    assert "search: the content differs" in str(caught.value)
    assert "calibration: the content differs" in str(caught.value)
    assert "model: " not in str(caught.value)
    assert study.content() == before
    assert len(list((root / "runs" / "factors").glob("*/manifest.json"))) == stores, "it was late"


def test_a_study_that_cannot_start_leaves_no_folder(
    study: Study, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's weights are gone: found by the workers, after the folder was made."""
    broken = Study(root, "broken", None)
    empty = root / "no-weights"
    shutil.copytree(root / "model", empty, ignore=shutil.ignore_patterns("*.safetensors"))
    prepare_here(monkeypatch)
    with pytest.raises(RankfrontError, match="no-weights"):
        search.session.search(
            load_config(broken.config, {"model.source": str(empty)}), Console(file=io.StringIO())
        )
    assert not broken.folder.exists()


def test_a_sampler_that_the_space_is_too_large_for_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level for each module type in each third of the depth: only the loaded model tells how many."""
    many = Study(root, "many", None, sampler={"name": "gp"}, space={"segments": 3})
    prepare_here(monkeypatch)

    def started(*arguments: object) -> None:
        raise AssertionError("it was not refused")

    monkeypatch.setattr(search.session, "replicas", started)
    with pytest.raises(RankfrontError, match="'gp' takes a space of at most 20 parameters, this one has 21"):
        search.session.search(load_config(many.config), Console(file=io.StringIO()))
    assert not many.folder.exists()
