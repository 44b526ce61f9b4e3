"""The evaluations table: durable, whole after a crash, one row a key."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from fakes import TARGETS, cost_model, score_of

from actors.harness_results import HarnessScore
from actors.types import Allocation, RankfrontError, Score
from search.evaluations import FILE, Evaluations
from search.records import Evaluation, HarnessEvaluation, TrialRow

DENSE, HALF = Allocation.dense(TARGETS), cost_model().uniform(0.5)


def trial(number: int, allocation: Allocation = DENSE) -> TrialRow:
    return TrialRow(number, "COMPLETE", "seed", allocation, 1.0, 1.0, 1.0, *(None,) * 6)


def opened(folder: Path, *trials: TrialRow) -> Evaluations:
    return Evaluations(folder, trials or map(trial, range(4)))


def row(trial: int = 0, nll: float = 2.0, **changes: Any) -> Evaluation:
    """As the table keeps it: with its trial's allocation."""
    key = {"variant": "factors", "split": "test", "fingerprint": "f1", "allocation": DENSE.key, **changes}
    return Evaluation(trial, **key, score=score_of(DENSE, nll))


def test_rows_come_back_from_disk(tmp_path: Path) -> None:
    table = opened(tmp_path)
    table.add(row(3, 1.5), print)
    table.add(row(1, 2.5), print)
    again = opened(tmp_path)
    assert again.rows == (row(3, 1.5), row(1, 2.5))
    assert again.get(3, "factors", "test", "f1") == row(3, 1.5)
    assert again.get(2, "factors", "test", "f1") is None


def test_a_later_row_replaces_an_equal_key(tmp_path: Path) -> None:
    table = opened(tmp_path)
    for nll in (1.0, 2.0):
        table.add(row(0, nll), print)
    assert table.rows == opened(tmp_path).rows == (row(0, 2.0),)


def test_what_was_known_of_a_variant_is_forgotten_until_it_is_measured_anew(tmp_path: Path) -> None:
    table = opened(tmp_path)
    kept = [row(0), row(1, variant="refined")]
    answer = HarnessEvaluation(0, "refined", "f3", HarnessScore("piqa", (), 0.5), DENSE.key)
    for each in (*kept, row(0, variant="refined"), row(0, variant="refined", split="search"), answer):
        table.add(each, print)
    for _ in range(2):  # the second time there is nothing to forget
        table.forget(0, "refined", print)
        assert table.rows == opened(tmp_path).rows == tuple(kept)
        assert table.harness == opened(tmp_path).harness == ()
    assert len((tmp_path / FILE).read_text().splitlines()) == 6
    again = row(0, 1.5, variant="refined")
    table.add(again, print)
    assert opened(tmp_path).rows == (*kept, again)


@pytest.mark.parametrize("change", [{"variant": "refined"}, {"split": "search"}, {"fingerprint": "f2"}])
def test_each_part_of_the_key_counts(tmp_path: Path, change: dict[str, str]) -> None:
    table = opened(tmp_path)
    table.add(row(0, 1.0), print)
    table.add(row(0, 2.0, **change), print)
    assert opened(tmp_path).rows == (row(0, 1.0), row(0, 2.0, **change))


def test_a_torn_tail_is_dropped_and_the_table_goes_on(tmp_path: Path) -> None:
    table = opened(tmp_path)
    table.add(row(0), print)
    table.add(row(1), print)
    path = tmp_path / FILE
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in (1, last // 2, last - 1):
        path.write_bytes(content[:-cut])
        torn = opened(tmp_path)
        assert torn.rows == (row(0),)
        torn.add(row(1), print)
        assert path.read_bytes() == content


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    table = opened(tmp_path)
    table.add(row(0), print)
    table.add(row(1), print)
    path = tmp_path / FILE
    path.write_bytes(b"?" + path.read_bytes())
    with pytest.raises(RankfrontError, match="record 1 is damaged"):
        opened(tmp_path)


def test_a_row_is_on_disk_when_add_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((tmp_path / FILE).read_text().count("\n")))
    table = opened(tmp_path)
    table.add(row(0), print)
    table.add(row(1), print)
    assert synced == [1, 2], "each row is written out and then forced to disk"


def test_an_unknown_standard_error_survives(tmp_path: Path) -> None:
    """One window has no standard error: NaN, and still a row."""
    score = score_of(DENSE)
    text = type(score.text)(score.text.name, score.text.nats, score.text.tokens, math.nan)
    alone = Score(**{**score.__dict__, "text": text})
    opened(tmp_path).add(Evaluation(0, "factors", "test", "f1", alone), print)
    [found] = opened(tmp_path).rows
    assert math.isnan(found.score.text.stderr)
    assert found.score.text.nll == alone.text.nll


def test_what_a_crash_left_is_said(tmp_path: Path) -> None:
    table, said = opened(tmp_path), []
    table.add(row(0), said.append)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b'{"trial": 1')
    again = opened(tmp_path)
    again.add(row(1), said.append)
    again.add(row(2), said.append)
    [line] = said
    assert line.startswith("evaluations: dropped 11 bytes of a torn record after 1 whole ones (kept in ")


def test_a_row_counts_for_the_allocation_that_was_scored(tmp_path: Path) -> None:
    """Whatever else had the number meanwhile: a journal was lost, and its backup is back."""
    for allocation, nll in ((DENSE, 1.0), (HALF, 2.0)):
        table = opened(tmp_path, trial(0, allocation))
        assert (0, "factors", "test", "f1") not in table
        assert table.rows == ()
        table.add(row(0, nll, allocation=None), print)
    for allocation, nll in ((DENSE, 1.0), (HALF, 2.0)):
        table = opened(tmp_path, trial(0, allocation))
        assert table.rows == (row(0, nll, allocation=allocation.key),)
        assert table.get(0, "factors", "test", "f1") == table.rows[0]
        assert table.left_out == 1


def test_a_row_without_an_allocation_counts_by_its_number(tmp_path: Path) -> None:
    """Rows of versions that kept none; where there is no such trial, none counts."""
    asked = HarnessEvaluation(0, "factors", "h1", HarnessScore("piqa", (), 1.0))
    kept = [each.to_dict() for each in (row(0, 1.0), row(7, 2.0), asked)]
    for each in kept:
        del each["allocation"]
    (tmp_path / FILE).write_text("".join(json.dumps(each) + "\n" for each in kept))
    table = opened(tmp_path, trial(0, HALF))
    assert table.rows == (row(0, 1.0, allocation=None),)
    assert table.harness == (asked,)
    assert table.left_out == 1
