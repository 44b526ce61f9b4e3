"""What lm-evaluation-harness says of a study's trials, as a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from actors.harness_results import HarnessMetric
from search.cells import Cells
from search.findings import percent
from search.records import HarnessEvaluation, StudySummary

LEFT = ("task", "metric", "variant")
"""Columns of words."""


def harness_cells(
    summary: StudySummary, numbers: Sequence[int] = (), asked: Collection[str] = ()
) -> Cells | None:
    """Task by task and metric by metric, trials by falling budget (none named: all); None without any.

    Of a task that was asked more than once of the same factors (another limit, say) the answer to one of the
    questions `asked`, by fingerprint, else the latest one.
    """
    kept = {row.number: row.budget_model for row in summary.rows}
    latest: dict[tuple[int, str, str], HarnessEvaluation] = {}
    for evaluation in sorted(summary.harness, key=lambda each: each.fingerprint in asked):
        if not numbers or evaluation.trial in numbers:
            latest[evaluation.trial, evaluation.variant, evaluation.score.asked] = evaluation
    found = [
        (metric.task, metric_name(metric), -kept[trial], trial, variant, metric)
        for (trial, variant, _), evaluation in latest.items()
        for metric in evaluation.score.metrics
    ]
    rows = tuple(
        (task, name, str(trial), variant, percent(-budget), metric_value(metric), metric_examples(metric))
        for task, name, budget, trial, variant, metric in sorted(found, key=lambda each: each[:5])
    )
    if not rows:
        return None
    columns = ("task", "metric", "trial", "variant", "kept", "value", "examples")
    return Cells(columns, rows, "± is one standard error, as lm-evaluation-harness tells it")


def metric_name(metric: HarnessMetric) -> str:
    """With the filter where there is one."""
    return metric.metric + ("" if metric.filter == "none" else f", {metric.filter}")


def metric_value(metric: HarnessMetric) -> str:
    """With its standard error where there is one."""
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f"±{metric.stderr:.4f}")


def metric_examples(metric: HarnessMetric) -> str:
    return "" if metric.examples is None else f"{metric.examples:,}"
