"""Drive a study on a disk that fills up, and print what came of it as JSON.

    unshare --user --map-root-user --mount python tests/search/small_disk.py FOLDER

FOLDER becomes a disk of its own, in memory, that only this process sees. The driver and its pool are those of
`benchmarks/kill.py`, and what it reports is beside FOLDER, where there is room.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _faulty_pool
from _faulty_pool import drive_fake
from _kill_checks import Checker, Trial, stored
from _reporting import Opener
from optuna.storages import BaseStorage

from actors.types import RankfrontError
from search.journal import driver_lock, open_journal, repair_journal
from search.patience import Patience, impatient

DISK, LEFT = 1_000_000, 50_000  # bytes: of the disk, and left on it for a study of TRIALS, which takes more
TRIALS = 40
_faulty_pool.SCORE_SECONDS = 0.0


class Disk:
    """A file takes up what is free, but for LEFT bytes of it, until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self) -> None:
        self._ballast.write_bytes(bytes(shutil.disk_usage(self.folder).free - LEFT))

    def empty(self) -> None:
        self._ballast.unlink()


def opener(folder: Path, patience: Callable[[], Patience]) -> Opener:
    @contextlib.contextmanager
    def opened() -> Iterator[BaseStorage]:
        folder.mkdir(exist_ok=True)
        with driver_lock(folder):
            repair_journal(folder)
            yield open_journal(folder, patience())

    return opened


class Study:
    """One that is driven to TRIALS. Whenever a driver has ended, it must hold what was reported."""

    def __init__(self, folder: Path, reports: Path) -> None:
        self._folder, self._reports = folder, reports
        reports.mkdir()
        self._check = Checker(reports)

    @property
    def trials(self) -> list[Trial]:
        return stored(open_journal(self._folder))

    def drive(self, patience: Callable[[], Patience] = impatient) -> list[Trial]:
        """Its trials.

        Raises:
            RankfrontError: the disk is full, and there is no patience left.
        """
        try:
            drive_fake(opener(self._folder, patience), self._reports, TRIALS)
        finally:
            self._check(self.trials)
        return self.trials


def main() -> None:
    disk = Disk(Path(sys.argv[1]))
    beside = disk.folder.parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk.folder], check=True)
    whole = Study(beside / "whole", beside / "whole-reports").drive()
    said: list[str] = []

    def told(line: str) -> None:
        if not said:
            disk.empty()
        said.append(line)

    disk.fill()
    patient = Study(disk.folder / "patient", beside / "patient-reports").drive(lambda: Patience(60.0, told))
    disk.fill()
    study = Study(disk.folder / "impatient", beside / "impatient-reports")
    refused = ""
    try:
        study.drive()
    except RankfrontError as error:
        refused = str(error)
    before = sum(trial.ended for trial in study.trials)
    disk.empty()
    again = study.drive()
    found = {"said": said, "refused": refused, "before": before}
    print(json.dumps({**found, "patient": patient == whole, "again": again == whole}))


if __name__ == "__main__":
    main()
