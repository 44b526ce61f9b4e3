"""The actor around a scorer: what becomes of an error that the driver should not have to know."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors.replica import Refiner, Replica
from actors.types import Allocation, ShortOfMemoryError

REASON = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Exhausted:
    """Has the interfaces of `Scorer` and of `actors.refiner.Refiner`, which has taken one step before."""

    def score(self, *asked: Any) -> Any:
        raise torch.OutOfMemoryError(f"{REASON}\nSee the documentation for Memory Management.")

    ask = help = receive = share = piece = score

    def refine(self, *asked: Any) -> Iterator[str]:
        yield "a step"
        self.score()

    @property
    def helping(self) -> Exhausted:
        return self


def test_running_out_of_memory_is_a_trial_without_a_score() -> None:
    """Which says nothing of the model. Torch's own error does not travel: the driver would import torch."""
    replica = Replica.__new__(Replica)
    replica._scorer = Exhausted()  # type: ignore[assignment]
    with pytest.raises(ShortOfMemoryError) as raised:
        replica.score(Allocation((("t", 1),)), "search", ())
    assert str(raised.value) == (
        f"out of memory on the search split: {REASON}; a smaller scoring.batch_tokens takes less"
    )
    assert raised.value.__context__ is None  # nor does it hold the frames, and the tensors in them
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


@pytest.mark.parametrize(
    ("method", "arguments", "where"),
    [
        ("score", ("test", None), "on the test split"),
        ("ask", (None, None, "mmlu"), "on mmlu"),
        ("help", (None,), "while refining"),
        ("receive", (None,), "while refining"),
        ("share", (0, 1), "while refining"),
        ("piece", (), "while refining"),
        ("refine", (None, {}, []), "while refining"),
    ],
)
def test_running_out_of_memory_ends_one_refinement_or_measurement(
    method: str, arguments: tuple[Any, ...], where: str
) -> None:
    """A share of a refinement that has no memory is none that has no finite loss."""
    refiner = Refiner.__new__(Refiner)
    refiner._refiner = Exhausted()  # type: ignore[assignment]
    answered: list[str] = []
    with pytest.raises(ShortOfMemoryError) as raised:
        answered.extend(getattr(refiner, method)(Allocation((("t", 1),)), *arguments))
    assert str(raised.value).startswith(f"out of memory {where}: {REASON}")
    for advice in ("refine.checkpointed: true", "16 bytes for every number of the factors", "--method refit"):
        assert (advice in str(raised.value)) == (where == "while refining")
    assert answered == (["a step"] if method == "refine" else [])
    assert raised.value.__context__ is None
