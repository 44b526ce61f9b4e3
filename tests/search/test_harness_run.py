"""lm-evaluation-harness on the trials of a tiny study, by a worker in this process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from tiny_study import MACHINE, Tiny
from typer.testing import CliRunner

import search.harness_run
from actors.harness_results import HarnessScore, HarnessSpec
from actors.reasoning import pack, score_task
from actors.refined import RefinedFactors
from actors.scoring import Scorer
from actors.tasks import TASKS
from actors.types import RankfrontError, ReplicaSpec, ScoringError, ShortOfMemoryError
from search.cli import app
from search.evaluations import Evaluations
from search.event_log import LOG
from search.folder import StudyFolder
from search.harness_run import ask, questions
from search.journal import driver_lock
from search.opening import Session
from search.runner import Stop

COUNT = 8


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_harness_task(tmp_path_factory.mktemp("tasks"), COUNT)


@pytest.fixture(autouse=True)
def here(study: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study is opened and its worker started without Ray."""

    @contextlib.contextmanager
    def reopened(folder: StudyFolder, console: Any) -> Iterator[Session]:
        with driver_lock(folder.path):
            yield Session(folder, MACHINE, console.print)

    monkeypatch.setattr(search.harness_run, "reopened", reopened)
    monkeypatch.setattr(search.harness_run, "refiner", study.refiner)


