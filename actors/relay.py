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
from typing import Any, Generic, TypeVar

import torch
from torch import nn

T = TypeVar("T")

# More than a pass has steps: a pass begins at each turn, and each goes one step further.
LANES = 64
# The attribute of a model that is spread.
_ATTRIBUTE = "rankfront_relay"


class _Stopped(BaseException):
    """Unwinds a pass that nobody waits for any more; no handler of a model's code takes it for an error."""


class _Pass(Generic[T]):
    """A pass in a thread of its own, which runs only from `go` to the next `pause`, or to its end."""

    def __init__(self, work: Callable[[], T], here: threading.local, lanes: ThreadPoolExecutor) -> None:
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


class Relay:
    """The turns of one model's passes. Its hooks say `step` before a pass goes on to another device."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._lanes = ThreadPoolExecutor(LANES, thread_name_prefix="pass")

    def step(self) -> None:
        """Another device is next: where the pass that calls is one of several, others run meanwhile."""
        running: _Pass[Any] | None = getattr(self._here, "running", None)
        if running is not None:
            running.pause()

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
                        under_way.append(_Pass(work, self._here, self._lanes))
                        under_way[-1].go()
                for _ in range(late):
                    yield ended.popleft().result()
        finally:
            for each in under_way:
                each.stop()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From the host to a device, without waiting for what is queued there."""
    return tensor.to(device, non_blocking=True)


def give_relay(model: nn.Module) -> Relay:
    """The relay of a model that is spread from now on."""
    relay = Relay()
    setattr(model, _ATTRIBUTE, relay)
    return relay


def passes(model: nn.Module, works: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Results of `works`, each a pass of `model` and what is made of it, in their order.

    They run one by one where the model is on one device; where it is spread, some are under way at once. Work
    reads no value back from its device: that would wait for it. To be closed by a caller that leaves early.
    """
    relay: Relay | None = vars(model).get(_ATTRIBUTE)
    return (work() for work in works) if relay is None else relay.run(works)
