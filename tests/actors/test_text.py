"""Documents to windows: loading, repeats, disjoint parts, token windows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.text import (
    between,
    divide,
    fingerprint_windows,
    first_ids,
    load_documents,
    place_of,
    text_name,
    text_parts,
    windows,
)
from actors.types import CalibrationSpec, RankfrontError, ScoringSpec, TextSource

TEXTS = ["first, „quoted”", 'second "line"', "third"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted tables land below the test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def saved(folder: Path, column: list, name: str = "text") -> TextSource:
    datasets.Dataset.from_dict({name: column}).save_to_disk(str(folder))
    return TextSource(str(folder))


def test_a_missing_column_is_named_with_those_there(tmp_path: Path) -> None:
    saved(tmp_path / "t", TEXTS, "passage")
    with pytest.raises(RankfrontError, match=r"no column 'text'; there are passage"):
        load_documents(TextSource(str(tmp_path / "t")))


@pytest.mark.parametrize("column", [[1, 2], ["text", None], [["a", "list"]]])
def test_a_column_of_something_else_is_refused(column: list, tmp_path: Path) -> None:
    source = saved(tmp_path / "t", column)
    with pytest.raises(RankfrontError, match="column 'text' holds something other than text"):
        load_documents(source)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ('{"text": "a"}\n{"txt": "b"}', r"no column 'text' in row 1; there are txt"),
        ('{"text": "a"}\n\n{"text": 7}', r"column 'text' holds something other than text in row 1: 7"),
        ('{"text": "a"}\n{"text": null}', r"column 'text' holds something other than text in row 1: None"),
        ("", "holds no rows"),
    ],
)
def test_the_row_of_a_file_that_is_no_document_is_named(rows: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(rows)
    with pytest.raises(RankfrontError, match=rf"{path}: {reason}"):
        load_documents(TextSource(str(path)))


def test_documents_of_json_rows_of_different_fields(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"n": 1, "text": "a"}, {"text": "b", "n": "two"}]')
    assert load_documents(TextSource(str(path))) == ["a", "b"]


LINES = "\n\n = A title = \n\n First\x0cpage.\u2028Same line.\n\n\n\tSecond; café.\nThird.\n Third. \n" * 40


@pytest.fixture
def plain(tmp_path: Path) -> TextSource:
    (tmp_path / "t.txt").write_text(LINES, encoding="utf-8")
    return TextSource(str(tmp_path / "t.txt"))


def test_a_text_file_is_read_as_it_is(plain: TextSource) -> None:
    documents = load_documents(plain)
    assert "".join(documents) == LINES
    assert len(documents) == 5 * 40
    scoring = ScoringSpec(plain, 32, {}, search_fraction=0.25)
    parts = text_parts(CalibrationSpec(plain, 64, 32), scoring, 0.4)
    assert "".join([*parts["calibration"], *parts["search"], *parts["test"]]) == LINES
    tokenizer = tiny.tiny_tokenizer()
    for documents in parts.values():
        text = "".join(documents)
        found = windows(documents, between(plain), tokenizer, 32, 10**6)
        assert found.numel() > len(tokenizer(text)["input_ids"]) - 32
        assert text.startswith(tokenizer.decode(found.flatten()[:-4]))  # the last character may be cut


def test_repeated_lines_of_a_text_file_go_with_the_blank_ones_behind_them(plain: TextSource) -> None:
    kept = load_documents(replace(plain, deduplicate=True))
    assert "".join(kept) == LINES[: len(LINES) // 40].removesuffix(" Third. \n")


def test_a_text_file_is_not_joined_by_anything(plain: TextSource) -> None:
    with pytest.raises(RankfrontError, match=r't\.txt: join " ": a \.txt file is read as it is'):
        load_documents(replace(plain, join=" "))
    with pytest.raises(RankfrontError, match=r't\.txt: join " ": a \.txt file is read as it is'):
        text_parts(CalibrationSpec(replace(plain, join=" "), 64, 32), ScoringSpec(plain, 32, {}), 0.4)
    assert between(replace(plain, source=str(Path(plain.source).parent), join=" ")) == " "


def test_empty_documents_are_dropped_and_repeats_kept_unless_asked(tmp_path: Path) -> None:
    source = saved(tmp_path / "t", ["b", "", "a", " \n", "b"])
    assert load_documents(source) == ["b", "a", "b"]


def test_deduplication_keeps_the_first_of_each_in_order(tmp_path: Path) -> None:
    """Documents are the same when they differ in case and white space only."""
    column = ["Two words", "one", "two  WORDS", "", "ONE ", "three", "Two\nwords", "one", "straße", "STRASSE"]
    source = saved(tmp_path / "t", column)
    kept = load_documents(TextSource(source.source, deduplicate=True))
    assert kept == ["Two words", "one", "three", "straße"]


def test_deduplication_of_one_letter_documents(tmp_path: Path) -> None:
    """Python keeps one object for each of these strings, so identity says nothing."""
    source = saved(tmp_path / "t", ["a", "b", "a", "a"])
    assert load_documents(TextSource(source.source, deduplicate=True)) == ["a", "b"]


FRACTIONS = st.lists(st.integers(1, 10), min_size=1, max_size=4).map(lambda w: [x / sum(w) for x in w])


@given(st.lists(st.text("ab", min_size=1, max_size=30), max_size=25), FRACTIONS)
def test_divide_gives_contiguous_parts_of_about_the_asked_size(documents: list, fractions: list) -> None:
    """Every border lies within half a document of where the fractions put it."""
    parts = divide(documents, fractions)
    assert len(parts) == len(fractions)
    assert [document for part in parts for document in part] == documents
    lengths = [sum(map(len, part)) for part in parts]
    half = max(map(len, documents), default=0) / 2
    for index in range(len(parts)):
        asked = sum(fractions[: index + 1]) * sum(lengths)
        assert abs(sum(lengths[: index + 1]) - asked) <= half + 1e-6


def test_the_three_parts_of_one_text_are_disjoint_and_whole(tmp_path: Path) -> None:
    text = TextSource(str(tiny.tiny_text(tmp_path / "text")))
    calibration = CalibrationSpec(text, tokens=64, window=32)
    parts = text_parts(calibration, ScoringSpec(text, 32, {}, search_fraction=0.25), 0.4)
    assert [*parts] == ["calibration", "search", "test"]
    assert [*parts["calibration"], *parts["search"], *parts["test"]] == tiny.documents()
    sizes = {name: sum(map(len, documents)) for name, documents in parts.items()}
    share = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    assert share == pytest.approx({"calibration": 0.4, "search": 0.15, "test": 0.45}, abs=0.02)


def test_a_calibration_text_of_its_own_is_taken_whole(tmp_path: Path) -> None:
    text = TextSource(str(tiny.tiny_text(tmp_path / "text")))
    own = saved(tmp_path / "own", TEXTS)
    scoring = ScoringSpec(text, 32, {}, search_fraction=0.5)
    parts = text_parts(CalibrationSpec(own, 64, 32), scoring, 0.4)
    assert parts["calibration"] == TEXTS
    assert [*parts["search"], *parts["test"]] == tiny.documents()


HUB = {"subset": "raw"}
# Two ways each to write where the same documents are, below the folder that `everywhere` makes.
SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "join": ({"source": "./a.jsonl"}, {"source": "./a.jsonl", "join": " "}),
    "path": ({"source": "./a.jsonl"}, {"source": "./folder/../a.jsonl"}),
    "link": ({"source": "./a.jsonl"}, {"source": "./link.jsonl"}),
    "split of a file": ({"source": "./a.jsonl"}, {"source": "./a.jsonl", "split": "train"}),
    "subset of a file": ({"source": "./a.jsonl"}, {"source": "./a.jsonl", "subset": "raw"}),
    "split of one data set": ({"source": "./folder/dev"}, {"source": "./folder/dev", "split": "test"}),
    "folder of a split": ({"source": "./folder/dev"}, {"source": "./folder", "split": "dev"}),
    "default split": ({"source": "o/x", **HUB}, {"source": "o/x", **HUB, "split": "validation"}),
    "default revision": ({"source": "o/x", **HUB}, {"source": "o/x@main", **HUB}),
    "default subset": ({"source": "o/x"}, {"source": "o/x", "subset": "default"}),
    "hub": ({"source": "o/x", **HUB}, {"source": "hub:o/x", **HUB}),
    "letter case of the hub": ({"source": "o/x", **HUB}, {"source": "O/X", **HUB}),
}


@pytest.fixture
def everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny documents in a file, a link to it, a saved dictionary and whatever is on the hub."""
    table = datasets.Dataset.from_dict({"text": tiny.documents()})
    table.to_json(tmp_path / "a.jsonl")
    datasets.DatasetDict({"dev": table}).save_to_disk(tmp_path / "folder")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("named", SPELLINGS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_same_documents_are_divided_however_they_are_named(named: str, turned: bool) -> None:
    one, other = (TextSource(**each) for each in SPELLINGS[named])
    own, scored = (other, one) if turned else (one, other)
    parts = text_parts(CalibrationSpec(own, 64, 32), ScoringSpec(scored, 32, {}, search_fraction=0.25), 0.4)
    assert all(parts.values())
    assert [*parts["calibration"], *parts["search"], *parts["test"]] == tiny.documents()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("named", SPELLINGS)
@pytest.mark.parametrize("own", [False, True])
def test_the_same_documents_less_repeats_are_refused(named: str, own: bool) -> None:
    """Divided as one of them is read, the parts of the other could share a document."""
    one, other = (TextSource(**each) for each in SPELLINGS[named])
    calibration = CalibrationSpec(replace(one, deduplicate=own), 64, 32)
    scoring = ScoringSpec(replace(other, deduplicate=not own), 32, {})
    key = rf"^calibration\.text\.deduplicate: {json.dumps(own)}, but text\.deduplicate is"
    with pytest.raises(RankfrontError, match=key):
        text_parts(calibration, scoring, 0.4)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("own", "scored"),
    [
        ({"source": "o/x", "split": "train"}, {"source": "o/x"}),
        ({"source": "o/x@v1"}, {"source": "o/x"}),
        ({"source": "o/x", **HUB}, {"source": "o/x", "subset": "other"}),
        ({"source": "o/x"}, {"source": "p/x"}),
        ({"source": "./a.jsonl"}, {"source": "./folder/dev"}),
        ({"source": "./a.jsonl", "column": "summary"}, {"source": "./a.jsonl"}),
    ],
)
def test_other_documents_are_another_place(own: dict[str, Any], scored: dict[str, Any]) -> None:
    assert place_of(TextSource(**own)) != place_of(TextSource(**scored))


