"""How many workers a refinement gets. That they do their work is in `tests/actors/test_team.py`."""

from __future__ import annotations

from typing import Any

import pytest

from actors.types import RankfrontError
from search.cluster import Machine
from search.config import Config, parse_config
from search.worker import worker_count


def config(**refine: Any) -> Config:
    """Of a step of six windows."""
    return parse_config(
        {
            "study": "s",
            "model": {"source": "org/model"},
            "text": {"source": "org/text"},
            "calibration": {"window": 256},
            "refine": refine,
        }
    )


@pytest.mark.parametrize(
    ("workers", "cores", "gpus", "expected"),
    [
        ("auto", 16, 0, 1),
        ("auto", 16, 4, 4),
        ("auto", 2, 4, 2),
        ("auto", 64, 8, 6),
        (3, 4, 0, 3),
        (4, 8, 4, 4),
    ],
)
def test_workers_are_one_for_each_gpu_and_window_or_as_many_as_asked_for(
    workers: int | str, cores: int, gpus: int, expected: int
) -> None:
    machine = Machine(cores, gpus, memory=0)
    assert worker_count(config(workers=workers), machine) == expected
    assert worker_count(config(workers=workers, method="refit"), machine) == 1


@pytest.mark.parametrize(("gpus", "each"), [(0, "a CPU; 2 at most"), (1, "a CPU and a GPU; 1 at most")])
def test_more_than_ever_run_at_once_are_refused_where_no_node_joins(gpus: int, each: str) -> None:
    with pytest.raises(RankfrontError, match=f"refine.workers: 4 never run at once: each needs {each}"):
        worker_count(config(workers=4), Machine(2, gpus, memory=0))
    assert worker_count(config(workers=4), Machine(2, gpus, memory=0, grows=True)) == 4
