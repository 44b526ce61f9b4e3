"""Measure a model folder, an export or any other: tasks by lm-evaluation-harness, perplexity by rankfront."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.harness_results import HarnessMetric, HarnessSpec, metrics_of
from actors.types import RankfrontError, TextScore, TextSource
from search.cells import Cells, CellsTable, cells_table
from search.files import write_atomic
from search.findings import error_bar, perplexity
from search.folder import PREPARED
from search.harness_table import metric_examples, metric_value

# Tokens of a batch of windows, as in a search (`scoring.batch_tokens`).
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class FolderEvaluation:
    """What was measured on a folder; `results` are the harness's own, whole."""

    folder: Path
    metrics: tuple[HarnessMetric, ...]
    results: dict[str, Any] | None
    text: TextScore | None

    def tables(self) -> Iterator[CellsTable]:
        """For the terminal; ± is one standard error."""
        if self.text is not None:
            score = self.text
            row = (score.name, f"{score.tokens:,}", f"{score.nll:.4f}{error_bar(score.stderr, 4)}")
            cells = Cells(("text", "tokens", "nats/token", "ppl"), ((*row, perplexity(score.nll)),), "")
            yield cells_table(cells, f"{self.folder}: perplexity", left=("text",))
        if self.metrics:
            rows = tuple(
                (each.task, each.metric, each.filter, metric_value(each), metric_examples(each))
                for each in self.metrics
            )
            columns = ("task", "metric", "filter", "value", "examples")
            cells = Cells(columns, rows, "± is one standard error, as lm-evaluation-harness tells it")
            yield cells_table(cells, f"{self.folder}: tasks", left=columns[:3])

    def write(self, output: Path) -> None:
        """As JSON: the table's metrics, the text's score, and the harness's results as it gives them; into a
        folder that is there (`make_room`)."""
        document = {
            "folder": str(self.folder),
            "text": None if self.text is None else {**asdict(self.text), "nll": self.text.nll},
            "metrics": [asdict(metric) for metric in self.metrics],
            "lm_eval": self.results,
        }
        write_atomic(output, json.dumps(document, indent=1, default=str) + "\n")


def make_room(output: Path) -> None:
    """Make the folder of a file that is written when all is measured, and see that it takes a file.

    Raises:
        RankfrontError: it takes none, or the file is a folder.
    """
    if output.is_dir():
        raise RankfrontError(
            f"--output {output}: a folder; name the JSON file to write, such as {output}.json"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise RankfrontError(
            f"--output {output}: cannot be written: {error.strerror} ({output.parent}); name a file in "
            "a folder that can"
        ) from error


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder that transformers loads, not a study's."""
    return (path / "config.json").is_file() and not (path / PREPARED).exists()


def evaluate_folder(
    folder: Path, harness: HarnessSpec | None, text: TextSource | None, window: int, tokens: int, device: str
) -> FolderEvaluation:
    """Load a folder and measure it in this process, on `device`.

    Raises:
        RankfrontError: nothing was asked, the device is not there or has no room, or the folder, a task or
            the text is not what it must be.
    """
    if text is None and harness is None:
        raise RankfrontError("evaluate: name --tasks a,b or --text SOURCE, or both")
    from actors.devices import device_here, room_on
    from actors.harness import Harness, LoadedFolder

    device = device_here(device)
    asked = None if harness is None else Harness(harness)  # before the long work: it may not know a task
    with room_on(device):
        loaded = LoadedFolder(folder, device)
        score = None if text is None else loaded.perplexity(text, window, tokens, BATCH_TOKENS)
        results = None if asked is None else loaded.harness(asked)
    return FolderEvaluation(folder, tuple(metrics_of(results)) if results else (), results, score)
