"""A made-up study on disk, and commands that run on it in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from fakes import MODEL_PARAMETERS, TARGETS, score_two

from actors.types import Prepared
from search.cli import main
from search.config import parse_config
from search.folder import CONFIG, PREPARED, StudyFolder
from search.journal import open_journal


def study_on_disk(tmp_path: Path) -> StudyFolder:
    """A study on disk, as a driver leaves it: dense and another trial scored, none in flight."""
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("some words of text\n" * 2_000)
    config = parse_config(
        {
            "study": "made-up",
            "runs": str(tmp_path / "runs"),
            "model": {"source": str(tmp_path / "model")},
            "text": {"source": str(tmp_path / "text.txt")},
            "space": {"group": "module"},
            "sampler": {"name": "random"},
        }
    )
    sizes = {"search": 100, "test": 100, "search.forward": 100, "test.forward": 100, "calibration": 100}
    keys = ("model", "tokenizer", "calibration", "search", "test", "factors")
    prepared = Prepared(
        model_folder=str(tmp_path / "model"),
        factor_store=str(tmp_path / "store"),
        targets=TARGETS,
        model_parameters=MODEL_PARAMETERS,
        fingerprints=dict.fromkeys(keys, "0" * 64),
        tokens=sizes,
        examples={"search": {}, "test": {}},
        seconds={},
        reused=False,
    )
    path = config.folder
    path.mkdir(parents=True)
    (path / CONFIG).write_text(config.to_yaml())
    (path / PREPARED).write_text(json.dumps(prepared.to_dict()))
    made = StudyFolder.open(path)
    score_two(made.open_study())
    return made


def trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="made-up", storage=open_journal(folder.path)).get_trials()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["rankfront", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def written(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path
