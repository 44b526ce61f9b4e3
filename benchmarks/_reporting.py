"""What a driver that is to be killed tells of itself: a line for each dispatch and each stored end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import TrialState

from search.study import SearchStudy

NAME = "killed"
REPORTED, DISPATCHED = "reported.jsonl", "dispatched.jsonl"

Opener = Callable[[], contextlib.AbstractContextManager[BaseStorage]]
# What a driver does from its start to its end, on the storage of a folder, until there are so many trials.
Drive = Callable[[Opener, Path, int], None]


def appended(path: Path) -> int:
    """The descriptor of a file that is added to."""
    return os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def write(descriptor: int, value: Any) -> None:
    """One line in one call: there as a whole whenever the process is killed."""
    os.write(descriptor, (json.dumps(value) + "\n").encode())


class Reporting(SearchStudy):
    """Reports every end that is stored."""

    reported: int

    def _finish(
        self, number: int, state: TrialState, values: Any, result: Mapping[str, Any], passed: Any = None
    ) -> None:
        super()._finish(number, state, values, result, passed)
        write(self.reported, [number, state.name, list(values) if values else None])
