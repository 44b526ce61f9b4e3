"""What led to an error of Ray's, and the user's mistake among it."""

from __future__ import annotations

from collections.abc import Iterator

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.types import RankfrontError


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
