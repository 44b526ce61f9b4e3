"""Studies of tiny models on disk, and the commands on them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny
import yaml
from optuna.trial import FrozenTrial, TrialState

from search.cli import main
from search.journal import open_journal

PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class Ended:
    """A command that ended, and the study's trials then."""

    code: int
    out: str
    err: str
    trials: list[FrozenTrial]


class Study:
    """A study's folder, its config file and the commands on it."""

    def __init__(self, root: Path, name: str, address: str | None, **overrides: Any) -> None:
        self.root, self.config = root, root / f"{name}.yaml"
        self.raw = tiny.tiny_config(root, study=name, **overrides)
        self.config.write_text(yaml.safe_dump(self.raw))
        self.folder = root / "runs" / name
        self.address = address

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"HF_HUB_OFFLINE": "1"}
        if self.address:
            environment["RAY_ADDRESS"] = self.address
        return subprocess.Popen(
            [sys.executable, "-m", "search.cli", *map(str, arguments)],
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        try:
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
        return Ended(process.returncode, out, err, self.trials())

    def run(self, *arguments: object) -> Ended:
        return self.end(self.start(*arguments))

    def here(self, *arguments: object) -> Ended:
        """The command in this process: for those that need no worker, or end before one starts."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["rankfront", *map(str, arguments)])
            patch.chdir(self.root)
            streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
            with streams[0], streams[1], pytest.raises(SystemExit) as ended:
                main()
        return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue(), self.trials())

    def trials(self) -> list[FrozenTrial]:
        """As Optuna reads them from disk; a line that is being written is not there yet."""
        if not (self.folder / "study.journal").exists():
            return []
        storage = open_journal(self.folder)
        names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
        return optuna.load_study(study_name=names[0], storage=storage).get_trials() if names else []

    def wait_for(self, process: subprocess.Popen[str], finished: int) -> None:
        """Until so many trials are complete on disk."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(complete(self.trials())) < finished:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the search does not come on"
            time.sleep(0.1)

    def content(self) -> dict[str, bytes]:
        """Every file of the study but the lock, which names its last holder."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.name != "driver.lock")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


def complete(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state == TrialState.COMPLETE]


def search_windows(study: Study) -> list[list[int]]:
    """The search split by hand: of the text, what follows the first 40%, then its first 20%."""
    return _windows(study, 0.4, 0.52, 4)


def calibration_windows(study: Study) -> list[list[int]]:
    """The calibration by hand: 512 tokens of the first 40% of the text."""
    return _windows(study, 0.0, 0.4, 16)


def _windows(study: Study, low: float, high: float, count: int) -> list[list[int]]:
    """Windows of 32 tokens of the documents whose middle is in a part of the text, by characters."""
    from transformers import AutoTokenizer

    documents = tiny.documents()
    total, seen, chosen = sum(map(len, documents)), 0, []
    for document in documents:
        if low * total < seen + len(document) / 2 + 1e-9 <= high * total:
            chosen.append(document)
        seen += len(document)
    tokenizer = AutoTokenizer.from_pretrained(study.root / "model")
    ids = tokenizer("\n\n".join(chosen), add_special_tokens=False)["input_ids"]
    return [ids[start : start + 32] for start in range(0, 32 * count, 32)]
