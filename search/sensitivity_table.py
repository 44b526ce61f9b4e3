"""What targets lose alone: the rows of `sensitivity.parquet`, and what a person reads off them first.

Loss is nats/token on the search split. Every allocation and the dense model read the same tokens, so an
increase is known better than the standard errors of its two losses say, which are all a score holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from actors.types import Score, TargetSpec
from search.alone import Cell, Log
from search.cells import Cells
from search.cost import CostModel
from search.findings import percent
from search.spectra import Spectra, energy_kept, rank_of_energy, truncation_loss
from search.tables import finite, parquet, score_values

ENERGY = 0.99
"""The share of a spectrum's energy that tells how many ranks a target uses."""

ENERGY_NOTE = "99% energy at: share of full rank that keeps 99% of the energy of the spectrum"

LISTED = 10
"""Targets in each list."""

FIELDS = (
    ("target", pa.string()),
    ("block", pa.int64()),
    ("module", pa.string()),
    ("rows", pa.int64()),
    ("cols", pa.int64()),
    ("parameters", pa.int64()),
    ("method", pa.string()),
    ("share", pa.float64()),
    ("rank", pa.int64()),
    ("stored_parameters", pa.int64()),
    ("nll_increase", pa.float64()),
    ("predicted_increase", pa.float64()),
    ("energy_kept", pa.float64()),
    ("rank_99", pa.int64()),
    ("rank_99_share", pa.float64()),
    ("seconds", pa.float64()),
    ("replica", pa.string()),
    ("reason", pa.string()),
)


@dataclass(frozen=True)
class Row:
    """A target at a share of its own parameters, all others dense.

    `stored` counts its parameters at `rank`; `increase` is the loss over the dense model's and `predicted`
    what the factor store says of it, both in nats/token; `rank_99` keeps 99% of the energy. Without a score
    there is a reason.
    """

    target: TargetSpec
    method: str
    share: float
    rank: int | None
    stored: int
    score: Score | None
    reason: str | None
    increase: float | None
    predicted: float | None
    energy_kept: float
    rank_99: int

    @property
    def rank_99_share(self) -> float:
        return self.rank_99 / self.target.full_rank

    @property
    def saved(self) -> int:
        """Parameters saved; none or fewer where even rank 1 stores as much as the dense target."""
        return self.target.parameters - self.stored

    @property
    def per_million(self) -> float | None:
        """Loss increase per million parameters saved, nats/token."""
        return self.increase / self.saved * 1e6 if self.increase is not None and self.saved > 0 else None


