"""What Ray raises, told apart: a mistake of the user, a process that is gone, an error of ours."""

from __future__ import annotations

import pickle

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from actors.types import RankfrontError
from search.failures import cause_of, process_died

DEATHS = (
    ActorDiedError(),
    ActorUnavailableError("connection lost", None),
    RayActorError(),
    WorkerCrashedError(),
    OutOfMemoryError("the node is low on memory"),
    NodeDiedError("the node is unreachable"),
    LocalRayletDiedError(),
    ObjectLostError("ab", None, ""),
    OwnerDiedError("ab", None, ""),
    ObjectReconstructionFailedError("ab"),
)


def raised(cause: BaseException) -> RayTaskError:
    """What a driver gets from a task that raised `cause`, or waited for an argument that failed by it."""
    error = RayTaskError("build", "Traceback ...", cause).as_instanceof_cause()
    assert isinstance(error, RayTaskError)
    return error


def of_a_constructor(cause: BaseException) -> ActorDiedError:
    """What a driver gets from an actor that never came to be, after its way through Ray."""
    error = pickle.loads(pickle.dumps(ActorDiedError.from_task_error(RayTaskError("__init__", "", cause))))
    assert isinstance(error, ActorDiedError)
    return error


@pytest.mark.parametrize("error", DEATHS, ids=lambda error: type(error).__name__)
def test_a_process_that_is_gone_is_known_directly_and_by_those_that_waited_for_it(error: RayError) -> None:
    assert process_died(error)
    assert process_died(raised(error))
    assert process_died(RayTaskError("build", "", raised(error)))
    assert cause_of(raised(error)) is not error


@pytest.mark.parametrize(
    "error",
    [
        raised(ZeroDivisionError()),
        raised(RankfrontError("a mistake")),
        RuntimeEnvSetupError("no such package"),
        of_a_constructor(RankfrontError("a mistake")),
        of_a_constructor(ZeroDivisionError()),
        raised(of_a_constructor(ZeroDivisionError())),
    ],
    ids=[
        "a task's bug",
        "a task's mistake",
        "environment",
        "a constructor's mistake",
        "a constructor's bug",
        "a constructor's bug waited for",
    ],
)
def test_what_would_come_again_is_no_death(error: RayError) -> None:
    assert not process_died(error)


def test_a_mistake_is_found_wherever_it_was_raised() -> None:
    mistake = RankfrontError("text too short")
    for error in (
        raised(mistake),
        of_a_constructor(mistake),
        raised(of_a_constructor(mistake)),
        RayTaskError("build", "", raised(mistake)),
    ):
        found = cause_of(error)
        assert type(found) is RankfrontError
        assert str(found) == "text too short"
    other = raised(ZeroDivisionError())
    assert cause_of(other) is other
