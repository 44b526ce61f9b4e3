"""A right config, and fixtures of the tests of what comes after a search."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pools import local_ray as local_ray
from pools import pool_of as pool_of
from tiny_study import MACHINE, Tiny, make_study

import search.refine
from search.folder import StudyFolder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study with a dense and a compressed trial; read-only."""
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def study(made: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A copy of its own of the study, refined in this process."""
    path = tmp_path / "tiny"
    shutil.copytree(made.path, path)
    tiny = Tiny(replace(made, path=path), [])
    monkeypatch.setattr(search.refine, "refiner", tiny.refiner)
    monkeypatch.setattr(search.refine, "connect", lambda: MACHINE)
    return tiny


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """A right config whose sources are local."""
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text(
        "\n".join(f"{n} lines of some forty characters of text" for n in range(200))
    )
    return {
        "study": "made-up",
        "runs": str(tmp_path / "runs"),
        "model": {"source": str(tmp_path / "model")},
        "text": {"source": str(tmp_path / "text.txt")},
        "calibration": {"window": 32},
        "scoring": {"window": 32, "tasks": ["arc_easy", "boolq"]},
    }
