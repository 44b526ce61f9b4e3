"""What an error of Ray's means: a mistake that the user can mend, or a process that is gone."""

from __future__ import annotations

from collections.abc import Iterator

from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.types import RankfrontError

# A process, its node, or what it answered and nobody had fetched yet.
GONE = (
    RayActorError,
    ObjectLostError,
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    LocalRayletDiedError,
)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, as far as Ray tells.

    Of a task: what it raised, or why there is no argument it waited for. Of an actor that never came to
    be: the error of its constructor, which Ray keeps among the arguments of its own.
    """
    while error is not None:
        yield error
        if isinstance(error, RayTaskError):
            error = error.cause
        elif isinstance(error, ActorDiedError):
            error = next((part for part in error.args if isinstance(part, RayTaskError)), None)
        else:
            error = None


def cause_of(error: RayError) -> BaseException:
    """The user's mistake itself where it is one; otherwise Ray's error with the worker's traceback."""
    # Ray's error is of both classes, with the traceback for a text
    mistakes = (cause for cause in causes(error) if not isinstance(cause, RayError))
    return next((cause for cause in mistakes if isinstance(cause, RankfrontError)), error)


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
