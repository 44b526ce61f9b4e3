"""Any lm-evaluation-harness task on a folder that transformers loads, by the harness itself; and perplexity.

lm-evaluation-harness is an optional dependency (`rankfront[eval]`), imported when it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import actors.modeling_rankfront  # noqa: F401 (registers the model type of an export)
from actors.perplexity import score_text
from actors.replica import quieten
from actors.text import load_documents, windows
from actors.types import RankfrontError, TextScore, TextSource

INSTALL = "lm-evaluation-harness is not installed: pip install 'rankfront[eval]'"


@dataclass(frozen=True)
class HarnessMetric:
    """One metric of one task, by the harness's names; `stderr` is None where the harness has none.

    `filter` is the harness's name for how answers were read (`none`: as they are).
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    examples: int | None


class LoadedFolder:
    """A model folder in memory, ready to be measured: an export, or any that transformers loads.

    Code that a folder brings is not run: exports load by rankfront's own classes.

    Raises:
        RankfrontError: the folder is no such model.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        quieten()
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, SafetensorError) as error:
            raise RankfrontError(f"{folder}: cannot be loaded as a model: {error}") from error
        self.model: Any = model.to(self.device).eval()
        self.model.requires_grad_(False)

    def perplexity(self, text: TextSource, window: int, tokens: int, batch_tokens: int) -> TextScore:
        """The loss over the first `tokens` tokens of a text, as a search scores it.

        Raises:
            RankfrontError: the text cannot be read or is too short, or the window is too long.
            ScoringError: a non-finite loss.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and window > limit:
            raise RankfrontError(f"--window {window}: the model reads {limit} tokens")
        ids = windows(load_documents(text), text.join, self.tokenizer, window, tokens)
        return score_text(self.model, ids, batch_tokens, f"{text.source.rsplit('/', 1)[-1]}@{window}")

    def harness(
        self,
        tasks: Sequence[str],
        limit: int | None = None,
        batch_size: int = 1,
        include_path: Path | None = None,
    ) -> dict[str, Any]:
        """The harness's results, whole, less the record of every single answer.

        Raises:
            RankfrontError: the harness is not installed, or knows no such task.
        """
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RankfrontError(INSTALL) from error
        folder = None if include_path is None else str(include_path)
        # The thousands of the harness's own take long to list: only where the folder has not every name.
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and not all(manager.match_tasks([name]) for name in tasks):
            manager = TaskManager(include_path=folder)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if unknown:
            raise RankfrontError(
                f"--tasks: lm-evaluation-harness has no {', '.join(map(repr, unknown))}; tasks of your own "
                "are YAML files in the folder of --include-path"
            )
        model = HFLM(
            pretrained=self.model, tokenizer=self.tokenizer, device=self.device, batch_size=batch_size
        )
        names = manager.match_tasks(list(tasks))
        found = simple_evaluate(model, tasks=names, limit=limit, task_manager=manager, log_samples=False)
        assert found is not None  # only other ranks of a distributed run get nothing
        return dict(found)


def metrics_of(results: dict[str, Any]) -> list[HarnessMetric]:
    """The metrics in the harness's results, with their standard errors.

    The harness names them `metric,filter` and `metric_stderr,filter`; an error it cannot tell is text.
    """
    found = []
    for task, values in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        for key, value in values.items():
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{how}")
            known = isinstance(error, (int, float)) and math.isfinite(error)
            found.append(
                HarnessMetric(
                    task, metric, how, float(value), error if known else None, counts.get("effective")
                )
            )
    return found
