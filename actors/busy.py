"""How long each device works at passes: measured on the device where it is a GPU, else by the clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch

# Stretches whose ends are not looked at yet: so many later, a device is long past them.
KEPT = 4096


class _Moment(Protocol):
    """A point in a device's work."""

    def until(self, later: _Moment) -> float:
        """Seconds from here to there; waits until the device has been there."""
        ...


class _HostMoment:
    """Now: a CPU has done what it was called for."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def until(self, later: _Moment) -> float:
        assert isinstance(later, _HostMoment)
        return later._time - self._time


class _GpuMoment:
    """When a GPU comes to what is queued on it from now on."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def until(self, later: _Moment) -> float:
        assert isinstance(later, _GpuMoment)
        later._event.synchronize()
        milliseconds: float = self._event.elapsed_time(later._event)
        return milliseconds / 1e3


class Busy:
    """Seconds of work by device. On each there is one stretch of work at a time, from `begin` to `end`.

    A stretch that fails has no end and is not counted.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = [torch.device(device) for device in devices]
        self._begun: dict[int, _Moment] = {}
        self._done: deque[tuple[int, _Moment, _Moment]] = deque()
        self._seconds = [0.0] * len(devices)

    def begin(self, place: int) -> None:
        """The device at `place` works from now on."""
        self._begun[place] = self._now(place)

    def end(self, place: int) -> None:
        """It has been given all there is for now."""
        self._done.append((place, self._begun.pop(place), self._now(place)))
        if len(self._done) > KEPT:
            self._count()

    def take(self) -> tuple[float, ...]:
        """The seconds of each device since they were last taken; waits for work that is not done."""
        while self._done:
            self._count()
        taken, self._seconds = tuple(self._seconds), [0.0] * len(self._devices)
        return taken

    def _count(self) -> None:
        """Add the oldest stretch."""
        place, begun, ended = self._done.popleft()
        self._seconds[place] += begun.until(ended)

    def _now(self, place: int) -> _Moment:
        device = self._devices[place]
        return _GpuMoment(device) if device.type == "cuda" else _HostMoment()
