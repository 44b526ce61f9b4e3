"""Documents to token windows: load, deduplicate, divide into disjoint parts, tokenise, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.sources import Source
from actors.types import CalibrationSpec, RankfrontError, ScoringSpec, TextSource

if TYPE_CHECKING:
    import datasets
    import torch


def load_table(source: str, subset: str | None = None, split: str | None = None) -> datasets.Dataset:
    """A table of rows: a hub id, a folder saved by `datasets`, a parquet, JSON lines, CSV or text file.

    Raises:
        RankfrontError: the source has no such split, or is of no known kind.
    """
    import datasets

    place = Source.parse(source)
    if place.hub_id is not None:
        return datasets.load_dataset(
            place.hub_id, subset, split=split or "validation", revision=place.revision
        )
    assert place.path is not None
    if place.path.is_dir():
        return _load_folder(place.path, split)
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
    kind = kinds.get(place.path.suffix)
    if kind is None:
        raise RankfrontError(f"{source}: a data file ends in one of {', '.join(kinds)}")
    if kind == "text":
        return datasets.Dataset.from_dict({"text": place.path.read_text(encoding="utf-8").splitlines()})
    if kind == "json":
        with place.path.open(encoding="utf-8") as lines:
            return datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])
    table = datasets.load_dataset(kind, data_files=str(place.path), split="train")
    assert isinstance(table, datasets.Dataset)
    return table


def _load_folder(path: Path, split: str | None) -> datasets.Dataset:
    import datasets

    if split is not None and not (path / "state.json").exists():
        path = path / split
    if not (path / "state.json").exists():
        inside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise RankfrontError(f"{path} holds no saved data set; beside it: {', '.join(inside) or 'nothing'}")
    loaded = datasets.load_from_disk(str(path))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def load_documents(text: TextSource) -> list[str]:
    """The documents of one column, in order; empty ones dropped, exact repeats too if asked.

    Raises:
        RankfrontError: no such column, or not a column of strings.
    """
    table = load_table(text.source, text.subset, text.split)
    if text.column not in table.column_names:
        raise RankfrontError(
            f"{text.source}: no column {text.column!r}; there are {', '.join(table.column_names)}"
        )
    column: Sequence[Any] = table[text.column][:]
    if any(not isinstance(document, str) for document in column):
        raise RankfrontError(f"{text.source}: column {text.column!r} holds something other than text")
    if not text.deduplicate:
        return [document for document in column if document.strip()]
    first: dict[str, str] = {}
    for document in column:
        first.setdefault(" ".join(document.split()).casefold(), document)
    return [document for key, document in first.items() if key]


def divide(documents: Sequence[str], fractions: Sequence[float]) -> list[list[str]]:
    """Contiguous disjoint runs of whole documents holding `fractions` of the characters, in order."""
    total = sum(map(len, documents))
    ends = [sum(fractions[: index + 1]) * total for index in range(len(fractions))]
    parts: list[list[str]] = [[] for _ in fractions]
    seen, part = 0, 0
    for document in documents:
        while part < len(parts) - 1 and seen + len(document) / 2 >= ends[part]:
            part += 1
        parts[part].append(document)
        seen += len(document)
    return parts


def text_parts(
    calibration: CalibrationSpec, scoring: ScoringSpec, calibration_fraction: float
) -> dict[str, list[str]]:
    """Documents of the calibration, search and test parts: disjoint, contiguous regions.

    Where calibration and scoring name the same text, calibration takes the first
    `calibration_fraction` of it; otherwise it has its own text whole.
    """
    search = scoring.search_fraction
    if calibration.text == scoring.text:
        rest = 1 - calibration_fraction
        fractions = (calibration_fraction, rest * search, rest * (1 - search))
        parts = divide(load_documents(scoring.text), fractions)
    else:
        parts = [
            load_documents(calibration.text),
            *divide(load_documents(scoring.text), (search, 1 - search)),
        ]
    return dict(zip(("calibration", "search", "test"), parts, strict=True))


def windows(documents: Sequence[str], join: str, tokenizer: Any, window: int, tokens: int) -> torch.Tensor:
    """Joined documents as int64 token ids (windows, window): consecutive, not overlapping, no padding.

    At most `tokens` tokens, rounded down to whole windows. No special token is added.

    Raises:
        RankfrontError: the text is too short for one window.
    """
    import torch

    ids = tokenizer(join.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids), tokens) // window
    if count < 1:
        raise RankfrontError(
            f"text too short: {len(ids)} tokens in {len(documents)} documents, a window needs {window}"
        )
    return torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)


def fingerprint_windows(ids: torch.Tensor) -> str:
    """sha256 of the shape and the token ids."""
    content = hashlib.sha256(repr(tuple(ids.shape)).encode())
    content.update(ids.contiguous().numpy().tobytes())
    return content.hexdigest()
