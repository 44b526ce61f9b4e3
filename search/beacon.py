"""What the driver tells the world while it runs: its health in the study's folder, its metrics to Ray."""

from __future__ import annotations

import time
from pathlib import Path

from optuna.trial import TrialState

from search.health import WRITE_SECONDS, here, write_health
from search.metrics import RayMetrics
from search.pool import Pool
from search.runner import current_hypervolume
from search.study import SearchStudy


class Beacon:
    """Costs nothing between two signals, which are WRITE_SECONDS apart."""

    def __init__(
        self, folder: Path, study: SearchStudy, pool: Pool, metrics: RayMetrics, alone_seconds: float = 0.0
    ) -> None:
        self._folder, self._study, self._pool, self._metrics = folder, study, pool, metrics
        self._alone = alone_seconds
        self._started, self._last = time.time(), 0.0

    def tick(self) -> None:
        """Signal, if it is time."""
        if time.monotonic() - self._last >= WRITE_SECONDS:
            self._last = time.monotonic()
            self._signal(None)

    def stop(self, reason: str) -> None:
        """Signal for the last time, and why."""
        self._signal(reason)

    def _signal(self, stopped: str | None) -> None:
        health = here(self._started, self._pool.queued, self._pool.health(), stopped, self._alone)
        write_health(self._folder, health)
        states = {state.name: self._study.count(state) for state in TrialState}
        front = current_hypervolume(self._study)
        self._metrics.look(states, health.queue, health.busy, health.busy_gpus, front)
