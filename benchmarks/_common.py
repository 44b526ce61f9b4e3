"""What the benchmarks share: the quick start's model and text, and tables in Markdown."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from actors.preparation import prepare
from actors.types import Allocation, PreparationSpec, Prepared
from search.config import Config, parse_config
from search.cost import CostModel

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "runs" / "benchmarks"


def quick_start(**sections: object) -> Config:
    """The quick start's config with some sections replaced, its studies under runs/benchmarks."""
    raw = yaml.safe_load((ROOT / "configs" / "smollm2.yaml").read_text())
    return parse_config({**raw, "runs": str(CACHE), **sections})


def prepared(spec: PreparationSpec) -> Prepared:
    """Run the preparation here, printing its progress."""
    for item in prepare(spec, torch.get_num_threads()):
        if isinstance(item, Prepared):
            return item
        if isinstance(item, str):
            print(item, file=sys.stderr, flush=True)
    raise RuntimeError("the preparation ended without a result")


def uniform_at(cost: CostModel, budget: float) -> Allocation:
    """Every target at the largest common share whose model is within the budget."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        within = cost.budgets(cost.uniform(middle))["budget.model"] <= budget
        low, high = (middle, high) if within else (low, middle)
    return cost.uniform(low)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


class PeakMemory:
    """Largest resident memory while open, in bytes above what was there at the start; sampled each 5 ms."""

    def __enter__(self) -> PeakMemory:
        self._start = self._peak = _resident()
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self._peak = max(self._peak, _resident())
            time.sleep(0.005)

    @property
    def bytes(self) -> int:
        return self._peak - self._start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    """Processor, cores and versions, for the line under a table."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, torch {torch.__version__}, Python {platform.python_version()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
