"""What the texts of a config must agree on with windows and caps: the rules of `search.rules` about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.sources import Source
from actors.text import corpus_part, is_divided, place_of, text_parts
from actors.types import SPLITS, CalibrationSpec, RankfrontError, ScoringSpec, TextSource

if TYPE_CHECKING:
    from search.inputs import CorpusSection, ScoringSection, TextSection
    from search.sections import CalibrationSection


def stride_mistakes(scoring: ScoringSection) -> list[str]:
    if scoring.stride is None or scoring.stride <= scoring.window:
        return []
    return [
        f"scoring.stride: {scoring.stride} is beyond scoring.window, {scoring.window}: it leaves tokens out"
    ]


def corpus_mistakes(text: TextSection, calibration: CalibrationSection, scoring: ScoringSection) -> list[str]:
    """Names that repeat, texts that are read already, and texts that are certainly too short."""
    found = []
    read = {place_of(_source(text)): "text"}
    if calibration.text is not None:
        read.setdefault(place_of(_source(calibration.text)), "calibration.text")
    for index, corpus in enumerate(scoring.corpora):
        where = f"scoring.corpora[{index}]"
        if corpus.name in [other.name for other in scoring.corpora[:index]]:
            found.append(f"{where}.name: {corpus.name!r} is there twice")
        place = place_of(_source(corpus))
        if place in read:
            found.append(f"{where}: is the text of {read[place]}; name another source, split or column")
        elif Source.parse(corpus.source).path is not None:
            found += [f"{where}: {line}" for line in _too_short(corpus, scoring)]
        read.setdefault(place, where)
    return found


def _source(text: TextSection) -> TextSource:
    """The text of a section, a corpus's less what is not of its text."""
    return TextSource(**text.model_dump(exclude={"name", "tokens"}))


def _too_short(corpus: CorpusSection, scoring: ScoringSection) -> list[str]:
    text, share = _source(corpus), scoring.search_fraction
    try:
        sizes = {split: sum(map(len, corpus_part(text, share, split))) for split in SPLITS}
    except (RankfrontError, OSError, ValueError) as error:
        return [str(error)]
    return [
        f"text too short: its {split} part has {size} characters, scoring.window is {scoring.window} tokens"
        for split, size in sizes.items()
        if size < scoring.window
    ]


def text_mistakes(text: TextSection, calibration: CalibrationSection, scoring: ScoringSection) -> list[str]:
    """One text that two keys would read in two ways; texts that are certainly too short: a token is at least
    one character long.

    Texts on the hub are not fetched to check a config; the workers check every text in tokens.
    """
    scored, own = _source(text), _source(calibration.text or text)
    try:
        is_divided(own, scored)
    except RankfrontError as error:
        return [str(error)]
    if any(Source.parse(each.source).path is None for each in (scored, own)):
        return []
    try:
        parts = text_parts(
            CalibrationSpec(own, calibration.tokens, calibration.window),
            ScoringSpec(
                scored,
                scoring.window,
                scoring.tokens.model_dump(),
                search_fraction=scoring.search_fraction,
            ),
            calibration.fraction,
        )
    except (RankfrontError, OSError, ValueError) as error:
        return [f"text: {error}"]
    needed = {"calibration": calibration.window, "search": scoring.window, "test": scoring.window}
    return [
        f"{'calibration.window' if part == 'calibration' else 'scoring.window'}: text too short: the {part} "
        f"part has {sum(map(len, documents))} characters, a window of {needed[part]} tokens needs more"
        for part, documents in parts.items()
        if sum(map(len, documents)) < needed[part]
    ]


def cap_mistakes(calibration: CalibrationSection, scoring: ScoringSection) -> list[str]:
    """Texts that are cut to less than a window."""
    caps = [("calibration.tokens", calibration.tokens, "calibration.window", calibration.window)]
    named = [
        ("scoring.tokens", scoring.tokens),
        *(
            (f"scoring.corpora[{place}].tokens", corpus.tokens)
            for place, corpus in enumerate(scoring.corpora)
            if corpus.tokens is not None
        ),
    ]
    for key, tokens in named:
        for split in SPLITS:
            caps.append((f"{key}.{split}", getattr(tokens, split), "scoring.window", scoring.window))
    return [
        f"{key}: {tokens} is less than one window; {window} is {size}"
        for key, tokens, window, size in caps
        if tokens < size
    ]
