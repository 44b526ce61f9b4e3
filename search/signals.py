"""Ctrl-C and SIGTERM: ask the loop to end; what is finished is saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from rich.console import Console

from search.runner import Stop


@contextlib.contextmanager
def stop_on_signals(stop: Stop, console: Console) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the loop at its next look; the second ends the process.

    Entered before replicas are made, so that a signal meanwhile leaves none behind.
    """

    def handler(number: int, frame: object) -> None:
        if stop.reason:
            raise KeyboardInterrupt
        stop.reason = signal.Signals(number).name
        console.print(f"{stop.reason}: stopping; what is finished is saved")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
