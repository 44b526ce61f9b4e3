"""Documents to token windows: load, deduplicate, divide into disjoint parts, tokenise, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.rows import columns_of, is_plain, load_rows, place_of_rows
from actors.types import CalibrationSpec, PreparationSpec, RankfrontError, ScoringSpec, TextSource

if TYPE_CHECKING:
    import torch

STANDARD_JOIN = "\n\n"
"""How perplexities are reported, so that a text joined otherwise says so in its name."""

_MARGIN = 256
"""Tokens read behind those that are wanted. What a text ends with changes the tokens of its last word, or the
last few of a word that long; so those before the margin are the same whatever follows."""


class TooShortError(RankfrontError):
    """Not one window of text."""


@dataclass(frozen=True)
class ScoredText:
    """Windows (windows, window) of one text, each beginning `stride` tokens behind the one before it.

    Where windows overlap, each after the first is scored on its last `stride` tokens only, with the tokens
    before them as context: every token of the text but the first is scored once. Where they do not overlap
    the first token of each is never scored: one of the text, or BOS where windows begin with it (`windows`).
    """

    name: str
    windows: torch.Tensor
    stride: int

    @property
    def scored(self) -> torch.Tensor:
        """How many tokens, its last, each window is scored on: (windows,) int64."""
        import torch

        count, window = self.windows.shape
        found = torch.full((count,), min(self.stride, window - 1))
        found[0] = window - 1
        return found

    @property
    def length(self) -> int:
        """Tokens that are read, those in several windows once."""
        count, window = self.windows.shape
        return window + (count - 1) * self.stride


def text_name(text: str, window: int, stride: int, join: str) -> str:
    """`wikitext@512`; `wikitext@512/256` at another stride; how documents are joined if not as usual."""
    other = "" if stride == window else f"/{stride}"
    joined = "" if join == STANDARD_JOIN else f" joined by {json.dumps(join)}"
    return f"{text}@{window}{other}{joined}"


def place_of(text: TextSource) -> tuple[str, ...]:
    """Where its documents are, however that is written: equal for texts of the same documents, whatever
    becomes of them. Raises as `place_of_rows` does."""
    return (*place_of_rows(text.source, text.subset, text.split), text.column)


def is_divided(calibration: TextSource, scoring: TextSource) -> bool:
    """Whether both are of the same documents, which are then divided; each joins its own as it says.

    Raises:
        RankfrontError: repeats are dropped for one of them only: no division is that of both; or no such
            `between`.
    """
    if place_of(calibration) != place_of(scoring):
        return False
    if calibration.deduplicate != scoring.deduplicate:
        here, there = (json.dumps(each.deduplicate) for each in (calibration, scoring))
        raise RankfrontError(
            f"calibration.text.deduplicate: {here}, but text.deduplicate is {there} and both are of the same "
            "documents, which are divided between them; give both the same, or name another text"
        )
    between(calibration)  # of the two only the scored text is loaded
    return True


def between(text: TextSource) -> str:
    """What stands between two documents: nothing between lines of a text file, which bring their ends.

    Raises:
        RankfrontError: a text file whose lines are to be joined by something.
    """
    if not is_plain(text.source):
        return text.join
    if text.join != STANDARD_JOIN:
        raise RankfrontError(
            f"{text.source}: join {json.dumps(text.join)}: a .txt file is read as it is, line ends and all; "
            "leave join out"
        )
    return ""


def load_documents(text: TextSource) -> list[str]:
    """The documents of one column, in order; empty ones dropped, exact repeats too if asked.

    With what stands `between` them they are the text; of a text file, the file as it is.

    Raises:
        RankfrontError: a row without the column, or with something other than text in it; no such `between`.
    """
    between(text)  # before anything is read
    column = _column(text)
    for number, document in enumerate(column):
        if not isinstance(document, str):
            raise RankfrontError(
                f"{text.source}: column {text.column!r} holds something other than text in row {number}: "
                f"{str(document)[:40]}"
            )
    if not text.deduplicate:
        return [document for document in column if document.strip()]
    first: dict[str, str] = {}
    for document in column:
        first.setdefault(" ".join(document.split()).casefold(), document)
    return [document for key, document in first.items() if key]


def _column(text: TextSource) -> Sequence[Any]:
    rows = load_rows(text.source, text.subset, text.split)
    columns = columns_of(rows)
    if columns is not None:
        if text.column not in columns:
            raise RankfrontError(f"{text.source}: no column {text.column!r}; there are {', '.join(columns)}")
        return rows[text.column][:]  # type: ignore[call-overload,no-any-return]
    for number, row in enumerate(rows):
        if text.column not in row:
            raise RankfrontError(
                f"{text.source}: no column {text.column!r} in row {number}; there are {', '.join(row)}"
            )
    return [row[text.column] for row in rows]


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

    Where calibration and scoring are of the same documents, calibration takes the first
    `calibration_fraction` of them; otherwise it has its own text whole. Raises as `is_divided` does.
    """
    search = scoring.search_fraction
    if is_divided(calibration.text, scoring.text):
        rest = 1 - calibration_fraction
        fractions = (calibration_fraction, rest * search, rest * (1 - search))
        parts = divide(load_documents(scoring.text), fractions)
    else:
        parts = [
            load_documents(calibration.text),
            *divide(load_documents(scoring.text), (search, 1 - search)),
        ]
    return dict(zip(("calibration", "search", "test"), parts, strict=True))


