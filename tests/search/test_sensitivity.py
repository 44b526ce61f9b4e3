"""Targets alone: what is asked, what survives a kill, what the table and its maps hold."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fakes import (
    DENSE_NLL,
    TARGETS,
    MadeUpPool,
    cost_model,
    energy_of,
    loss,
    score_of,
)
from matplotlib.image import imread

from actors.types import Allocation, RankfrontError
from search.alone import FILE, Log, cells
from search.heat import figure, heat_maps, heat_png
from search.pool import Job, Outcome
from search.runner import Stop
from search.sensitivity import Questions, ask
from search.sensitivity_page import sensitivity_html
from search.sensitivity_table import Sensitivity, found, module_cells, rows, sensitivity_parquet, target_cells

SHARES = (0.75, 0.25)
PRINTS = {"search": "s" * 64, "factors": "f" * 64}
DENSE = Allocation.dense(TARGETS)
COST = cost_model()
COUNT = 1 + len(SHARES) * len(TARGETS)


def asked(log: Log, answer: Callable[[Job], Outcome] | None = None, stop: Stop | None = None) -> MadeUpPool:
    """Ask what is open; the pool knows what was submitted."""
    pool = MadeUpPool(answer)
    ask(Questions(COST, SHARES, log), log, pool, stop or Stop())  # type: ignore[arg-type]
    return pool


def failing(name: str) -> Callable[[Job], Outcome]:
    """A replica that finds NaN wherever a target is compressed."""

    def answer(job: Job) -> Outcome:
        if job.allocation.to_dict()[name] is None:
            return Outcome(job, score_of(job.allocation))
        return Outcome(job, None, "nll is nan on the search split (attempt 2 of 2)")

    return answer


def table_of(log: Log, **changes: Any) -> Sensitivity:
    energies = {t.name: {"feature": energy_of(t), "weight": np.ones(t.full_rank)} for t in TARGETS}
    losses = {t.name: {"feature": energy_of(t) / 10} for t in TARGETS[:6]}
    dense = log.score(DENSE.key)
    assert dense is not None
    made = rows(cells(COST, SHARES), dense, log, COST, lambda name: "feature", energies, losses)
    table = Sensitivity("demo", "made-up/model", SHARES, dense, tuple(made), {"storage": "pivoted"})
    return dataclasses.replace(table, **changes)


@pytest.fixture
def full(tmp_path: Path) -> Log:
    log = Log(tmp_path, PRINTS)
    asked(log)
    return log


# -- asking -----------------------------------------------------------------------------------


def test_every_target_is_asked_alone_after_the_dense_model(tmp_path: Path) -> None:
    pool = asked(Log(tmp_path, PRINTS))
    first, *others = [job.allocation for job in pool.submitted]
    assert first == DENSE
    changed = [[(name, rank) for name, rank in allocation if rank is not None] for allocation in others]
    expected = [[(t.name, COST.largest_rank(t, share))] for share in SHARES for t in TARGETS]
    assert changed == expected
    assert {job.split for job in pool.submitted} == {"search"}


def test_shares_that_allow_the_same_rank_are_one_question(tmp_path: Path) -> None:
    """A share one parameter larger stores no further rank."""
    log, shares = Log(tmp_path, PRINTS), (0.5, 0.5001)
    questions = Questions(COST, shares, log)
    assert len(questions.cells) == 2 * len(TARGETS)
    assert len(questions) == 1 + len({cell.key for cell in questions.cells}) == 1 + len(TARGETS)


def test_scores_are_those_of_the_replicas(full: Log) -> None:
    for cell in cells(COST, SHARES):
        assert full.score(cell.key) == score_of(cell.allocation)


def test_no_score_of_the_dense_model_ends_it(tmp_path: Path) -> None:
    def answer(job: Job) -> Outcome:
        return Outcome(job, None, "nll is nan on the search split")

    with pytest.raises(RankfrontError, match=r"dense model has no score.*nll is nan"):
        asked(Log(tmp_path, PRINTS), answer)


def test_an_impossible_score_is_no_score(tmp_path: Path) -> None:
    def answer(job: Job) -> Outcome:
        return Outcome(job, score_of(job.allocation, nll=None if job.allocation.is_dense else math.inf))

    log = Log(tmp_path, PRINTS)
    asked(log, answer)
    record = log.get(next(cells(COST, SHARES)).key)
    assert record is not None
    assert record.score is None
    assert "nll is inf" in str(record.reason)


# -- stopped and resumed ----------------------------------------------------------------------


def test_a_killed_run_repeats_nothing(tmp_path: Path) -> None:
    """The process ends in the middle of a look at the pool; a new one reads what is on disk."""
    done = []

    def dying(job: Job) -> Outcome:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(job.allocation.key)
        return Outcome(job, score_of(job.allocation))

    with pytest.raises(KeyboardInterrupt):
        asked(Log(tmp_path, PRINTS), dying)
    again = asked(Log(tmp_path, PRINTS))
    keys = [job.allocation.key for job in again.submitted]
    assert len(keys) == COUNT - 7
    assert set(keys) & set(done) == set()
    assert asked(Log(tmp_path, PRINTS)).submitted == [], "all is known then"
    assert len((tmp_path / FILE).read_text().splitlines()) == COUNT


def test_stop_ends_it_at_the_next_look(tmp_path: Path) -> None:
    stop = Stop()

    def answer(job: Job) -> Outcome:
        stop.reason = "SIGINT" if job.key == 4 else None
        return Outcome(job, score_of(job.allocation))

    asked(Log(tmp_path, PRINTS), answer, stop)
    assert len((tmp_path / FILE).read_text().splitlines()) == 5


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_tail_is_cut_off_and_said(tmp_path: Path, full: Log, cut: int) -> None:
    path = tmp_path / FILE
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    log = Log(tmp_path, PRINTS)
    assert "torn record" in str(log.repaired)
    assert path.read_bytes() == content[: content[:-1].rindex(b"\n") + 1]
    *_, last = cells(COST, SHARES)
    assert [job.allocation for job in asked(log).submitted] == [last.allocation]
    assert path.read_bytes() == content
    assert Log(tmp_path, PRINTS).repaired is None


def test_damage_in_the_middle_is_refused(tmp_path: Path, full: Log) -> None:
    lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
    (tmp_path / FILE).write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(RankfrontError, match="record 2 is damaged"):
        Log(tmp_path, PRINTS)


@pytest.mark.parametrize("changed", ["search", "factors"])
def test_scores_of_another_preparation_are_kept_apart(tmp_path: Path, full: Log, changed: str) -> None:
    other = {**PRINTS, changed: "x" * 64}
    assert len(asked(Log(tmp_path, other)).submitted) == COUNT
    assert asked(Log(tmp_path, other)).submitted == []
    assert asked(Log(tmp_path, PRINTS)).submitted == []


def test_what_failed_is_asked_again_and_mended(tmp_path: Path) -> None:
    name = TARGETS[4].name
    asked(Log(tmp_path, PRINTS), failing(name))
    log = Log(tmp_path, PRINTS)
    questions = Questions(COST, SHARES, log)
    assert questions.failed == len(SHARES)
    assert [cell.target.name for _, cell in questions.open if cell] == [name] * len(SHARES)
    asked(log)
    assert Questions(COST, SHARES, Log(tmp_path, PRINTS)).open == []


# -- the table --------------------------------------------------------------------------------


def test_what_was_lost_with_its_replica_is_not_broken(tmp_path: Path) -> None:
    """Nor is what was kept before that was told apart."""
    name, log = TARGETS[4].name, Log(tmp_path, PRINTS)
    keys = {cell.key for cell in cells(COST, SHARES) if cell.target.name == name}

    def losing(job: Job) -> Outcome:
        return dataclasses.replace(failing(name)(job), lost=True)

    for answer, broken in ((losing, False), (failing(name), True)):
        asked(log, answer)
        for kept in (log, Log(tmp_path, PRINTS)):
            assert {kept.broken(key) for key in keys} == {broken}
    file = tmp_path / FILE
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        del record["lost"]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert not any(Log(tmp_path, PRINTS).broken(key) for key in keys)


def test_rows_hold_the_closed_forms(full: Log) -> None:
    table = table_of(full)
    assert [(row.target, row.share) for row in table.rows] == [(t, s) for s in SHARES for t in TARGETS]
    for row in table.rows:
        target, rank = row.target, row.rank
        m, n, k = target.rows, target.cols, target.full_rank
        assert rank == max(r for r in range(1, k + 1) if r * (m + n - r) <= row.share * m * n)
        assert row.stored == rank * (m + n - rank)
        alone = Allocation.of({target.name: rank}, TARGETS)
        assert row.increase == pytest.approx(loss(alone) - DENSE_NLL, abs=1e-12)
        assert row.per_million == pytest.approx((loss(alone) - DENSE_NLL) * 1e6 / (m * n - row.stored))
        energy = energy_of(target)
        assert row.energy_kept == pytest.approx(sum(energy[:rank]) / sum(energy))
        assert sum(energy[: row.rank_99]) >= 0.99 * sum(energy) > sum(energy[: row.rank_99 - 1])
        predicted = pytest.approx(sum(energy[rank:]) / 10) if target in TARGETS[:6] else None
        assert row.predicted == predicted


def test_the_parquet_is_the_table(full: Log) -> None:
    table = table_of(full)
    read = pq.read_table(io.BytesIO(sensitivity_parquet(table)))
    assert float(read.schema.metadata[b"dense_nll"]) == DENSE_NLL
    lines = read.to_pylist()
    assert len(lines) == len(table.rows)
    for line, row in zip(lines, table.rows, strict=True):
        assert (line["target"], line["block"], line["module"]) == (
            row.target.name,
            row.target.block,
            row.target.module,
        )
        assert (line["share"], line["rank"], line["stored_parameters"]) == (row.share, row.rank, row.stored)
        assert line["nll_increase"] == row.increase
        assert line["nll"] == pytest.approx(DENSE_NLL + row.increase, abs=1e-12)
        assert line["nll_stderr"] == 0.01
        assert line["reasoning.acc"] == 0.6
        assert (line["predicted_increase"], line["energy_kept"]) == (row.predicted, row.energy_kept)
        assert line["rank_99_share"] == line["rank_99"] / row.target.full_rank
        assert line["reason"] is None


def test_the_screen_lists_the_ends_and_the_means(full: Log) -> None:
    """Losses of the made-up model rise with the number of the target; q_proj is half of the others."""
    table = table_of(full)
    assert table.middle == 0.75, "of two shares the larger"
    costs = [row.per_million for row in table.by_cost]
    assert costs == sorted(costs)
    assert len(costs) == len(TARGETS)
    assert table.least == table.by_cost[:10]
    assert table.most == [table.by_cost[11], table.by_cost[10]], "no target is in both"
    listed = target_cells(table.by_cost[:2])
    assert [line[0] for line in listed.rows] == [row.target.name for row in table.by_cost[:2]]
    assert listed.rows[0][3] == f"{table.by_cost[0].increase:+.3g}"
    means = module_cells(table)
    assert [line[0] for line in means.rows] == ["q_proj", "up_proj", "down_proj"]
    for line in means.rows:
        own = [r for r in table.rows if r.target.module == line[0]]
        for index, share in enumerate(SHARES, start=2):
            mean = np.mean([r.increase for r in own if r.share == share])
            assert line[index] == f"{mean:+.3g}"
    sentence, energy = found(table)
    assert table.by_cost[0].target.name in sentence
    assert table.by_cost[-1].target.name in sentence
    assert "99% of the energy" in energy


# -- maps -------------------------------------------------------------------------------------


def cells_of(values: Any, table: Sensitivity) -> dict[str, float | None]:
    """An array (modules, blocks) by target."""
    modules = list(dict.fromkeys(target.module for target in table.targets))
    return {t.name: values[modules.index(t.module)][t.block] for t in table.targets}


def test_maps_show_the_values_of_the_table(full: Log) -> None:
    table = table_of(full)
    *increases, energy = heat_maps(table)
    for share, heat in zip(SHARES, increases, strict=True):
        expected = {row.target.name: row.increase for row in table.at(share)}
        [drawn] = figure(heat).data
        assert cells_of(drawn.customdata, table) == expected
        # The colour axis is asinh of thousandths of a nat.
        back = np.sinh(np.array(drawn.z, dtype=float)) / 1000
        assert cells_of(back, table) == pytest.approx(expected)
        assert (drawn.zmin, drawn.zmax) == (increases[0].span[0], increases[0].span[1]), "one scale"
        assert drawn.zmax >= np.max(drawn.z)
        ticks = dict(zip(drawn.colorbar.ticktext, drawn.colorbar.tickvals, strict=True))
        assert ticks["+0.1"] == pytest.approx(math.asinh(100))
    [drawn] = figure(energy).data
    assert cells_of(drawn.z, table) == {row.target.name: row.rank_99_share for row in table.at(SHARES[0])}


def test_a_failed_score_is_a_row_with_its_reason_and_a_gap_in_the_map(tmp_path: Path) -> None:
    name = TARGETS[4].name
    log = Log(tmp_path, PRINTS)
    asked(log, failing(name))
    table = table_of(log)
    bad = [row for row in table.rows if row.target.name == name]
    assert [(row.increase, row.score) for row in bad] == [(None, None)] * len(SHARES)
    lines = pq.read_table(io.BytesIO(sensitivity_parquet(table))).to_pylist()
    [first, *_] = [line for line in lines if line["target"] == name]
    assert (first["nll"], first["nll_increase"]) == (None, None)
    assert "nll is nan" in first["reason"]
    for heat in heat_maps(table)[:-1]:
        [drawn] = figure(heat).data
        empty = {target for target, value in cells_of(drawn.z, table).items() if value is None}
        assert empty == {name}
        assert "nll is nan" in cells_of(drawn.text, table)[name]
    assert name not in {row.target.name for row in table.by_cost}
    means = {line[0]: line[2] for line in module_cells(table).rows}
    assert means[TARGETS[4].module].endswith("(3 scored)")
    assert "scored" not in means[TARGETS[5].module]
    assert "nll is nan" in sensitivity_html(table)


def test_pictures_can_be_drawn_of_whatever_there_is(tmp_path: Path, full: Log) -> None:
    nothing = Log(tmp_path / "other", PRINTS) if (tmp_path / "other").mkdir() is None else full
    nothing.add(DENSE, None, score_of(DENSE), None)
    for log in (full, nothing):
        table = table_of(log)
        pixels = imread(io.BytesIO(heat_png(table, heat_maps(table))))
        assert pixels.shape[1] == 1600
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
        assert "<h2>" in sensitivity_html(table)


def test_the_page_loads_nothing_and_names_are_text(full: Log) -> None:
    evil = "<script>alert('x')</script>"
    page = sensitivity_html(table_of(full, model=f"org/{evil}", study=evil, facts={evil: evil}))
    assert evil not in page
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page) == []
