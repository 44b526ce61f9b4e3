"""What Ray is told of a search, by the names that are documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.util.metrics
from fakes import TARGETS, MadeUpPool, open_study, score_of

import search.metrics
from actors.types import Allocation
from search.metrics import COUNTERS, GAUGES, RayMetrics
from search.pool import Job, Outcome
from search.runner import Runner, Stop, current_hypervolume, hypervolumes
from search.sections import StopSection


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """What Ray would be sent: the sum of a counter, the last value of a gauge, by name and tags."""
    found: dict[tuple[str, ...], float] = {}

    def key(metric: Any, tags: Any) -> tuple[str, ...]:
        full = metric._get_final_tags(tags)
        metric._validate_tags(full)
        return (metric.info["name"], *(full[name] for name in metric.info["tag_keys"]))

    class Counter(ray.util.metrics.Counter):
        def inc(self, value: float = 1.0, tags: Any = None) -> None:
            found[key(self, tags)] = found.get(key(self, tags), 0.0) + value

    class Gauge(ray.util.metrics.Gauge):
        def set(self, value: Any, tags: Any = None) -> None:
            found[key(self, tags)] = value

    monkeypatch.setattr(search.metrics, "Counter", Counter)
    monkeypatch.setattr(search.metrics, "Gauge", Gauge)
    return found


def test_a_search_is_counted(tmp_path: Path, recorded: dict[tuple[str, ...], float]) -> None:
    def answer(job: Job) -> Outcome:
        return Outcome(job, None, "broken") if job.key == 2 else Outcome(job, score_of(job.allocation))

    study, metrics = open_study(tmp_path, levels=40), RayMetrics("made-up")
    study.enqueue([(Allocation.dense(TARGETS), "dense")])
    section = StopSection(trials=6)
    Runner(study, MadeUpPool(answer), section, "random", Stop(), note=metrics.note).run()  # type: ignore[arg-type]
    metrics.note("replica died", replica="replica-0", reason="killed")
    states = {"COMPLETE": 5, "FAIL": 1}
    gpus = {("replica-0", 0): 0.9, ("replica-0", 1): 0.7}
    metrics.look(states, queue=3, busy=0.5, gpus=gpus, hypervolume=current_hypervolume(study))
    rate = recorded.pop(("rankfront_tokens_per_second", "made-up"))
    assert rate > 0
    assert recorded == {
        ("rankfront_failed_trials", "made-up"): 1,
        ("rankfront_replica_deaths", "made-up"): 1,
        ("rankfront_scored_tokens", "made-up"): 500,
        ("rankfront_trials", "made-up", "COMPLETE"): 5,
        ("rankfront_trials", "made-up", "FAIL"): 1,
        ("rankfront_queued_trials", "made-up"): 3,
        ("rankfront_busy_replicas", "made-up"): 0.5,
        ("rankfront_busy_gpu", "made-up", "replica-0", "0"): 0.9,
        ("rankfront_busy_gpu", "made-up", "replica-0", "1"): 0.7,
        ("rankfront_hypervolume", "made-up"): pytest.approx(hypervolumes(study)[-1]),
    }
    named = {name for name, *_ in recorded} | {"rankfront_tokens_per_second"}
    assert named == {*COUNTERS, *GAUGES}


def test_the_rate_is_of_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(search.metrics.time, "monotonic", lambda: now[0])
    metrics = RayMetrics("made-up")
    for now[0], tokens in ((100.0, 1_000), (200.0, 3_000)):
        metrics.note("finished", trial=0, tokens=tokens)
    assert metrics._rate(200.0) == 20.0
    assert metrics._rate(450.0) == 10.0
    assert metrics._rate(600.0) == 0.0
