"""Drivers killed at random instants: the reduced runs of `benchmarks/kill.py`, which says what must hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("pool", "storage", "kills"),
    [
        ("fake", "journal", 20),
        ("fake", "postgres", 5),
        pytest.param("real", "journal", 5, marks=pytest.mark.slow),
        pytest.param("real", "postgres", 5, marks=pytest.mark.slow),
    ],
)
def test_a_study_survives_kills_at_random_instants(pool: str, storage: str, kills: int) -> None:
    """In a process of its own: drivers are forked, which a process with Ray's threads may not do."""
    program = str(ROOT / "benchmarks" / "kill.py")
    command = [sys.executable, program, "--pool", pool, "--storage", storage, "--kills", str(kills)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert f"| {pool} | {storage} | {kills} |" in ended.stdout
