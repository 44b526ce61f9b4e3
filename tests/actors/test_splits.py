"""The splits of a study: they share nothing, caps take the first, and what is too long or short is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from actors.models import load_tokenizer
from actors.splits import load_choice, load_split
from actors.text import calibration_windows, text_parts
from actors.types import CorpusSource, PreparationSpec, RankfrontError, TextSource
from search.config import parse_config


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PreparationSpec:
    """No cap reaches into any split."""
    scoring = {"examples": {"search": 100, "test": 100}, "tokens": {"search": 10**6, "test": 10**6}}
    return parse_config(tiny.tiny_config(tmp_path_factory.mktemp("splits"), scoring=scoring)).preparation()


@pytest.fixture(scope="module")
def tokenizer(spec: PreparationSpec) -> Any:
    return load_tokenizer(spec.model.source, spec.model)


def test_the_splits_share_no_question_and_leave_none_out(spec: PreparationSpec, tokenizer: Any) -> None:
    search, test = (load_split(spec, split, tokenizer, 256) for split in ("search", "test"))
    for one, other, rows in zip(search.tasks, test.tasks, (tiny.arc_rows(), tiny.piqa_rows()), strict=True):
        questions = [{example.contexts[0] for example in task.examples} for task in (one, other)]
        assert questions[0].isdisjoint(questions[1])
        asked = {row["question" if "question" in row else "goal"] for row in rows}
        assert questions[0] | questions[1] == {f"Question: {question}\nAnswer:" for question in asked}
        assert (len(one.examples), len(other.examples)) == (6, 24)  # a fifth and the rest of 30


def test_the_splits_share_no_text(spec: PreparationSpec, tokenizer: Any) -> None:
    texts = [
        tokenizer.decode(load_split(spec, split, tokenizer, 256).windows.flatten())
        for split in ("search", "test")
    ]
    found = [{i for i, document in enumerate(tiny.documents()) if document[40:90] in text} for text in texts]
    assert all(len(documents) > 4 for documents in found)
    assert max(found[0]) < min(found[1])


@pytest.mark.parametrize("stride", [None, 8])
def test_the_text_that_chooses_is_behind_that_of_the_search(
    spec: PreparationSpec, tokenizer: Any, stride: int | None
) -> None:
    """And before that of the test; where no window is left there is none."""
    whole = load_split(spec, "search", tokenizer, 256).windows.flatten()
    tokens = {"search": 70, "test": 64, "choice": 10**6}
    scoring = replace(spec.scoring, tokens=tokens, stride=stride)
    found = load_choice(replace(spec, scoring=scoring), tokenizer)
    assert found is not None
    ids = tokenizer("\n\n".join(text_parts(spec.calibration, scoring, spec.calibration_fraction)["search"]))
    assert found.windows.tolist() == torch.tensor(ids["input_ids"][70:]).unfold(0, 32, stride or 32).tolist()
    assert found.windows[0].tolist() == whole[70:102].tolist()
    assert found.tokens == found.windows.numel()
    assert load_choice(spec, tokenizer) is None, "the search takes all"


def test_windows_of_a_text_file_are_those_of_the_file(
    spec: PreparationSpec, tokenizer: Any, tmp_path: Path
) -> None:
    """Of its own line ends, whichever part they are of."""
    (tmp_path / "t.txt").write_text("\n".join(tiny.documents()), encoding="utf-8")
    text = TextSource(str(tmp_path / "t.txt"))
    scoring = replace(spec.scoring, text=text, tokens={"search": 320, "test": 320, "choice": 320}, tasks=())
    scoring = replace(scoring, corpora=(CorpusSource("again", text, {"search": 320, "test": 320}),))
    spec = replace(spec, scoring=scoring, calibration=replace(spec.calibration, text=text))
    parts = text_parts(spec.calibration, scoring, spec.calibration_fraction)
    assert "".join(map("".join, parts.values())) == "\n".join(tiny.documents())
    ids = {name: tokenizer("".join(part))["input_ids"] for name, part in parts.items()}
    search, choice = load_split(spec, "search", tokenizer, 256), load_choice(spec, tokenizer)
    assert choice is not None
    assert search.text.name == choice.text.name == "t.txt@32"
    assert search.windows.flatten().tolist() == ids["search"][:320]
    assert choice.windows.flatten().tolist() == ids["search"][320:640]
    calibrated = calibration_windows(spec, tokenizer).flatten()
    assert calibrated.tolist() == ids["calibration"][: len(calibrated)]
    again = tokenizer("\n".join(tiny.documents()))["input_ids"]
    assert search.corpora["again"].windows.flatten().tolist() == again[:320]


@pytest.mark.parametrize("stride", [None, 8])
def test_a_tokenizer_that_begins_with_bos_makes_splits_of_its_own(
    spec: PreparationSpec, tokenizer: Any, stride: int | None
) -> None:
    """Of other fingerprints, as large, each window behind BOS; they share no token of the text."""
    tokens = {"search": 70, "test": 64, "choice": 96}
    spec = replace(spec, scoring=replace(spec.scoring, tokens=tokens, stride=stride, tasks=()))
    found = [load_split(spec, split, tiny.beginning_with_bos(), 256) for split in ("search", "test")]
    plain = [load_split(spec, split, tokenizer, 256) for split in ("search", "test")]
    choices = load_choice(spec, tiny.beginning_with_bos()), load_choice(spec, tokenizer)
    for one, other in [*zip(found, plain, strict=True), choices]:
        assert one is not None
        assert other is not None
        assert one.fingerprint != other.fingerprint
        assert one.windows.shape == other.windows.shape
        assert one.text.scored.tolist() == other.text.scored.tolist()
        assert one.windows[:, 0].unique().tolist() == [tokenizer.bos_token_id]
        assert one.windows[0, 1:].tolist() == other.windows[0, :-1].tolist()
    searched = text_parts(spec.calibration, spec.scoring, spec.calibration_fraction)["search"]
    ids = tokenizer("\n\n".join(searched))["input_ids"]
    step = stride or 31
    last = step * (len(found[0].windows) - 1)
    assert found[0].windows[-1, 1:].tolist() == ids[last : last + 31]
    assert last + 31 <= 70
    assert choices[0] is not None
    assert choices[0].windows[0, 1:].tolist() == ids[70 : 70 + 31]


def test_caps_take_the_first_of_the_same_order(spec: PreparationSpec, tokenizer: Any) -> None:
    """A larger cap adds examples and windows; it never exchanges them."""
    capped = replace(spec.scoring, examples={"search": 2, "test": 7}, tokens={"search": 96, "test": 64})
    for split in ("search", "test"):
        full = load_split(spec, split, tokenizer, 256)
        part = load_split(replace(spec, scoring=capped), split, tokenizer, 256)
        assert part.windows.tolist() == full.windows[: len(part.windows)].tolist()
        assert part.windows.numel() == capped.tokens[split]
        for one, other in zip(part.tasks, full.tasks, strict=True):
            assert one.examples == other.examples[: capped.examples[split]]
        assert part.tokens == part.windows.numel() + sum(task.tokens for task in part.tasks)
        assert part.fingerprint != full.fingerprint


def test_text_longer_than_the_models_context_is_refused(spec: PreparationSpec, tokenizer: Any) -> None:
    with pytest.raises(RankfrontError, match=r"scoring\.window: 32 tokens, the model reads 31"):
        load_split(spec, "search", tokenizer, 31)
    source = spec.scoring.tasks[0].source
    with pytest.raises(
        RankfrontError, match=rf"{source}: row \d+ of arc_easy has \d+ tokens, the model reads 32"
    ):
        load_split(spec, "search", tokenizer, 32)


def test_a_corpus_short_of_a_window_is_named(spec: PreparationSpec, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a\nb\nc\nd\ne\nf")
    corpus = CorpusSource("short", TextSource(str(tmp_path / "short.txt")), {"search": 96, "test": 96})
    spec = replace(spec, scoring=replace(spec.scoring, corpora=(corpus,)))
    with pytest.raises(RankfrontError, match=r"short\.txt: text too short: \d tokens in 1 documents"):
        load_split(spec, "search", tokenizer, 256)
