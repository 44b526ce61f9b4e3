"""Where the tests find what they import, and the tiny models that many of them share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported
# pytest puts tests/ on the path, whose folders `actors` and `search` would hide the packages of that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny


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
