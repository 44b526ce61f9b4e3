"""A folder that is filled out of sight: by one process at a time, and nothing else is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors.claimed import claimed

HOLDER = """
import os, sys, time
from pathlib import Path
from actors.claimed import claimed
with claimed(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("of a process that dies")
    print("claimed", flush=True)
    time.sleep(0.5)
    if sys.argv[2] == "dies":
        os._exit(1)
    partial.rename(sys.argv[1])
"""


@pytest.mark.parametrize("end", ["dies", "ends"])
def test_another_process_waits_and_finds_nothing_of_it(end: str, tmp_path: Path) -> None:
    """The one that ends removes the lock that the other waits for: that one is not taken for a lock."""
    folder = tmp_path / "made"
    arguments = [sys.executable, "-c", HOLDER, str(folder), end]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with claimed(folder) as partial:
            assert other.wait(timeout=60) == (1 if end == "dies" else 0)
            assert list(partial.iterdir()) == []
            assert (tmp_path / ".made.lock").exists()
            assert folder.exists() == (end == "ends")
    assert [file.name for file in tmp_path.iterdir()] == (["made"] if end == "ends" else [])
