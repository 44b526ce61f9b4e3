"""What a study found, as files for programs: `trials.parquet`, `evaluations.parquet`, `front.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.types import SPLITS, Allocation, Score
from search.allocations import method_list
from search.records import Evaluation, HarnessEvaluation, Key, StudySummary, TrialRow

TRIALS = "trials.parquet"

INTEGERS = ("tokens", "forward_tokens")
_INTEGER_COLUMNS = {*INTEGERS, *(f"{split}.{name}" for split in SPLITS for name in INTEGERS)}
ALWAYS = ("nll", "nll_stderr", "reasoning.acc", "reasoning.acc_stderr", *INTEGERS)
"""Score columns that are there even when nothing was scored, so that readers need no special case."""

TRIAL_FIELDS = (
    ("number", pa.int64()),
    ("state", pa.string()),
    ("origin", pa.string()),
    ("copied_from", pa.int64()),
    ("stopped_by", pa.int64()),
    ("feasible", pa.bool_()),
    ("reason", pa.string()),
    ("budget_linear", pa.float64()),
    ("budget_model", pa.float64()),
    ("budget_bytes", pa.float64()),
    ("macs", pa.int64()),
    ("seconds", pa.float64()),
    ("replica", pa.string()),
    ("ranks", pa.list_(pa.int32())),
    ("methods", pa.list_(pa.string())),
)
OF_RANKS = ("budget_linear", "budget_model", "budget_bytes", "macs", "ranks", "methods")
"""Those that follow from a trial's ranks."""
EVALUATION_FIELDS = (
    ("trial", pa.int64()),
    ("variant", pa.string()),
    ("split", pa.string()),
    ("fingerprint", pa.string()),
    ("seconds", pa.float64()),
    ("replica", pa.string()),
)


def score_values(score: Score) -> dict[str, float | int | None]:
    """Every metric of a score with its standard error (`<name>_stderr`) and the tokens behind it.

    Whatever is not finite (the standard error of a single example, say) is None.
    """
    errors = {f"{name}_stderr": value for name, value in score.stderrs.items()}
    values = {**score.metrics, "reasoning.acc_stderr": math.nan, **errors}
    floats = {name: finite(value) for name, value in values.items()}
    return {**floats, "tokens": score.text.tokens, "forward_tokens": score.forward_tokens}


def kept_trials(folder: Path) -> int:
    """How many trials the table in a folder lists; 0 where there is none that can be read."""
    try:
        return int(pq.read_metadata(folder / TRIALS).num_rows)
    except (OSError, pa.ArrowInvalid):
        return 0


def trials_parquet(summary: StudySummary) -> bytes:
    """One row per trial; `value.<objective>` as told to the study, scores as `<split>.<metric>`.

    `constraint.<metric>` is the recorded violation, feasible at 0 or below.

    `ranks` and `methods` follow the targets named in the schema metadata (`targets`, JSON). A null rank is
    dense; a null method is the configured one. `macs` are those of a token at the metadata's `macs_length`.
    Ranks, and what follows from them, are null for a trial that another program gave none of this space.
    """
    targets = target_names(summary.rows)
    rows = [_trial(row, summary) for row in summary.rows]
    objectives = [objective.name for objective in summary.objectives]
    scored = [f"search.{name}" for name in (*ALWAYS, *(o for o in objectives if not o.startswith("budget.")))]
    metadata = {
        "targets": json.dumps(targets),
        "macs_length": json.dumps(summary.macs_length),
        **_identity(summary),
    }
    told = [*(f"value.{name}" for name in objectives)]
    told += [f"constraint.{constraint.metric}" for constraint in summary.constraints]
    fields = [*TRIAL_FIELDS, *((name, pa.float64()) for name in told)]
    return parquet(rows, fields, scored, metadata)


def evaluations_parquet(summary: StudySummary) -> bytes:
    """One row per evaluation, its key and its metrics (unprefixed: `split` is a column here).

    Those of lm-evaluation-harness are `lm_eval.<task>.<metric>`, in rows of the split `lm_eval`.
    """
    rows = [_evaluation(evaluation) for evaluation in summary.evaluations]
    rows += [_harness_evaluation(evaluation) for evaluation in summary.harness]
    return parquet(rows, EVALUATION_FIELDS, ALWAYS, _identity(summary))


