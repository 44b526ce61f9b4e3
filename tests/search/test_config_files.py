"""Configs as files and commands: what is refused before anything starts, what is saved, overrides."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from raw_config import put

from actors.node_cache import node_folder
from actors.types import RankfrontError
from search.allocation_file import read_configuration
from search.config import Config, ConfigError, load_config, parse_config, parse_saved

REFUSE_RAY = """
import ray
def refuse(*arguments, **more):
    print("RAY WAS STARTED")
    raise SystemExit(99)
ray.init = refuse
from search.cli import main
main()
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE_RAY, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_starts_nothing_with_a_wrong_config(raw: dict[str, Any], tmp_path: Path) -> None:
    wrong = put(put(raw, "bogus", 1), "space.floor", 7)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(wrong))
    before = sorted(tmp_path.rglob("*"))
    done = command(tmp_path, "search", "bad.yaml")
    assert done.returncode == 2
    assert "2 mistakes, nothing was started" in done.stderr
    assert "bogus: unknown key" in done.stderr
    assert "space.floor: 7" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "RAY WAS STARTED" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("study: [", "1:9: cannot be read: while parsing a flow node: expected the node content, but found"),
        ("a: 1\nb: c: d", "2:5: cannot be read: mapping values are not allowed here"),
        ("- a\nb: c", "2:1: cannot be read: while parsing a block collection: expected <block end>"),
        ("a: 1\nb: \x00", "2:4: cannot be read: unacceptable character #x0000"),
        ("? [1]\n: 2", "1:3: cannot be read: while constructing a mapping: found unhashable key"),
    ],
)
def test_a_file_that_is_no_yaml_is_one_line_that_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for read in (load_config, lambda path: read_configuration(path, "./model")):
        with pytest.raises(RankfrontError, match=rf"^{path}:{says}.*$"):
            read(path)


@pytest.mark.parametrize("text", ["- a list", "", "study: 2026-13-01"])
def test_a_file_that_is_no_config_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: 1 mistake, nothing was started"):
        load_config(path)


def test_a_key_that_is_there_twice_is_said_and_where(raw: dict[str, Any], tmp_path: Path) -> None:
    """`a` and "a" are one key; what is merged may be overridden."""
    path, lines = tmp_path / "config.yaml", yaml.safe_dump(raw)
    path.write_text(lines + 'space: {levels: 9, group: module, "levels": 3}\n')
    where = len(lines.splitlines()) + 1
    with pytest.raises(RankfrontError, match=rf":{where}:35: cannot be read: 'levels' is there twice$"):
        load_config(path)
    path.write_text(lines + "space: {<<: {levels: 9}, group: module, levels: 3}\n")
    assert load_config(path).space.levels == 3


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_the_saved_config_is_the_config(raw: dict[str, Any]) -> None:
    raw |= {"objectives": ["budget.linear", "reasoning.acc", "nll"], "stop": {"plateau": {"trials": 9}}}
    config = parse_config(raw)
    saved = yaml.safe_load(config.to_yaml())
    assert parse_config(saved) == config
    assert saved["stop"] == {
        "trials": 200,
        "tokens": None,
        "hours": None,
        "plateau": {"trials": 9, "tolerance": 0.001},
    }
    assert set(saved) == set(Config.model_fields), "defaults are saved too: they may change"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("gpus", ["auto", 0.5, 2])
def test_saving_says_nothing(raw: dict[str, Any], gpus: Any) -> None:
    """No value is of a type that its key is not declared with."""
    assert yaml.safe_load(parse_config(put(raw, "replicas.gpus", gpus)).to_yaml())["replicas"]["gpus"] == gpus


def test_local_sources_are_saved_as_absolute_paths(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """So that the study can be resumed from another folder."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(put(raw, "model.source", "./model"))
    assert config.model.source == str(tmp_path / "model")


def test_a_study_is_not_in_the_folder_of_factor_stores(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    named = raw | {"study": "factors", "runs": "runs"}
    for cache in ({}, {"factors": "./runs/factors/"}, {"factors": str(tmp_path / "runs" / "factors")}):
        with pytest.raises(ConfigError, match=r"study: 'factors' would lie in runs/factors, where factor"):
            parse_config(named | {"cache": cache})
    for cache in ({"factors": "elsewhere"}, {"factors": "file:///mnt/runs/factors"}):
        assert parse_config(named | {"cache": cache}).study == "factors"
    with pytest.raises(ConfigError, match="study: 'mine' would lie in"):
        parse_config(named | {"study": "mine", "cache": {"factors": "runs/mine"}})


def test_the_home_in_runs_is_the_users(raw: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """No folder of that name is made in the one where the search is started."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = parse_config(put(raw, "runs", "~/runs"))
    assert config.folder == tmp_path / "home" / "runs" / "made-up"
    assert parse_config(yaml.safe_load(config.to_yaml())).runs == str(tmp_path / "home" / "runs")
    assert parse_config(put(raw, "runs", "some/~/runs")).runs == "some/~/runs"


@pytest.mark.parametrize("key", ["runs", "model.source", "text.source", "cache.factors", "cache.node"])
def test_a_home_of_nobody_is_a_mistake(raw: dict[str, Any], key: str) -> None:
    """Nothing more is asked of a saved config's cache: it may be of another machine."""
    says = f"{key}: '~nobody-is-called-so/x': there is no such home; ~/... or another folder"
    with pytest.raises(ConfigError, match=f"  {re.escape(says)}$"):
        parse_config(put(raw, key, "~nobody-is-called-so/x"))
    if key.startswith("cache."):
        saved = parse_saved(put(raw, key, "~nobody-is-called-so/x"), "saved")
        with pytest.raises(RankfrontError, match=f"^{re.escape(says)}$"):
            node_folder(saved.preparation())


def test_overrides_change_nested_keys_and_create_sections(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    overrides = {"scoring.tokens": {"search": 64, "test": 96}, "stop.plateau.trials": 7, "study": "other"}
    config = load_config(path, overrides)
    assert (config.scoring.tokens.search, config.scoring.tokens.test) == (64, 96)
    assert config.stop.plateau is not None
    assert config.stop.plateau.trials == 7
    assert config.study == "other"
    assert config.scoring.window == 32, "the rest of the section stays"


def test_an_override_below_a_value_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(RankfrontError, match="study"):
        load_config(path, {"study.name": "x"})
