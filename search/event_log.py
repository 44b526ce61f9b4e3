"""The log of a study: a line of JSON for each event, in a file that stays small and holds no secret."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from search.events import Note

LOG = "log.jsonl"
# About 40,000 events a file, and four files: the last weeks of a large search.
BYTES, OLD_FILES = 8 * 2**20, 3


class _Lines(logging.Formatter):
    """A record as one line of JSON: `time` (UTC), `event`, and the facts."""

    def __init__(self, secrets: Sequence[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        shown = {name: self._masked(value) for name, value in facts.items()}
        return json.dumps({"time": time, "event": record.getMessage(), **shown})

    def _masked(self, value: Any) -> Any:
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, "***")
        return value


class _File(RotatingFileHandler):
    """Says once that it cannot write (a full disk), and goes on: no search ends for its log."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        super().__init__(path, maxBytes=BYTES, backupCount=OLD_FILES, encoding="utf-8", delay=True)
        self._say, self._said = say, False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        if not self._said:
            self._said = True
            self._say(f"{self.baseFilename} cannot be written ({error.strerror}): events are lost")


@contextmanager
def event_log(folder: Path, secrets: Sequence[str], say: Callable[[str], None]) -> Iterator[Note]:
    """Appends events to the log of a study's folder; `secrets` never appear in it."""
    handler = _File(folder / LOG, say)
    handler.setFormatter(_Lines([secret for secret in secrets if secret]))
    # Its own and nobody's child: the process's loggers, and who configures them, stay as they are.
    logger = logging.Logger("rankfront")
    logger.addHandler(handler)

    def note(event: str, **facts: Any) -> None:
        logger.info(event, extra={"facts": facts})

    try:
        yield note
    finally:
        with suppress(OSError):  # what could not be written before cannot now
            handler.close()
