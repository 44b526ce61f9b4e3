"""The actor around a scorer: what becomes of an error that the driver should not have to know."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from actors.replica import Replica
from actors.types import Allocation, ScoringError

REASON = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Exhausted:
    """Has the interface of `Scorer`."""

    def score(self, *asked: Any) -> Any:
        raise torch.OutOfMemoryError(f"{REASON}\nSee the documentation for Memory Management.")


def test_running_out_of_memory_is_a_trial_without_a_score() -> None:
    """Which is what travels: Torch's own error would have the driver import torch."""
    replica = Replica.__new__(Replica)
    replica._scorer = Exhausted()  # type: ignore[assignment]
    with pytest.raises(ScoringError) as raised:
        replica.score(Allocation((("t", 1),)), "search", ())
    assert str(raised.value) == f"out of memory on the search split: {REASON}"
    assert raised.value.__context__ is None  # nor does it hold the frames, and the tensors in them
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
