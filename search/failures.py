"""What an error of Ray's means: a mistake that the user can mend, or a process that is gone."""

from __future__ import annotations

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    WorkerCrashedError,
)

from actors.failures import cause_of as cause_of
from actors.failures import causes

# A process, its node, or what it answered and nobody had fetched yet.
GONE = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    LocalRayletDiedError,
)


def process_died(error: RayError) -> bool:
    """Whether a process is gone: the one that was asked, or one whose answer it was waiting for.

    An actor whose constructor raised an error is gone as well, but would raise it again.
    """
    found = [cause for cause in causes(error) if isinstance(cause, GONE)]
    return bool(found) and not any(getattr(cause, "actor_init_failed", False) for cause in found)


def last_line(error: BaseException) -> str:
    """The last line of an error's text: what Ray and Python say at last is what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
