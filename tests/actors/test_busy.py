"""Seconds of work by device: by a clock that the tests turn, and by a GPU's own where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import actors.busy
from actors.busy import Busy
from actors.relay import InTurn, Relay, conduct, passes


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass."""
    now = [0.0]
    monkeypatch.setattr(actors.busy.time, "perf_counter", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def test_work_is_counted_where_it_is_done(spend: Callable[[float], None]) -> None:
    """Two devices, the second of which is left for the first again; what is between passes is nobody's."""
    busy = Busy(["cpu", "cpu"])
    relay = Relay(busy)

    def work() -> None:
        spend(1.0)
        relay.leave()
        spend(0.25)  # hidden states travel
        relay.arrive(1)
        spend(4.0)
        relay.leave()
        relay.arrive(0)
        spend(8.0)

    for _ in relay.run([work, work, work]):
        spend(100.0)
    assert busy.take() == (27.0, 12.0)
    assert busy.take() == (0.0, 0.0)


def test_work_that_fails_is_nobodys(spend: Callable[[float], None]) -> None:
    busy = Busy(["cpu", "cpu"])
    relay = Relay(busy)

    def work(number: int) -> None:
        spend(1.0)
        relay.leave()
        relay.arrive(1)
        spend(2.0)
        if number == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(relay.run([lambda number=number: work(number) for number in range(3)]))  # type: ignore[misc]
    assert busy.take() == (3.0, 4.0), "the third had been given its work by then"
    list(relay.run([lambda: work(0)]))
    assert busy.take() == (1.0, 2.0)


def test_one_device_works_while_its_passes_run(
    spend: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: only the last few are still to be looked at."""
    monkeypatch.setattr(actors.busy, "KEPT", 2)
    model, busy = nn.Linear(2, 2), Busy(["cpu"])
    conduct(model, InTurn(busy))
    for _ in passes(model, [lambda: spend(3.0)] * 7):
        spend(100.0)
    assert len(busy._done) == 2
    assert busy.take() == (21.0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its own clock is read")
def test_a_gpu_is_busy_for_as_long_as_it_works_not_as_it_is_given_work() -> None:
    """Its twin without a GPU is the test above."""
    model, busy = nn.Linear(2, 2), Busy(["cuda"])
    conduct(model, InTurn(busy))
    square = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    list(passes(model, [lambda: [square @ square for _ in range(20)]] * 2))
    ended.record()
    ended.synchronize()
    (seconds,) = busy.take()
    assert 0.5 * begun.elapsed_time(ended) <= 1e3 * seconds <= begun.elapsed_time(ended)
