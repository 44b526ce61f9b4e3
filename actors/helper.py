"""Another worker of a refinement, as its lead asks it: an actor of Ray's, or one in this process."""

from __future__ import annotations

from typing import Any, Protocol


class Gone(Exception):  # noqa: N818 (no error: the others go on)
    """A helper's process is no more."""


class Answer(Protocol):
    """What a helper was asked for."""

    def ready(self) -> bool:
        """Whether `get` would not wait; one that is gone is ready."""
        ...

    def get(self) -> Any:
        """Waits for it. Raises Gone, or what the helper raised."""
        ...


class Helper(Protocol):
    """Does what it is asked in order; its methods are those of `actors.refine.Helping`, and `help`."""

    def ask(self, method: str, *arguments: Any) -> Answer: ...

    def shared(self, value: Any) -> Any:
        """What a value is sent as, so that sending it to all costs what sending it to one does."""
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


class _Reference:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def ready(self) -> bool:
        import ray

        return bool(ray.wait([self._reference], timeout=0)[0])

    def get(self) -> Any:
        import ray
        from ray.exceptions import ObjectLostError, RayActorError

        try:
            return ray.get(self._reference)
        except (RayActorError, ObjectLostError) as error:
            if getattr(error, "actor_init_failed", False):
                raise  # its constructor says why: another would say the same
            raise Gone(str(error)) from error
