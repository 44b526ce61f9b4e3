"""The metrics of a search, through Ray: whoever scrapes the cluster sees them beside Ray's own.

All have the tag `study`. Ray adds `ray_` to the names, and `_total` to those of counters, as it exports them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

# tokens/s are those of the last minutes: a trial may take one.
RATE_SECONDS = 300.0

COUNTERS = {
    "rankfront_failed_trials": "Trials that failed in this run of the driver.",
    "rankfront_replica_deaths": "Replicas that died or were stopped in this run of the driver.",
    "rankfront_scored_tokens": "Tokens that replicas ran forward for trials in this run of the driver.",
}
GAUGES = {
    "rankfront_trials": "Trials of the study by state (tag `state`, Optuna's).",
    "rankfront_queued_trials": "Trials that wait for a replica.",
    "rankfront_busy_replicas": "Share of replicas that score a trial.",
    "rankfront_busy_gpu": "Share of its time that a GPU works (tags `replica`, `gpu`: its number there).",
    "rankfront_tokens_per_second": f"Scored tokens a second over the last {RATE_SECONDS:.0f} s.",
    "rankfront_hypervolume": "Hypervolume of the front; there once the dense model is scored.",
}


class RayMetrics:
    """Counts events as they are noted (`note`), and sets what is true at a look (`look`)."""

    def __init__(self, study: str) -> None:
        self._counters = {name: Counter(name, text, ("study",)) for name, text in COUNTERS.items()}
        tags = {
            "rankfront_trials": ("study", "state"),
            "rankfront_busy_gpu": ("study", "replica", "gpu"),
        }
        self._gauges = {name: Gauge(name, text, tags.get(name, ("study",))) for name, text in GAUGES.items()}
        for metric in (*self._counters.values(), *self._gauges.values()):
            metric.set_default_tags({"study": study})
        self._started = time.monotonic()
        self._scored: deque[tuple[float, int]] = deque()

    def note(self, event: str, **facts: Any) -> None:
        """An event of `search.events`."""
        if event == "failed":
            self._counters["rankfront_failed_trials"].inc()
        elif event == "replica died":
            self._counters["rankfront_replica_deaths"].inc()
        elif event in ("finished", "pruned") and facts["tokens"]:
            self._counters["rankfront_scored_tokens"].inc(facts["tokens"])
            self._scored.append((time.monotonic(), facts["tokens"]))

    def look(
        self,
        states: Mapping[str, int],
        queue: int,
        busy: float,
        gpus: Mapping[tuple[str, int], float],
        hypervolume: float | None,
    ) -> None:
        """How things are: trials by state, jobs without a replica, share of replicas that score, share of its
        time that each GPU works (by replica and number)."""
        for state, count in states.items():
            self._gauges["rankfront_trials"].set(count, {"state": state})
        self._gauges["rankfront_queued_trials"].set(queue)
        self._gauges["rankfront_busy_replicas"].set(busy)
        for (replica, gpu), share in gpus.items():
            self._gauges["rankfront_busy_gpu"].set(share, {"replica": replica, "gpu": str(gpu)})
        self._gauges["rankfront_tokens_per_second"].set(self._rate(time.monotonic()))
        if hypervolume is not None:
            self._gauges["rankfront_hypervolume"].set(hypervolume)

    def _rate(self, now: float) -> float:
        while self._scored and self._scored[0][0] < now - RATE_SECONDS:
            self._scored.popleft()
        seconds = min(RATE_SECONDS, now - self._started)
        return sum(tokens for _, tokens in self._scored) / seconds if seconds > 0 else 0.0
