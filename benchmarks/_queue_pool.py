"""What pools without replicas share."""

from __future__ import annotations

from search.pool import DEPTH, Job


class QueuePool:
    """The part of `Pool`'s interface that takes jobs; who answers them adds `wait`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._queue: list[Job] = []

    @property
    def outstanding(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> int:
        return DEPTH * self.size - self.outstanding

    def submit(self, job: Job) -> None:
        self._queue.append(job)
