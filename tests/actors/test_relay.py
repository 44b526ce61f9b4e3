"""The order in which passes take turns, by a record of their steps; what becomes of errors and of leaving."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from torch import nn

from actors.busy import Busy
from actors.relay import LANES, Relay, conduct, passes

Step = tuple[int, int]


def relay_of(devices: int = 3) -> Relay:
    return Relay(Busy(["cpu"] * devices))


def walks(relay: Relay, record: list[Step], count: int, steps: int = 2) -> list[Callable[[], int]]:
    """Passes that note (pass, step) at each of their steps, and return their number."""

    def walk(number: int) -> int:
        for step in range(steps):
            if step:
                relay.leave()
                relay.arrive(step % 3)
            record.append((number, step))
        return number

    return [lambda number=number: walk(number) for number in range(count)]  # type: ignore[misc]


def test_each_pass_is_a_device_behind_the_one_before_it() -> None:
    """Three devices: while the first pass is on the last of them, two others are on those before it."""
    relay, record = relay_of(), list[Step]()
    assert list(relay.run(walks(relay, record, 4, steps=3))) == [0, 1, 2, 3]
    assert record == [
        (0, 0),
        (0, 1), (1, 0),
        (0, 2), (1, 1), (2, 0),
        (1, 2), (2, 1), (3, 0),
        (2, 2), (3, 1),
        (3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "steps"), [(0, 2), (1, 1), (1, 3), (5, 1), (3, LANES + 9)])
def test_results_come_in_order_however_many_steps_there_are(count: int, steps: int) -> None:
    relay = relay_of()
    assert list(relay.run(walks(relay, [], count, steps))) == list(range(count))


def test_a_result_is_handed_out_when_the_next_turn_has_begun() -> None:
    """The caller waits for its values; until then the devices have the passes behind it to work at."""
    relay, record = relay_of(), list[Step]()
    with closing(relay.run(walks(relay, record, 9))) as found:
        assert next(found) == 0
        assert record[-2:] == [(1, 1), (2, 0)]


def test_passes_compute_without_gradients_in_threads_of_their_own() -> None:
    relay, own = relay_of(), threading.get_ident()

    def look() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), threading.get_ident() == own

    assert list(relay.run([look, look])) == [(True, False)] * 2
    relay.leave()  # outside of a pass nothing takes turns
    relay.arrive(1)


def test_who_leaves_early_leaves_nothing_under_way() -> None:
    relay, record = relay_of(), list[Step]()
    with closing(relay.run(walks(relay, record, 9, steps=3))) as found:
        next(found)
    there = len(record)
    assert list(relay.run(walks(relay, record, 2, steps=3))) == [0, 1], "the relay goes on"
    assert len(record) == there + 6


def test_an_error_is_raised_in_its_turn_and_holds_nothing_afterwards() -> None:
    """A pass that fails at its first step waits for those before it: their results are good."""
    relay, unwound = relay_of(), list[int]()
    held = torch.zeros(3)
    kept = weakref.ref(held)

    def fails(tensor: torch.Tensor) -> int:
        raise torch.OutOfMemoryError(f"no room for {tensor.numel()}")

    def unwinds() -> int:
        try:
            for place in (1, 2):
                relay.leave()
                relay.arrive(place)
            unwound.append(0)
        except Exception:  # what code of a model may do
            unwound.append(-1)
        finally:
            unwound.append(1)
        return 2

    works = [*walks(relay, [], 1, steps=3), lambda held=held: fails(held), unwinds]
    del held
    found = relay.run(works)
    assert next(found) == 0
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError, match="no room for 3"):
            next(found)
        works.clear()
        assert unwound == [1]
        relay._lanes.shutdown()  # a thread may be about to let go of what it ran
        assert kept() is None, "without a collection: the next trial needs the memory"
    finally:
        gc.enable()


def test_passes_of_a_model_on_one_device_run_one_by_one_where_they_are_asked_for() -> None:
    model, record = nn.Linear(2, 2), list[str]()
    found = passes(model, [lambda: record.append("first"), lambda: record.append("second")])
    next(found)
    assert record == ["first"]
    relay, steps = relay_of(), list[Step]()
    conduct(model, relay)
    assert list(passes(model, walks(relay, steps, 2))) == [0, 1]
    assert steps == [(0, 0), (0, 1), (1, 0), (1, 1)]
