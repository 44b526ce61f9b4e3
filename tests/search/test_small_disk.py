"""A study on a disk that is full, a real one: `small_disk.py` says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount() -> bool:
    """Whether this user may have mounts of its own: Linux, unless it is configured not to."""
    try:
        return subprocess.run([*OWN_MOUNTS, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(
    not may_mount(), reason="no mounts of one's own here; its twin is test_journal_storage.py"
)
def test_a_full_disk_is_waited_for_or_ends_the_driver_and_costs_no_trial(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = subprocess.run(
        [*OWN_MOUNTS, sys.executable, str(HERE / "small_disk.py"), str(disk)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    refusal, answer = found["said"]
    assert "study.journal cannot be written: No space left on device; asking again" in refusal
    assert "answers again" in answer
    assert (
        "study.journal cannot be written: No space left on device. What ended before is in it"
        in (found["refused"])
    )
    assert 0 < found["before"] < 40
    assert found["patient"]
    assert found["again"]
