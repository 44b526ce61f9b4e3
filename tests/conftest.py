"""Where the tests find what they import, and the tiny models that many of them share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

# All of these are read when the libraries are imported. Tiny matrices are no work for two threads, and
# threads that wait for one another in a loop take the cores from the other processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Dozens of processes import ray and torch: compiled by each of them, the imports take three times as long.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Every actor here has an environment of its own: no worker that Ray starts ahead would serve one.
os.environ |= {"RAY_prestart_worker_first_driver": "0"}
# pytest puts tests/ on the path, whose folders `actors` and `search` would hide the packages of that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

# The files that wait for Ray and for other processes, longest first.
LONGEST = ("test_preparing", "test_tiny_sensitivity", "test_tiny_search", "test_pool", "test_builder")


def pytest_configure(config: pytest.Config) -> None:
    # Not in pyproject.toml: pytest would import optuna, and numpy with it, before the lines above are read.
    config.addinivalue_line("filterwarnings", "ignore::optuna.exceptions.ExperimentalWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the files, the long ones come first: none is left over at the end."""
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer; treat the folder as read-only."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def biased_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose linear layers all have biases and whose LM head is its own; read-only too."""
    folder = tmp_path_factory.mktemp("biased-llama")
    return tiny.tiny_llama(folder, seed=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def ids() -> Any:
    """Calibration windows (24, 32) of the tiny text."""
    from actors.text import windows

    return windows(tiny.documents(), "\n\n", tiny.tiny_tokenizer(), 32, 24 * 32)
