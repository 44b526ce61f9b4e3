"""A saved config names what was there when it was given; what has moved since stops nobody without need."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import MODEL_PARAMETERS, TARGETS, score_two
from raw_config import put
from rich.console import Console

import search.opening
from actors.types import Prepared, RankfrontError
from search.begun import write_identity
from search.config import Config, ConfigError, load_config, parse_config, parse_saved
from search.database import open_database
from search.finals import evaluate_study
from search.folder import CONFIG, PREPARED, StudyFolder
from search.identity import FIXED_FINGERPRINTS
from search.pool import Machine
from search.status import read_status
from search.terminal import console

PRINTS = dict.fromkeys((*FIXED_FINGERPRINTS, "test"), "f1")
SIZES = {"search": 100, "test": 100, "calibration": 100}
DONE = Prepared(
    "", "", TARGETS, MODEL_PARAMETERS, PRINTS, SIZES, {"search": {}, "test": {}}, {}, reused=False
)
OWN = ("calibration", "corpus", "task", "bias")
LINES = "\n".join(f"{n} lines of some forty characters of text" for n in range(200))


@pytest.fixture
def everywhere(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A config that names a local file in every place that may."""
    for name in OWN:
        (tmp_path / f"{name}.txt").write_text(LINES)
    (tmp_path / "ranks.yaml").write_text("{}")
    at = {name: {"source": str(tmp_path / f"{name}.txt")} for name in OWN}
    own = {"name": "mine", "format": "choices", **at["task"]}
    for key, value in {
        "calibration.text": at["calibration"],
        "scoring.corpora": [{"name": "c", **at["corpus"]}],
        "scoring.tasks": [own, "boolq"],
        "scoring.bias": [{"name": "stereoset", **at["bias"]}],
        "warm_start.sources": [str(tmp_path / "ranks.yaml"), "a-study"],
        "sampler.name": "random",
        "space.group": "module",
    }.items():
        raw = put(raw, key, value)
    return raw


def move(tmp_path: Path) -> None:
    """All that configs of these tests name goes to the folder `moved`."""
    (tmp_path / "moved").mkdir()
    for file in [tmp_path / "model", *tmp_path.glob("*.txt"), *tmp_path.glob("*.yaml")]:
        file.rename(tmp_path / "moved" / file.name)


def saved_of(config: Config) -> Any:
    return yaml.safe_load(config.to_yaml())


# -- reading it -------------------------------------------------------------------------------