def test_windows_are_consecutive_pieces_of_the_joined_text() -> None:
    tokenizer, documents = tiny.tiny_tokenizer(), tiny.documents(5)
    expected = tokenizer.encode("\n--\n".join(documents), add_special_tokens=False)
    found = windows(documents, "\n--\n", tokenizer, window=32, tokens=10**9)
    assert found.dtype == torch.int64
    assert found.shape == (len(expected) // 32, 32)
    assert found.flatten().tolist() == expected[: found.numel()]
    assert windows(documents, "\n--\n", tokenizer, 32, 100).tolist() == found[:3].tolist()


def _trained(model: Any, trainer: Any, normalizer: Any, pre_tokenizer: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(tiny.documents(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@cache
def tokenizer_of(kind: str) -> Any:
    """Byte-level BPE, as GPT-2's; BPE over a text in one piece, as Gemma's; unigrams of words, as T5's."""
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        return tiny.tiny_tokenizer()
    if kind == "whole":
        trainer = trainers.BpeTrainer(vocab_size=384, show_progress=False)
        return _trained(models.BPE(), trainer, normalizers.Replace(" ", "\u2581"), None)
    unigrams = trainers.UnigramTrainer(
        vocab_size=384, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return _trained(models.Unigram(), unigrams, normalizers.NFKC(), pre_tokenizers.Metaspace())


class Counted:
    """A tokenizer, and how many tokens it made."""

    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.tokens = tokenizer, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        found = self._tokenizer(*arguments, **keywords)
        self.tokens += len(found["input_ids"])
        return found


@pytest.mark.parametrize("kind", ["bytes", "whole", "unigrams"])
@pytest.mark.parametrize("documents", [tiny.documents(), ["".join(tiny.documents()).replace(" ", "")]])
@pytest.mark.parametrize("skip", [0, 7, 1_500])
def test_windows_are_those_of_the_whole_text_and_not_all_of_it_is_read(
    kind: str, documents: list[str], skip: int
) -> None:
    """In a text of words, and in one that is a single word."""
    tokenizer = tokenizer_of(kind)
    whole = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    assert len(whole) > 8_000
    for cap in (32, 33, 95, 500, 1_024, 1_025, 2_600, 5_000, len(whole), 10**9):
        counted = Counted(tokenizer)
        found = windows(documents, "\n\n", counted, 32, cap, skip=skip)
        expected = torch.tensor(whole[skip : skip + cap]).unfold(0, 32, 32)
        assert found.tolist() == expected.tolist()
        assert counted.tokens <= min(2 * (skip + cap) + 1_000, 2 * len(whole))


@pytest.mark.parametrize("kind", ["bytes", "whole", "unigrams"])
def test_no_token_is_of_a_word_that_was_cut(kind: str) -> None:
    """Few tokens are a short beginning, which ends right behind them but for what is read further."""
    tokenizer, text = tokenizer_of(kind), " ".join(tiny.documents(5))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in range(1, 100):
        assert first_ids(text, tokenizer, count) == whole[:count]


def test_a_text_that_begins_with_no_token_is_not_read_whole() -> None:
    plain = tokenizer_of("unigrams")
    counted = Counted(lambda text, **keywords: plain(text.strip(), **keywords))
    found = windows([" " * 5_000, *tiny.documents() * 20], "", counted, 32, 320)
    assert found.shape == (10, 32)
    assert counted.tokens < 20_000


def test_windows_that_overlap_begin_a_stride_apart() -> None:
    tokenizer, documents = tiny.tiny_tokenizer(), tiny.documents(5)
    ids = tokenizer.encode(" ".join(documents), add_special_tokens=False)
    found = windows(documents, " ", tokenizer, window=32, tokens=32 + 3 * 8 + 7, stride=8)
    assert found.tolist() == [ids[begin : begin + 32] for begin in (0, 8, 16, 24)]
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("stride", "join", "name"),
    [
        (2048, "\n\n", "wikitext2@2048"),
        (512, "\n\n", "wikitext2@2048/512"),
        (2048, " ", 'wikitext2@2048 joined by " "'),
        (512, "\n", r'wikitext2@2048/512 joined by "\n"'),
    ],
)
def test_a_name_says_whatever_is_not_the_standard(stride: int, join: str, name: str) -> None:
    assert text_name("wikitext2", 2048, stride, join) == name


@pytest.mark.parametrize("stride", [None, 32, 31, 8])
@pytest.mark.parametrize("skip", [0, 45])
def test_windows_of_a_tokenizer_that_begins_with_bos_begin_with_it(stride: int | None, skip: int) -> None:
    """As many windows, each of a token of text less; consecutive ones still leave none of the text out."""
    tokenizer, plain, text = tiny.beginning_with_bos(), tiny.tiny_tokenizer(), " ".join(tiny.documents(5))
    [bos, *ids] = tokenizer(text)["input_ids"]
    assert bos == tokenizer.bos_token_id
    assert ids == plain(text)["input_ids"]
    step = min(stride or 32, 31)
    for cap in (32, 63, 64, 320, 331):
        found = windows([text], "", tokenizer, 32, cap, stride, skip)
        assert found.shape == windows([text], "", plain, 32, cap, stride, skip).shape
        assert found.dtype == torch.int64
        assert found.is_contiguous()
        begins = range(skip, skip + step * len(found), step)
        assert found.tolist() == [[bos, *ids[start : start + 31]] for start in begins]
        assert begins[-1] + 31 < skip + cap, "what is behind the cap is another split's"
    assert windows([text], "", tokenizer, 32, 320)[0].tolist() == tokenizer(text)["input_ids"][:32]
    with pytest.raises(RankfrontError, match="30 tokens in 1 documents, a window needs 31"):
        windows([tokenizer.decode(ids[:30])], "", tokenizer, 32, 320)


def test_only_bos_is_put_before_windows() -> None:
    """Neither what is put behind a text, nor another token before it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tiny_tokenizer()
    plain = windows(tiny.documents(5), " ", tokenizer, 32, 320)
    eos = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=eos)
    assert tokenizer("text")["input_ids"][-1] == tokenizer.eos_token_id
    assert windows(tiny.documents(5), " ", tokenizer, 32, 320).tolist() == plain.tolist()
    tokenizer = tiny.beginning_with_bos()
    tokenizer.bos_token = None
    assert tokenizer("text")["input_ids"][0] == tokenizer.eos_token_id
    assert windows(tiny.documents(5), " ", tokenizer, 32, 320).tolist() == plain.tolist()


def test_too_short_a_text_says_how_short() -> None:
    tokenizer = tiny.tiny_tokenizer()
    count = len(tokenizer("short text")["input_ids"])
    with pytest.raises(RankfrontError, match=rf"{count} tokens in 1 documents, a window needs 32"):
        windows(["short text"], " ", tokenizer, 32, 320)
    with pytest.raises(RankfrontError, match="0 tokens in 0 documents"):
        windows([], " ", tokenizer, 32, 320)


def test_fingerprint_is_of_ids_and_shape() -> None:
    ids = torch.arange(12)
    prints = [ids.view(3, 4), ids.view(4, 3), ids.flip(0).view(3, 4)]
    assert len({fingerprint_windows(ids) for ids in prints}) == 3
    assert fingerprint_windows(ids.view(4, 3).T) == fingerprint_windows(ids.view(4, 3).T.contiguous())
