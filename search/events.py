"""What happens in a search, said once: to the log of the study, to Ray's metrics, to whoever listens."""

from __future__ import annotations

from typing import Any, Protocol

EVENTS = (
    "started",
    "resumed",
    "proposed",
    "dispatched",
    "retried",
    "finished",
    "copied",
    "failed",
    "pruned",
    "replica started",
    "replica taken over",
    "replica died",
    "storage refused",
    "storage back",
    "stopped",
)
"""Every event. A trial is `copied` where the record of an equal one answers it; `replica started` says by
`starts` how often it did, so above 1 that it was restarted; one that is `taken over` waited from an earlier
driver."""


class Note(Protocol):
    """Takes an event and its facts, which are JSON; must neither raise nor wait."""

    def __call__(self, event: str, **facts: Any) -> None: ...


def silent(event: str, **facts: Any) -> None:
    """Nobody listens."""


def told(*listeners: Note) -> Note:
    """All of them, in their order."""

    def note(event: str, **facts: Any) -> None:
        for listener in listeners:
            listener(event, **facts)

    return note