def calibration_windows(spec: PreparationSpec, tokenizer: Any) -> torch.Tensor:
    """Windows (windows, window) of the calibration part; raises as `windows` does."""
    calibration = spec.calibration
    documents = text_parts(calibration, spec.scoring, spec.calibration_fraction)["calibration"]
    text = calibration.text
    return windows(documents, between(text), tokenizer, calibration.window, calibration.tokens)


def corpus_part(text: TextSource, search_fraction: float, split: str) -> list[str]:
    """One split of a text that nothing is calibrated on: its first `search_fraction`, or the rest."""
    search, test = divide(load_documents(text), (search_fraction, 1 - search_fraction))
    return search if split == "search" else test


def first_ids(text: str, tokenizer: Any, count: int) -> list[int]:
    """The first `count` token ids of a text, or all it has: those that tokenising the whole begins with.

    Only as much of the text is tokenised as that takes, at first a character for each token, then as many as
    the tokens so far have. No special token is added.
    """
    wanted = count + _MARGIN
    size = wanted
    while True:
        ids: list[int] = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted or size >= len(text):
            return ids[:count]
        # a tenth more, since the rest may have shorter words; no more than eight times as much, since a text
        # may begin with what makes no token
        size = min(8 * size, 1 + int(1.1 * size * wanted / max(1, len(ids))))


def beginning(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text unless told not to: BOS, or none.

    Models that learned to read behind it may make nothing of a text without.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else []


def windows(
    documents: Sequence[str],
    join: str,
    tokenizer: Any,
    window: int,
    tokens: int,
    stride: int | None = None,
    skip: int = 0,
) -> torch.Tensor:
    """Joined documents as int64 token ids (windows, window), no padding.

    Each window begins `stride` tokens behind the one before it, by default a whole window: consecutive, not
    overlapping. At most `tokens` tokens behind the first `skip`, rounded down to whole windows. Where the
    tokenizer puts BOS before a text, each window is BOS and `window` - 1 tokens of the text, and there are as
    many as without it; no other special token is added.

    Raises:
        TooShortError: the text is too short for one window.
    """
    import torch

    stride = window if stride is None else stride
    begin = beginning(tokenizer)
    own = window - len(begin)
    ids = first_ids(join.join(documents), tokenizer, skip + tokens - len(begin))[skip:]
    if len(ids) < own:
        raise TooShortError(
            f"text too short: {len(ids)} tokens in {len(documents)} documents, a window needs {own}"
        )
    # windows that do not overlap follow each other in the text, not counting what is put before them
    cut = torch.tensor(ids, dtype=torch.int64).unfold(0, own, min(stride, own))
    cut = cut[: (tokens - window) // stride + 1]
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(cut), -1), cut], 1)


def fingerprint_windows(ids: torch.Tensor) -> str:
    """sha256 of the shape and the token ids."""
    content = hashlib.sha256(repr(tuple(ids.shape)).encode())
    content.update(ids.contiguous().numpy().tobytes())
    return content.hexdigest()
