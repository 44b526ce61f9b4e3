"""Another worker of a refinement, as its lead asks it: an actor of Ray's, or one in this process."""

from __future__ import annotations

from typing import Any, Protocol

from actors.types import RankfrontError, ShortOfMemoryError


class Gone(Exception):  # noqa: N818 (no error: the others go on)
    """A helper is of no more use; the text says why."""


class Answer(Protocol):
    """What a helper was asked for."""

    def ready(self) -> bool:
        """Whether `get` would not wait; one that is gone is ready."""
        ...

    def get(self, limit: float) -> Any:
        """Waits for it, `limit` seconds at most.

        Raises:
            Gone: its process is no more or does not answer, or it failed by what the others may not: want of
                memory, or an error that nobody foresaw, as on a broken GPU.
            RankfrontError: a mistake that the others would find as well, as the helper raised it.
        """
        ...


class Helper(Protocol):
    """Does what it is asked in order; its methods are those of `actors.refine.Helping`, and `help`."""

    def ask(self, method: str, *arguments: Any) -> Answer: ...

    def shared(self, value: Any) -> Any:
        """What a value is sent as, so that sending it to all costs what sending it to one does."""
        ...

    def end(self) -> None:
        """End its process, if it is there."""
        ...


class ActorHelper:
    """One in an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def ask(self, method: str, *arguments: Any) -> Answer:
        return _Reference(getattr(self._actor, method).remote(*arguments))

    def shared(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def end(self) -> None:
        import ray

        ray.kill(self._actor)


class _Reference:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def ready(self) -> bool:
        import ray

        return bool(ray.wait([self._reference], timeout=0)[0])

    def get(self, limit: float) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        from actors.failures import cause_of, causes

        try:
            return ray.get(self._reference, timeout=limit)
        except GetTimeoutError as error:
            raise Gone(f"no answer in {limit:.0f} s") from error
        except RayError as error:
            cause = cause_of(error)
            if isinstance(cause, ShortOfMemoryError):
                raise Gone(str(cause)) from error
            if isinstance(cause, RankfrontError):
                raise cause from error
            *_, first = causes(error)
            line = str(first).strip().partition("\n")[0]
            raise Gone(f"{type(first).__name__}: {line}") from error