@dataclass(frozen=True)
class Sensitivity:
    """All that a report shows of targets alone. Every target has a row for each share, in order."""

    study: str
    model: str
    shares: tuple[float, ...]
    dense: Score
    rows: tuple[Row, ...]
    facts: Mapping[str, str]

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        return tuple(dict.fromkeys(row.target for row in self.rows))

    def at(self, share: float) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.share == share)

    @property
    def middle(self) -> float:
        """The share that targets are compared at where one is enough: the median, the larger of two."""
        return sorted(self.shares, reverse=True)[(len(self.shares) - 1) // 2]

    @property
    def by_cost(self) -> list[Row]:
        """The scored rows of the middle share that save anything, by rising loss per parameter saved."""
        found = [row for row in self.at(self.middle) if row.per_million is not None]
        return sorted(found, key=lambda row: row.per_million or 0.0)

    @property
    def least(self) -> list[Row]:
        """The rows that lose least per parameter saved, the least first."""
        return self.by_cost[:LISTED]

    @property
    def most(self) -> list[Row]:
        """Those that lose most, the most first; none that is among the least."""
        return self.by_cost[LISTED:][::-1][:LISTED]


def rows(
    cells: Iterable[Cell],
    dense: Score,
    log: Log,
    cost: CostModel,
    method_of: Callable[[str], str],
    energies: Spectra,
    losses: Spectra,
) -> Iterator[Row]:
    """One row for each cell, scored or not."""
    for cell in cells:
        target, record = cell.target, log.get(cell.key)
        method = method_of(target.name)
        energy = energies[target.name][method]
        predicted = losses.get(target.name, {}).get(method)
        score = record.score if record else None
        yield Row(
            target=target,
            method=method,
            share=cell.share,
            rank=cell.rank,
            stored=target.parameters if cell.rank is None else cost.compressed(target, cell.rank),
            score=score,
            reason=record.reason if record else "not scored yet",
            increase=score.text.nll - dense.text.nll if score else None,
            predicted=None if predicted is None else truncation_loss(predicted, cell.rank),
            energy_kept=energy_kept(energy, cell.rank),
            rank_99=rank_of_energy(energy, ENERGY),
        )


def sensitivity_parquet(table: Sensitivity) -> bytes:
    """One row per target and share: FIELDS, then every metric of its score as in `evaluations.parquet`.

    `nll_stderr` is the standard error of that loss, not of the increase. The schema metadata holds the
    dense model's `dense_nll` and `dense_nll_stderr`, nats/token.
    """
    text = table.dense.text
    metadata = {"dense_nll": repr(text.nll), "dense_nll_stderr": repr(text.stderr)}
    identity = {"study": table.study, "model": table.model}
    return parquet(list(map(_record, table.rows)), FIELDS, ("nll", "nll_stderr"), {**identity, **metadata})


def _record(row: Row) -> dict[str, Any]:
    target, score = row.target, row.score
    return {
        "target": target.name,
        **{key: getattr(target, key) for key in ("block", "module", "rows", "cols", "parameters")},
        **{
            key: getattr(row, key)
            for key in ("method", "share", "rank", "reason", "rank_99", "rank_99_share")
        },
        "stored_parameters": row.stored,
        "nll_increase": finite(row.increase),
        "predicted_increase": finite(row.predicted),
        "energy_kept": row.energy_kept,
        "seconds": score.seconds if score else None,
        "replica": score.replica if score else None,
        **(score_values(score) if score else {}),
    }


def found(table: Sensitivity) -> list[str]:
    """The sentences above everything else."""
    told = []
    if table.by_cost:
        least, most = table.by_cost[0], table.by_cost[-1]
        told.append(
            f"Cut alone to {percent(table.middle)} of its parameters, {least.target.name} loses least per "
            f"parameter saved ({_nats(least.increase)} nats/token), {most.target.name} most "
            f"({_nats(most.increase)})."
        )
    shares = {module: _mean(row.rank_99_share for row in rows) for module, rows in _by_module(table)}
    low, high = min(shares, key=lambda m: shares[m]), max(shares, key=lambda m: shares[m])
    told.append(
        f"{percent(ENERGY)} of the energy takes {percent(shares[low])} of full rank in {low} (mean over the "
        f"blocks), {percent(shares[high])} in {high}."
    )
    return told


def target_cells(listed: Iterable[Row]) -> Cells:
    """Targets as text: what each loses, in all and per million parameters saved."""
    listed = tuple(listed)
    predicted = any(row.predicted is not None for row in listed)
    columns = ["target", "rank", "saved", "Δ nats/token", "Δ per million"]
    columns += ["predicted Δ"] if predicted else []
    columns += ["99% energy at"]
    lines = []
    for row in listed:
        line = [row.target.name, str(row.rank or "dense"), f"{row.saved:,}"]
        line += [_nats(row.increase), _nats(row.per_million)]
        line += [_nats(row.predicted)] if predicted else []
        lines.append((*line, percent(row.rank_99_share)))
    return Cells(tuple(columns), tuple(lines), ENERGY_NOTE)


def module_cells(table: Sensitivity) -> Cells:
    """Means over the targets of each module type that have a score; says how many where some have none."""
    columns = ["module", "targets", *(f"Δ at {percent(share)}" for share in table.shares)]
    lines = []
    for module, rows in _by_module(table):
        means = [_mean_of([row.increase for row in rows if row.share == share]) for share in table.shares]
        count = len({row.target for row in rows})
        share = _mean(row.rank_99_share for row in rows)
        lines.append((module, str(count), *means, percent(share)))
    note = "Δ: nats/token over dense, at a share of the target's own parameters; means over blocks"
    return Cells((*columns, "99% energy at"), tuple(lines), note)


def _by_module(table: Sensitivity) -> Iterator[tuple[str, list[Row]]]:
    for module in dict.fromkeys(target.module for target in table.targets):
        yield module, [row for row in table.rows if row.target.module == module]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _mean_of(values: list[float | None]) -> str:
    known = sum(value is not None for value in values)
    return _nats(_mean(values)) + (f" ({known} scored)" if 0 < known < len(values) else "")


def _nats(value: float | None) -> str:
    """Signed, in three digits that count: losses of targets alone span five orders of magnitude."""
    return "" if value is None or math.isnan(value) else f"{value:+.3g}"
