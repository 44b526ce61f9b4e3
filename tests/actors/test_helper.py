"""What a lead makes of a helper's end, in whichever way Ray tells it."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.helper import ActorHelper, Gone
from actors.types import RankfrontError, ScoringError, ShortOfMemoryError


def raised(cause: Exception) -> RayTaskError:
    """What a lead gets where a helper raised `cause`: of the cause's class as well."""
    error = RayTaskError("share", "Traceback ...", cause).as_instanceof_cause()
    assert isinstance(error, RayTaskError)
    return error


def of_a_constructor(cause: Exception) -> ActorDiedError:
    return ActorDiedError.from_task_error(RayTaskError("__init__", "", cause))


class Handle:
    """That of an actor whose every method has a reference that nobody reads."""

    def __getattr__(self, method: str) -> Handle:
        return self

    def remote(self, *arguments: Any) -> str:
        return "a reference"


def answered(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    def get(reference: str, timeout: float) -> None:
        assert (reference, timeout) == ("a reference", 7.0)
        raise error

    monkeypatch.setattr(ray, "get", get)
    return ActorHelper(Handle()).ask("share", 1, 1, 2).get(7.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ActorDiedError(), "ActorDiedError: "),
        (ActorUnavailableError("connection lost", None), "ActorUnavailableError: .*connection lost"),
        (RayActorError(), "RayActorError: "),
        (WorkerCrashedError(), "WorkerCrashedError: "),
        (OutOfMemoryError("the node is low on memory"), "OutOfMemoryError: the node is low on memory"),
        (NodeDiedError("the node is unreachable"), "NodeDiedError: the node is unreachable"),
        (LocalRayletDiedError(), "LocalRayletDiedError: "),
        (ObjectLostError("ab", None, ""), "ObjectLostError: "),
        (OwnerDiedError("ab", None, ""), "OwnerDiedError: "),
        (raised(OwnerDiedError("ab", None, "")), "OwnerDiedError: "),
        (GetTimeoutError(), "no answer in 7 s"),
        (raised(RuntimeError("CUDA error: an illegal access\nsee")), "RuntimeError: CUDA error: an ill"),
        (of_a_constructor(RuntimeError("no driver")), "RuntimeError: no driver"),
        (raised(ShortOfMemoryError("out of memory while refining")), "out of memory while refining"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_others_may_not_meet_leaves_one_helper_out(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Gone, match=f"^{reason}") as gone:
        answered(monkeypatch, error)
    assert "\n" not in str(gone.value)


@pytest.mark.parametrize("wrap", [raised, of_a_constructor])
@pytest.mark.parametrize("mistake", [RankfrontError("another text"), ScoringError("non-finite logits")])
def test_a_mistake_is_raised_as_the_helper_raised_it(
    mistake: RankfrontError, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RankfrontError) as found:
        answered(monkeypatch, wrap(mistake))
    assert found.value is mistake
