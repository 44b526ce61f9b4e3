"""What lm-evaluation-harness is asked and what it answers, on the wire and in the record.

Standard library only; it is asked in `actors.harness`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from actors.types import RankfrontError, digest

INSTALL = "lm-evaluation-harness is not installed: in the project's folder, pip install -e '.[eval]'"

# Of a folder of tasks: what says how they are asked, and rows that lie beside it.
TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl")


@dataclass(frozen=True)
class HarnessSpec:
    """What is asked: tasks by name, examples of each at most, questions in a batch, a folder of own tasks."""

    tasks: tuple[str, ...]
    limit: int | None
    batch_size: int
    include_path: Path | None


@dataclass(frozen=True)
class HarnessMetric:
    """One metric of one task, by the harness's names; `stderr` is None where the harness has none.

    `filter` is the harness's name for how answers were read (`none`: as they are).
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int | None

    @property
    def name(self) -> str:
        """`lm_eval.<task>.<metric>`, with the filter where there is one."""
        filtered = "" if self.filter == "none" else f",{self.filter}"
        return f"lm_eval.{self.task}.{self.metric}{filtered}"


@dataclass(frozen=True)
class HarnessScore:
    """The answer to one name that was asked for: of a group of tasks, metrics of each and of the group."""

    asked: str
    metrics: tuple[HarnessMetric, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HarnessScore:
        return cls(**{**data, "metrics": tuple(HarnessMetric(**metric) for metric in data["metrics"])})


def metrics_of(results: Mapping[str, Any]) -> list[HarnessMetric]:
    """The metrics in the harness's results, with their standard errors.

    The harness names them `metric,filter` and `metric_stderr,filter`; an error it cannot tell is text.
    """
    found = []
    for task, values in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{how}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            found.append(
                HarnessMetric(
                    task, metric, how, float(value), error if known else None, counts.get("effective")
                )
            )
    return found


def task_fingerprints(spec: HarnessSpec) -> dict[str, str]:
    """Identity of what each task is asked: its name, the limit, the harness's version, one's own task files.

    Rows that a task reads from elsewhere are not looked at.

    Raises:
        RankfrontError: the harness is not installed, or there is no such folder.
    """
    try:
        harness = version("lm_eval")
    except PackageNotFoundError as error:
        raise RankfrontError(INSTALL) from error
    own = None if spec.include_path is None else _content(spec.include_path)
    return {task: digest(["lm_eval", harness, task, spec.limit, own]) for task in spec.tasks}


def _content(folder: Path) -> dict[str, str]:
    """sha256 of every task file below a folder, by its path there."""
    if not folder.is_dir():
        raise RankfrontError(f"--include-path {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix in TASK_FILES and path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
