"""Rows of a data set: from the hub, a saved folder, or a file. What is wrong is named with its place.

Rows are counted from 0, as everywhere; lines of a file from 1, as in an editor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.sources import Source
from actors.types import RankfrontError

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]

JSON = (".jsonl", ".json")
TABLES = {".parquet": "parquet", ".csv": "csv"}
ARROW, TEXT = ".arrow", ".txt"
HUB_SPLIT, HUB_REVISION = "validation", "main"
HUB_SUBSET = "default"
"""What `datasets` takes where none is named and one is called so."""


def place_of_rows(source: str, subset: str | None = None, split: str | None = None) -> tuple[str, ...]:
    """Where `load_rows` reads, however that is written: equal places hold equal rows.

    Locally that is the file or folder behind all links; a subset, and a split that decides nothing, do not
    count. On the hub it is a data set at a revision, and of it a subset and a split.

    Raises:
        RankfrontError: there is no such source.
    """
    place = Source.parse(source)
    if place.path is not None:
        return (str(_folder_of(place.path, split).resolve()),)
    assert place.hub_id is not None
    # The hub holds no two names that differ in case alone.
    name = place.hub_id.casefold()
    return (name, place.revision or HUB_REVISION, subset or HUB_SUBSET, split or HUB_SPLIT)


def load_rows(source: str, subset: str | None = None, split: str | None = None) -> Sequence[Row]:
    """Rows in order, of at least one: JSON objects as they are written, anything else as a table of columns.

    `source` is a hub id, a folder saved by `datasets`, or a file: parquet, Arrow, JSON (one object a line, or
    one array of objects in a .json), CSV, or text: a row is a line with its end and the blank lines behind
    it, in the column `text`, so that all rows together are the file. Line ends are read as "\\n".

    Raises:
        RankfrontError: there is no such source or split, it cannot be read (the file, the line, why), it
            is of no known kind, or it holds no rows.
    """
    place = Source.parse(source)
    rows: Sequence[Row]
    if place.path is not None and place.path.suffix in JSON and place.path.is_file():
        rows = list(_json_rows(place.path, source))
    else:
        rows = _load_table(place, source, subset, split)
    if len(rows) == 0:
        raise RankfrontError(f"{source}: holds no rows")
    return rows


def is_plain(source: str) -> bool:
    """Whether rows are the lines of a text file, which bring their ends with them."""
    path = Source.parse(source).path
    return path is not None and path.suffix == TEXT and path.is_file()


def columns_of(rows: Sequence[Row]) -> list[str] | None:
    """The columns of a table; None of JSON rows, each of which has its own fields."""
    return None if isinstance(rows, list) else rows.column_names  # type: ignore[attr-defined,no-any-return]


def _json_rows(path: Path, source: str) -> Iterator[Row]:
    content = _text(path, source)
    if path.suffix == ".json" and content.lstrip().startswith("["):
        try:
            whole = json.loads(content)
        except json.JSONDecodeError as error:
            raise RankfrontError(
                f"{source}: line {error.lineno} breaks the JSON array: {error.msg}"
            ) from error
        for number, item in enumerate(whole):
            yield _object(item, f"{source}: row {number} of the array")
        return
    rule = "an object on each line" + (", or one array of objects" if path.suffix == ".json" else "")
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise RankfrontError(
                f"{source}: line {number} is no JSON ({error.msg}, column {error.colno}); "
                f"a {path.suffix} file holds {rule}"
            ) from error
        yield _object(item, f"{source}: line {number}")


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise RankfrontError(f"{where} is {json.dumps(item)[:40]}, not an object of named fields")
    return item


def _text(path: Path, source: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RankfrontError(f"{source}: byte {error.start} is no UTF-8 text") from error


def _lines(content: str) -> list[str]:
    """Each line with its end and the blank lines behind it, the first with those before it too."""
    first, *others = re.split(r"(?<=\n)(?=[^\S\n]*\S)", content)
    if others and not first.strip():
        others[0] = first + others[0]
        return others
    return [first, *others] if content else []


def _load_table(place: Source, source: str, subset: str | None, split: str | None) -> datasets.Dataset:
    import datasets

    try:
        if place.hub_id is not None:
            return datasets.load_dataset(
                place.hub_id, subset, split=split or HUB_SPLIT, revision=place.revision
            )
        assert place.path is not None
        return _local(place.path, source, split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        named = ", ".join(f"{key} {value}" for key, value in (("subset", subset), ("split", split)) if value)
        reason = str(error.__cause__ or error)
        raise RankfrontError(
            f"{source}{f' ({named})' if named else ''}: cannot be loaded: {reason}"
        ) from error


def _local(path: Path, source: str, split: str | None) -> datasets.Dataset:
    import datasets

    if path.is_dir():
        return _load_folder(path, split)
    if path.suffix == TEXT:
        return datasets.Dataset.from_dict({"text": _lines(_text(path, source))})
    if path.suffix == ARROW:
        return datasets.Dataset.from_file(str(path))
    kind = TABLES.get(path.suffix)
    if kind is None:
        known = ", ".join((*TABLES, ARROW, *JSON, TEXT))
        raise RankfrontError(f"{source}: a data file ends in one of {known}")
    return datasets.load_dataset(kind, data_files=str(path), split="train")


def _folder_of(path: Path, split: str | None) -> Path:
    """A file, or the folder of a single data set, itself; of a folder of several the split's."""
    if split is None or not path.is_dir() or (path / "state.json").exists():
        return path
    return path / split


def _load_folder(path: Path, split: str | None) -> datasets.Dataset:
    import datasets

    path = _folder_of(path, split)
    if not (path / "state.json").exists():
        inside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise RankfrontError(f"{path} holds no saved data set; beside it: {', '.join(inside) or 'nothing'}")
    loaded = datasets.load_from_disk(str(path))
    assert isinstance(loaded, datasets.Dataset)
    return loaded