def evaluate(study: Tiny, tasks: Path, *arguments: str) -> str:
    """What the command printed.

    Raises:
        RankfrontError: as the command does.
    """
    usual = ["evaluate", str(study.folder.path), "--tasks", "tiny_piqa", "--include-path", str(tasks)]
    result = CliRunner().invoke(app, [*usual, *arguments])
    if isinstance(result.exception, RankfrontError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def by_hand(study: Tiny, number: int, refined: Path | None, count: int) -> tuple[float, float | None]:
    """`acc` and `acc_norm` by rankfront's own scoring of the same questions."""
    folder = study.folder
    scorer = Scorer(ReplicaSpec("r", folder.config.preparation(), folder.prepared, 1, "cpu"))
    if refined is not None:
        scorer.trial_model.use(RefinedFactors(refined))
    scorer.trial_model.install(study.row(number).allocation, 10**9)
    examples = [TASKS["piqa"].ask(row) for row in tiny.piqa_rows(COUNT)][:count]
    score = score_task(scorer.model, pack("piqa", True, examples, scorer.tokenizer))
    return score.acc, score.acc_norm


def test_trials_and_their_variants_are_asked_once_and_kept_beside_the_study(study: Tiny, tasks: Path) -> None:
    refined = study.refine()
    before = study.folder.open_study().rows()
    study.asked.clear()
    out = evaluate(study, tasks)
    assert study.asked == [("tiny_piqa", None), ("tiny_piqa", None), ("tiny_piqa", refined.path.name)]
    events = [json.loads(line) for line in (study.folder.path / LOG).read_text().splitlines()]
    assert [(event["event"], event.get("command")) for event in events[-2:]] == [
        ("started", "evaluate"),
        ("stopped", None),
    ]
    found = {(e.trial, e.variant): e.score for e in Evaluations(study.folder.path, before).harness}
    expected = {(0, "factors"): None, (1, "factors"): None, (1, refined.variant): refined.path}
    assert found.keys() == expected.keys()
    for (number, variant), path in expected.items():
        metrics = {metric.metric: metric for metric in found[number, variant].metrics}
        acc = metrics["acc"]
        assert (acc.value, metrics["acc_norm"].value) == by_hand(study, number, path, COUNT)
        assert acc.examples == COUNT
        assert acc.stderr == pytest.approx((acc.value * (1 - acc.value) / (COUNT - 1)) ** 0.5)
        assert f"{acc.value:.4f}±{acc.stderr:.4f}" in out
    assert study.folder.open_study().rows() == before
    assert len(evaluate(study, tasks).splitlines()) >= 10
    assert len(study.asked) == 3, "what is there is not asked again"
    evaluate(study, tasks, "--trial", "1", "--variant", "factors", "--limit", "3")
    assert study.asked[3:] == [("tiny_piqa", None)]
    again = evaluate(study, tasks, "--trial", "1", "--variant", "factors")
    assert len(study.asked) == 4
    counts = {line.split()[-1] for line in again.splitlines() if " factors " in line}
    assert counts == {str(COUNT)}, "the answer to what is asked now, not to the few examples of before"


def test_the_report_and_the_table_show_the_answers(study: Tiny, tasks: Path) -> None:
    evaluate(study, tasks, "--trial", "1", "--limit", "4")
    (row,) = pq.read_table(study.folder.path / "evaluations.parquet").to_pylist()
    acc, acc_norm = by_hand(study, 1, None, 4)
    assert (row["trial"], row["variant"], row["split"]) == (1, "factors", "lm_eval")
    assert (row["lm_eval.tiny_piqa.acc"], row["lm_eval.tiny_piqa.acc_norm"]) == (acc, acc_norm)
    assert row["lm_eval.tiny_piqa.acc_stderr"] == pytest.approx((acc * (1 - acc) / 3) ** 0.5)
    assert row["nll"] is None
    page = (study.folder.path / "report.html").read_text()
    assert "<h2>lm-evaluation-harness</h2>" in page
    assert "tiny_piqa" in page


class Answering:
    """A worker that answers after `stop`, or not at all."""

    def __init__(self, stop: Stop, broken: int, error: RankfrontError) -> None:
        self.stop, self.broken, self.error, self.asked = stop, broken, error, 0

    def ask(self, allocation: Any, file: str | None, spec: HarnessSpec, task: str) -> HarnessScore:
        self.asked += 1
        if self.asked == self.broken:
            raise self.error
        if self.asked == 3:
            self.stop.reason = "SIGINT"
        return HarnessScore(task, (), 0.5)


@pytest.mark.parametrize("kind", [ScoringError, ShortOfMemoryError])
def test_a_stopped_run_keeps_its_answers_and_where_there_is_none_it_goes_on(
    study: Tiny, kind: type[RankfrontError]
) -> None:
    spec = HarnessSpec(("a", "b"), None, 1, None)
    prints = {"a": "f1", "b": "f2"}
    rows = list(study.folder.open_study().rows())
    stop, said = Stop(), io.StringIO()
    worker: Any = Answering(stop, 2, kind("made-up reason"))
    queue = questions(study.folder, rows, (), prints, pytest.fail)
    ask(study.folder, queue, spec, worker, stop, lambda line: print(line, file=said), lambda progress: None)
    assert worker.asked == 3
    assert said.getvalue() == "trial 0, factors, has no score on b: made-up reason\n"
    left = [(q.row.number, q.task) for q in questions(study.folder, rows, (), prints, pytest.fail)]
    assert left == [(0, "b"), (1, "b")]


def test_a_variant_whose_file_is_gone_is_passed_over_unless_it_is_named(study: Tiny, tasks: Path) -> None:
    refined = study.refine()
    refined.path.unlink()
    study.asked.clear()
    with pytest.raises(RankfrontError, match=f"--variant {refined.variant}: its file in .* is gone"):
        evaluate(study, tasks, "--variant", refined.variant)
    assert study.asked == []
    out = " ".join(evaluate(study, tasks).split())
    assert f"trial 1, {refined.variant}, is passed over: its file in {refined.path.parent} is gone" in out
    assert study.asked == [("tiny_piqa", None)] * 2


def test_what_cannot_be_asked_is_said(study: Tiny, tasks: Path) -> None:
    with pytest.raises(RankfrontError, match="--variant refined-0: no such trial has it; they have factors"):
        evaluate(study, tasks, "--variant", "refined-0")
    with pytest.raises(RankfrontError, match="--trial 7: no finished trial"):
        evaluate(study, tasks, "--trial", "7")
    with pytest.raises(RankfrontError, match="--tasks names no task"):
        evaluate(study, tasks, "--tasks", " , ")
    with pytest.raises(RankfrontError, match="--variant is for --tasks"):
        CliRunner().invoke(
            app, ["evaluate", str(study.folder.path), "--variant", "x"], catch_exceptions=False
        )
    assert study.asked == []