def test_what_it_names_may_be_gone(everywhere: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(everywhere)
    saved = saved_of(config)
    assert parse_saved(saved, "here") == config
    move(tmp_path)
    assert parse_saved(saved, "here") == config
    with pytest.raises(ConfigError) as refused:
        parse_config(saved)
    assert [line.partition(": '/")[0] for line in refused.value.mistakes] == [
        "model.source",
        "text.source",
        "calibration.text.source",
        "scoring.corpora[0].source",
        "scoring.tasks[0].source",
        "scoring.bias[0].source",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.source", "package:not_installed_here/model.gguf"),
        ("model.source", "nosuchdriver://bucket/model"),
        ("cache.factors", "nosuchdriver://bucket/factors"),
        ("text.source", "org/text"),
        ("warm_start.sources", ["a-study", "org"]),
    ],
)
def test_names_are_not_those_of_this_machine(
    key: str, value: Any, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No package or driver needs to be installed, no file beside the reader is taken for what is named."""
    (tmp_path / "org" / "text").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = parse_saved(put(saved_of(parse_config(raw)), key, value), "here")
    section, name = key.split(".")
    found = getattr(getattr(config, section), name)
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert parse_saved(saved_of(config), "here") == config


def test_it_is_strict_but_for_rules_that_may_be_younger(everywhere: dict[str, Any], tmp_path: Path) -> None:
    saved = saved_of(parse_config(everywhere))
    move(tmp_path)
    saved = put(saved, "objectives", ["budget.model", "nll.other"])
    assert parse_saved(saved, "here").objectives[1] == "nll.other"
    bad = put(put(saved, "bogus", 1), "text.source", 3)
    with pytest.raises(ConfigError) as refused:
        parse_saved(bad, "runs/s/config.yaml")
    assert str(refused.value).startswith("runs/s/config.yaml: 2 mistakes")
    assert [line.partition(":")[0] for line in refused.value.mistakes] == ["bogus", "text.source"]


# -- the study behind it ----------------------------------------------------------------------


@pytest.fixture
def folder(everywhere: dict[str, Any], tmp_path: Path) -> StudyFolder:
    """A study of two trials, all that its config names moved since."""
    config = parse_config(put(everywhere, "warm_start.sources", []))
    path = config.folder
    path.mkdir(parents=True)
    (path / CONFIG).write_text(config.to_yaml())
    (path / PREPARED).write_text(json.dumps(DONE.to_dict()))
    made = StudyFolder.open(path)
    score_two(made.open_study())
    move(tmp_path)
    return made


def test_status_does_without(folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder, and by the URL of a database from a machine that never had any of it."""
    assert read_status(str(folder.path), tmp_path).trials == {"COMPLETE": 2}
    monkeypatch.setenv("STUDIES", f"sqlite:///{tmp_path / 'studies.db'}")
    config = folder.config.model_copy(update={"database": "${STUDIES}"})
    storage = open_database("${STUDIES}")
    write_identity(storage, config, folder.prepared)
    score_two(replace(folder, config=config, leased=storage).open_study())
    assert read_status("${STUDIES}", tmp_path / "elsewhere").trials == {"COMPLETE": 2}


@contextlib.contextmanager
def resumed(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, edited: dict[str, Any], search_text: str = "f1"
) -> Iterator[search.opening.Session]:
    """As `rankfront search` with a config that was edited; the preparation finds `search_text`."""

    def prepare(spec: Any, machine: Any, count: int, say: Any, bar: Any, check: Any, *rest: Any) -> Prepared:
        check({**PRINTS, "search": search_text})
        return DONE

    monkeypatch.setattr(search.opening, "connect", lambda: Machine(cores=1, gpus=0, memory=1))
    monkeypatch.setattr(search.opening, "prepare", prepare)
    given = folder.path.parents[1] / "given.yaml"
    given.write_text((folder.path / CONFIG).read_text())
    with search.opening.opened(load_config(given, edited), Console(file=io.StringIO())) as session:
        yield session


def edited_names(tmp_path: Path) -> dict[str, Any]:
    at = {name: str(tmp_path / "moved" / f"{name}.txt") for name in OWN}
    return {
        "model.source": str(tmp_path / "moved" / "model"),
        "text.source": str(tmp_path / "moved" / "text.txt"),
        "calibration.text.source": at["calibration"],
        "scoring.corpora": [{"name": "c", "source": at["corpus"]}],
        "scoring.tasks": [{"name": "mine", "format": "choices", "source": at["task"]}, "boolq"],
        "scoring.bias": [{"name": "stereoset", "source": at["bias"]}],
    }


def test_a_study_goes_on_with_what_moved_named_anew(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content decides, as `docs/resume.md` says."""
    before = (folder.path / CONFIG).read_text()
    edited = edited_names(tmp_path)
    with (
        pytest.raises(RankfrontError, match="search: the content differs"),
        resumed(folder, monkeypatch, edited, "other"),
    ):
        pass
    assert (folder.path / CONFIG).read_text() == before
    with resumed(folder, monkeypatch, edited) as session:
        assert session.folder.open_study().propose("random").number == 2
    assert StudyFolder.open(folder.path).config.text.source == str(tmp_path / "moved" / "text.txt")


def test_a_given_config_that_names_what_is_gone_is_refused(
    folder: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = edited_names(tmp_path) | {"text.source": str(tmp_path / "text.txt")}
    with pytest.raises(ConfigError) as refused, resumed(folder, monkeypatch, edited):
        pass
    [line] = refused.value.mistakes
    assert line.startswith(f"text.source: '{tmp_path / 'text.txt'}': no file or folder")


def test_a_command_that_needs_what_is_gone_says_so_before_it_starts(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.opening, "connect", lambda: pytest.fail("a machine was asked for"))
    with pytest.raises(RankfrontError, match=r"study 'made-up': 6 mistakes, nothing was started\n  model\.s"):
        evaluate_study(folder, [], console)
