"""A tiny study on disk with a dense trial and a compressed one, and a worker in this process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
from rich.console import Console

from actors.harness_results import HarnessScore
from actors.preparation import prepare
from actors.refiner import Refiner
from actors.types import Prepared, ReplicaSpec, Score
from search.config import parse_config
from search.folder import StudyFolder
from search.pool import Machine
from search.records import TrialRow
from search.refine import Refined, refine

MACHINE = Machine(cores=1, gpus=0, memory=2**30)
REFINE = {"steps": 6, "tokens": 64, "warmup": 1, "held_out": 64, "evaluate_every": 2}


def make_study(root: Path) -> StudyFolder:
    """Trial 0 is dense, trial 1 uniform; both are scored."""
    config = parse_config(tiny.tiny_config(root, refine=REFINE, scoring={"kl_top_k": 16}))
    *_, prepared = prepare(config.preparation())
    assert isinstance(prepared, Prepared)
    folder = StudyFolder(config.folder, config, prepared)
    folder.path.mkdir(parents=True)
    worker = Refiner(ReplicaSpec("r", config.preparation(), prepared, 1, "cpu"), folder.path / "refined")
    study = folder.open_study()
    cost = folder.cost
    study.enqueue([(cost.uniform(1.0), "dense"), (cost.uniform(0.6), "uniform")])
    for _ in range(2):
        planned = study.propose("random")
        study.complete(planned, worker.score(planned.allocation, "search", None))
    (folder.path / "config.yaml").write_text(config.to_yaml())
    (folder.path / "prepared.json").write_text(json.dumps(prepared.to_dict()))
    return folder


@dataclass
class Tiny:
    """A copy of its own of the study; `asked` are the scores and the tasks that its worker was asked for,
    `closed` is how often its processes were ended."""

    folder: StudyFolder
    asked: list[tuple[str, str | None]]
    closed: int = 0

    def row(self, number: int = 1) -> TrialRow:
        return self.folder.open_study().rows()[number]

    def refine(self, number: int = 1) -> Refined:
        return refine(self.folder, self.row(number), Console(file=io.StringIO()))

    @contextlib.contextmanager
    def refiner(
        self, folder: StudyFolder, machine: Machine, workers: int = 1, say: Any = None
    ) -> Iterator[Refiner]:
        """What `search.worker.refiner` does, in this process."""
        asked, study = self.asked, self

        class Asked(Refiner):
            def close(self) -> None:
                study.closed += 1

            def score(self, allocation: Any, split: str, file: str | None) -> Score:
                asked.append((split, file))
                return super().score(allocation, split, file)

            def ask(self, allocation: Any, file: str | None, spec: Any, task: str) -> HarnessScore:
                asked.append((task, file))
                return super().ask(allocation, file, spec, task)

        spec = ReplicaSpec("refiner", folder.config.preparation(), folder.prepared, 1, "cpu")
        yield Asked(spec, folder.path / "refined")
