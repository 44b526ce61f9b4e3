"""Passes of a model whose blocks are on several devices, some under way at once, each on another device.

Work on a GPU is queued: a call returns before it is done, each device works in the order of its queue, and a
copy between two devices is in both queues: it waits for all that either of them holds by then ("CUDA
semantics" in PyTorch's documentation; `copy_device_to_device` in its Copy.cu). So one stream a device is
enough, if the order is right: what is queued behind a copy waits with it. A pass therefore stops before it
goes on to another device, and passes go on in turn, the oldest first, one device further each time, before
another one begins:

    queue of device 0:  A0  copy A  B0  copy B  C0  copy C  D0
    queue of device 1:              A1          B1          C1         A1 runs beside B0, B1 beside C0, ...

Of a model whose head shares the embedding's weights the last step is on device 0 again; were pass B begun
after pass A had ended, as a loop over passes would have it, B0 would wait behind that step for A1.

Passes are Python calls that stop in their middle: each has a thread, of which one runs at any time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from actors.busy import Busy

T = TypeVar("T")

# More than a pass has steps: a pass begins at each turn, and each goes one step further.
LANES = 64
# The attribute of a model whose passes are watched.
_ATTRIBUTE = "rankfront_passes"


class _Stopped(BaseException):
    """Unwinds a pass that nobody waits for any more; no handler of a model's code takes it for an error."""


class _Pass(Generic[T]):
    """A pass in a thread of its own, which runs only from `go` to the next `pause`, or to its end.

    `place` is the device it is on, by its number.
    """

    def __init__(self, work: Callable[[], T], here: threading.local, lanes: ThreadPoolExecutor) -> None:
        self.place = 0
        self.ended = self._unwinding = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._future: Future[T] = lanes.submit(self._run, work, here)

    def _run(self, work: Callable[[], T], here: threading.local) -> T:
        self._turn.acquire()
        here.running = self
        try:
            if self._unwinding:
                raise _Stopped
            with torch.inference_mode():
                return work()
        finally:
            here.running = None
            self.ended = True
            self._back.release()

    def go(self) -> None:
        """Run it until it pauses or ends."""
        self._turn.release()
        self._back.acquire()

    def pause(self) -> None:
        """Called by the pass itself: let others run, until it is its turn again."""
        self._back.release()
        self._turn.acquire()
        if self._unwinding:
            raise _Stopped

    def stop(self) -> None:
        """Unwind it, wherever it is."""
        self._unwinding = True
        while not self.ended:
            self.go()
        del self._future

    def result(self) -> T:
        """What the work returned, once; raises what it raised.

        An error is let go of here, whose frames are among its own: what they hold, they hold no longer than
        the caller has the error.
        """
        future = self._future
        del self._future
        try:
            return future.result()
        finally:
            del future


class InTurn:
    """Passes one after another on one device, which is `busy` with them."""

    def __init__(self, busy: Busy) -> None:
        self._busy = busy

    def run(self, works: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
        """Results of `works` in their order; each runs when it is asked for."""
        for work in works:
            self._busy.begin(0)
            result = work()
            self._busy.end(0)
            yield result


class Relay:
    """The turns of one model's passes. Its hooks say `leave` before a pass goes on to another device, and
    `arrive` when all it needs is there. Passes that are not of `run` go on as if nobody else did."""

    def __init__(self, busy: Busy) -> None:
        self._busy = busy
        self._here = threading.local()
        self._lanes = ThreadPoolExecutor(LANES, thread_name_prefix="pass")

    def leave(self) -> None:
        """Another device is next for the pass that calls: others run meanwhile."""
        running = self._running
        if running is not None:
            self._busy.end(running.place)
            running.pause()

    def arrive(self, place: int) -> None:
        """The pass that calls goes on, on the device of this number."""
        running = self._running
        if running is not None:
            running.place = place
            self._busy.begin(place)

    @property
    def _running(self) -> _Pass[Any] | None:
        """The pass that calls, None where it is none of `run`."""
        return getattr(self._here, "running", None)

    def _timed(self, work: Callable[[], T]) -> T:
        """A pass from its first device to its last."""
        self._busy.begin(0)
        result = work()
        running = self._running
        assert running is not None
        self._busy.end(running.place)
        return result

    def run(self, works: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
        """Results of `works` in their order, each a pass of the model and what is made of it.

        A result is handed out a turn late, so that devices have work while the caller waits for its values.
        Where the caller closes this, or a pass fails, those under way are unwound.
        """
        waiting = iter(works)
        under_way: deque[_Pass[T]] = deque()
        ended: deque[_Pass[T]] = deque()
        try:
            more = True
            while more or under_way or ended:
                late = len(ended)
                for each in under_way:
                    if not each.ended:  # one that failed has fewer steps than those before it
                        each.go()
                while under_way and under_way[0].ended:
                    ended.append(under_way.popleft())
                if more and len(under_way) < LANES:
                    work = next(waiting, None)
                    more = work is not None
                    if work is not None:
                        under_way.append(_Pass(partial(self._timed, work), self._here, self._lanes))
                        under_way[-1].go()
                for _ in range(late):
                    yield ended.popleft().result()
        finally:
            for each in under_way:
                each.stop()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From the host to a device, without waiting for what is queued there."""
    return tensor.to(device, non_blocking=True)


def conduct(model: nn.Module, by: Relay | InTurn) -> None:
    """Have the passes of a model run by `by` from now on."""
    setattr(model, _ATTRIBUTE, by)


def passes(model: nn.Module, works: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Results of `works`, each a pass of `model` and what is made of it, in their order.

    They run one by one where the model is on one device; where it is spread, some are under way at once. Work
    reads no value back from its device: that would wait for it. To be closed by a caller that leaves early.
    """
    by: Relay | InTurn | None = vars(model).get(_ATTRIBUTE)
    return (work() for work in works) if by is None else by.run(works)
