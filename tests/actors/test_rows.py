"""Rows of every kind of file, and what is said of a file that holds none."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from actors.rows import columns_of, load_rows
from actors.types import RankfrontError

ROWS = [{"text": "first, „quoted”", "n": 1}, {"text": 'second "line"', "n": 2}, {"text": "third", "n": 3}]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted tables land below the test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path) -> Path:
    table = datasets.Dataset.from_list(ROWS)
    if path.suffix == ".parquet":
        table.to_parquet(str(path))
    elif path.suffix == ".csv":
        table.to_csv(str(path), index=False)
    elif path.name == "array.json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif path.suffix == ".arrow":
        table.save_to_disk(str(path.parent / "saved"))
        next((path.parent / "saved").glob("*.arrow")).rename(path)
    else:
        table.save_to_disk(str(path))
    return path


KINDS = ["t.parquet", "t.csv", "t.jsonl", "t.json", "array.json", "t.arrow", "folder"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_table_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = load_rows(str(write(tmp_path / name)))
    assert [dict(row) for row in rows] == ROWS
    assert columns_of(rows) == (None if "json" in name else ["text", "n"])


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\nb\nc\n", ["a\n", "b\n", "c\n"]),
        ("a\n\n\nb\n  \nc", ["a\n\n\n", "b\n  \n", "c"]),
        ("\n \na\n  b\n\n ", ["\n \na\n", "  b\n\n "]),
        ("a\x0cb\u2028c\x1dd\x85e\x0b\n\x0c\nf", ["a\x0cb\u2028c\x1dd\x85e\x0b\n\x0c\n", "f"]),
        ("a\r\nb", ["a\n", "b"]),
        (" \n\n", [" \n\n"]),
    ],
)
def test_a_text_file_is_its_lines_with_what_ends_them(content: str, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(content, encoding="utf-8", newline="")
    rows = load_rows(str(tmp_path / "t.txt"))
    assert columns_of(rows) == ["text"]
    assert [row["text"] for row in rows] == lines


def test_a_split_of_a_saved_dictionary(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole.select([2])}).save_to_disk(str(tmp_path / "t"))
    assert [row["text"] for row in load_rows(str(tmp_path / "t"), split="test")] == ["third"]
    assert [row["text"] for row in load_rows(str(tmp_path / "t" / "train"), split="test")] == TEXTS
    with pytest.raises(RankfrontError, match=r"t/dev holds no saved data set; beside it: test, train"):
        load_rows(str(tmp_path / "t"), split="dev")


def test_json_rows_keep_their_own_fields_and_types(tmp_path: Path) -> None:
    """A table would have one type for each column, and every column in each row."""
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": "two", "b": [1, "x"]}\n')
    assert load_rows(str(tmp_path / "t.jsonl")) == [{"a": 1}, {"a": "two", "b": [1, "x"]}]


MISTAKES = {
    ("t.jsonl", '{"a": 1}\n\n{"a": 2'): r"line 3 is no JSON \(.*, column \d+\); .*an object on each line$",
    ("t.json", '{\n "a": 1\n}'): r"line 1 is no JSON .* an object on each line, or one array of objects$",
    ("t.jsonl", '{"a": 1}\n[1, 2]'): r"line 2 is \[1, 2\], not an object of named fields",
    ("t.json", '[{"a": 1},\n {"a": }]'): r"line 2 breaks the JSON array: Expecting value",
    ("t.json", '[{"a": 1}, "b"]'): r'row 1 of the array is "b", not an object of named fields',
    ("t.json", "[]"): "holds no rows",
    ("t.jsonl", " \n"): "holds no rows",
    ("t.txt", ""): "holds no rows",
    ("t.jsonl", "caf\xe9"): "byte 3 is no UTF-8 text",
    ("t.txt", "caf\xe9"): "byte 3 is no UTF-8 text",
    ("t.pkl", ""): r"a data file ends in one of \.parquet, \.csv, \.arrow, \.jsonl, \.json, \.txt",
    ("t.csv", 'a,b\n1,2\n1,2,3,"4\n'): "cannot be loaded: .*",
    ("t.parquet", "no parquet"): "cannot be loaded: .*",
    ("t.arrow", "no arrow"): "cannot be loaded: .*",
}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: f"{case[0]}-{case[1][:12]}")
def test_a_file_that_cannot_be_read_is_named_with_the_line_and_the_rule(
    case: tuple[str, str], tmp_path: Path
) -> None:
    name, content = case
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(RankfrontError, match=rf"^{tmp_path / name}: {MISTAKES[case]}"):
        load_rows(str(tmp_path / name))


def test_a_data_set_that_is_not_on_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(RankfrontError, match=r"^no/such \(subset en, split test\): cannot be loaded"):
        load_rows("no/such", "en", "test")