def front_json(summary: StudySummary) -> str:
    """The front with everything needed to rebuild its members, as strict JSON."""
    by_number = {row.number: row for row in summary.rows}
    document = {
        "study": summary.study,
        "model": summary.model,
        "objectives": [{"name": o.name, "minimize": o.minimize} for o in summary.objectives],
        "constraints": {each.metric: each.bound for each in summary.constraints},
        "reference": [finite(value) for value in summary.reference],
        "hypervolume": finite(summary.hypervolume),
        "macs_length": summary.macs_length,
        "facts": dict(summary.facts),
        "front": [_member(by_number[number], summary) for number in summary.front],
    }
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def target_names(rows: Iterable[TrialRow]) -> list[str]:
    """Names of the targets, in the order every allocation has.

    Raises:
        ValueError: a trial whose allocation names other targets, or in another order.
    """
    names: list[str] | None = None
    for row in rows:
        found = [name for name, _ in row.allocation]
        if names is not None and found != names:
            raise ValueError(f"trial {row.number}: its targets differ from those of the trials before it")
        names = found
    return names or []


def finite(value: float | None) -> float | None:
    """`value`, or None where it is no finite number."""
    return value if value is not None and math.isfinite(value) else None


def _identity(summary: StudySummary) -> dict[str, str]:
    return {"study": summary.study, "model": summary.model}


def _ranks(allocation: Allocation) -> list[int | None]:
    return [rank for _, rank in allocation]


def _trial(row: TrialRow, summary: StudySummary) -> dict[str, Any]:
    allocated = {"ranks": _ranks(row.allocation), "methods": method_list(row.allocation)}
    record: dict[str, Any] = {name: getattr(row, name) for name, _ in TRIAL_FIELDS if name not in allocated}
    record.update(allocated)
    if not row.ranked:
        record.update(dict.fromkeys(OF_RANKS))
    if row.values is not None:
        named = zip(summary.objectives, row.values, strict=True)
        record.update({f"value.{objective.name}": value for objective, value in named})
    record.update({f"constraint.{name}": violation for name, violation in row.constraints.items()})
    if row.score is not None:
        record.update({f"{row.score.split}.{k}": v for k, v in score_values(row.score).items()})
    return record


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **_key(evaluation.key),
        "seconds": evaluation.score.seconds,
        "replica": evaluation.score.replica,
        **score_values(evaluation.score),
    }


def _harness_evaluation(evaluation: HarnessEvaluation) -> dict[str, Any]:
    metrics: dict[str, float | None] = {}
    for metric in evaluation.score.metrics:
        metrics |= {metric.name: finite(metric.value), f"{metric.name}_stderr": metric.stderr}
    return {**_key(evaluation.key), "seconds": evaluation.score.seconds, **metrics}


def _key(key: Key) -> dict[str, Any]:
    return dict(zip(("trial", "variant", "split", "fingerprint"), key, strict=True))


def _member(row: TrialRow, summary: StudySummary) -> dict[str, Any]:
    test = summary.test_score(row.number)
    objectives = [objective.name for objective in summary.objectives]
    return {
        "trial": row.number,
        "origin": row.origin,
        "budget_linear": row.budget_linear,
        "budget_model": row.budget_model,
        "budget_bytes": row.budget_bytes,
        "macs": row.macs,
        "values": dict(zip(objectives, row.values, strict=True)) if row.values is not None else None,
        "search": score_values(row.score) if row.score is not None else None,
        "test": score_values(test) if test is not None else None,
        "ranks": row.allocation.to_dict(),
        "methods": dict(row.allocation.methods),
    }


def parquet(
    rows: Sequence[Mapping[str, Any]],
    fields: Iterable[tuple[str, pa.DataType]],
    scored: Iterable[str],
    metadata: Mapping[str, str],
) -> bytes:
    """A table; `fields` and `scored` are always columns, other scores follow in the order they are met."""
    types = dict(fields)
    for name in [*scored, *(name for row in rows for name in row)]:
        types.setdefault(name, pa.int64() if name in _INTEGER_COLUMNS else pa.float64())
    schema = pa.schema(list(types.items()), metadata=dict(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), sink)
    return bytes(sink.getvalue())
