"""Files that survive a crash: replaced as a whole, or grown by whole records."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from actors.types import RankfrontError

T = TypeVar("T")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8); a crash at any instant leaves the old or the new content."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the name that says atomic
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON, durable when this returns. After a crash, `journal.repair` comes first."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_records(path: Path, parse: Callable[[Any], T]) -> list[T]:
    """The records of a file of JSON lines, none where there is no file; a torn last line is left out.

    Reading changes nothing: the torn line may be a write that is under way.

    Raises:
        RankfrontError: a whole line that is no record.
    """
    content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = []
    # Not `splitlines`: it also splits at characters that JSON leaves as they are inside a string.
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise RankfrontError(f"{path}: record {number} is damaged: {error}") from error
    return found
