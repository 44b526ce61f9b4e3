"""The evaluations table: durable, whole after a crash, one row a key."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from fakes import TARGETS, score_of

from actors.types import Allocation, RankfrontError, Score
from search.evaluations import FILE, Evaluations
from search.records import Evaluation

DENSE = Allocation.dense(TARGETS)


def row(trial: int = 0, nll: float = 2.0, **changes: str) -> Evaluation:
    key = {"variant": "factors", "split": "test", "fingerprint": "f1", **changes}
    return Evaluation(trial, **key, score=score_of(DENSE, nll))


def test_rows_come_back_from_disk(tmp_path: Path) -> None:
    table = Evaluations(tmp_path)
    table.add(row(3, 1.5))
    table.add(row(1, 2.5))
    again = Evaluations(tmp_path)
    assert again.rows == (row(3, 1.5), row(1, 2.5))
    assert again.get(3, "factors", "test", "f1") == row(3, 1.5)
    assert again.get(2, "factors", "test", "f1") is None


def test_a_later_row_replaces_an_equal_key(tmp_path: Path) -> None:
    table = Evaluations(tmp_path)
    for nll in (1.0, 2.0):
        table.add(row(0, nll))
    assert table.rows == Evaluations(tmp_path).rows == (row(0, 2.0),)


@pytest.mark.parametrize("change", [{"variant": "refined"}, {"split": "search"}, {"fingerprint": "f2"}])
def test_each_part_of_the_key_counts(tmp_path: Path, change: dict[str, str]) -> None:
    table = Evaluations(tmp_path)
    table.add(row(0, 1.0))
    table.add(row(0, 2.0, **change))
    assert Evaluations(tmp_path).rows == (row(0, 1.0), row(0, 2.0, **change))


def test_a_torn_tail_is_dropped_and_the_table_goes_on(tmp_path: Path) -> None:
    table = Evaluations(tmp_path)
    table.add(row(0))
    table.add(row(1))
    path = tmp_path / FILE
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in (1, last // 2, last - 1):
        path.write_bytes(content[:-cut])
        torn = Evaluations(tmp_path)
        assert torn.rows == (row(0),)
        torn.add(row(1))
        assert path.read_bytes() == content


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    table = Evaluations(tmp_path)
    table.add(row(0))
    table.add(row(1))
    path = tmp_path / FILE
    path.write_bytes(b"?" + path.read_bytes())
    with pytest.raises(RankfrontError, match="record 1 is damaged"):
        Evaluations(tmp_path)


def test_a_row_is_on_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((tmp_path / FILE).read_text().count("\n")))
    table = Evaluations(tmp_path)
    table.add(row(0))
    table.add(row(1))
    assert synced == [1, 2], "each row is written out and then forced to disk"


def test_an_unknown_standard_error_survives(tmp_path: Path) -> None:
    """One window has no standard error: NaN, and still a row."""
    score = score_of(DENSE)
    text = type(score.text)(score.text.name, score.text.nats, score.text.tokens, math.nan)
    alone = Score(**{**score.__dict__, "text": text})
    Evaluations(tmp_path).add(Evaluation(0, "factors", "test", "f1", alone))
    [found] = Evaluations(tmp_path).rows
    assert math.isnan(found.score.text.stderr)
    assert found.score.text.nll == alone.text.nll
