"""Any lm-evaluation-harness task on a resident model or a folder, by the harness itself; and perplexity.

lm-evaluation-harness is an optional dependency (`rankfront[eval]`), imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from actors.harness_results import INSTALL, HarnessSpec
from actors.modeling_rankfront import RankfrontForCausalLM  # also registers the model type of an export
from actors.models import context_limit, load_tokenizer, whole_model
from actors.perplexity import score_text
from actors.replica import quieten
from actors.text import between, load_documents, windows
from actors.types import ModelSource, RankfrontError, ScoringError, TextScore, TextSource


class Harness:
    """lm-evaluation-harness with the tasks it is asked for, found among its own and those of a folder.

    A name, a pattern or a group stands for the same tasks as in `lm_eval --include_path`.
    """

    def __init__(self, spec: HarnessSpec) -> None:
        """Raises RankfrontError where the harness is not installed, or knows no such task."""
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RankfrontError(INSTALL) from error
        folder = None if spec.include_path is None else str(spec.include_path)
        # The thousands of the harness's own take long to list, and a single task of the folder has no need of
        # them. A pattern may match them too, and a group of the folder may name them.
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and not {*spec.tasks}.issubset(manager.all_subtasks):
            manager = TaskManager(include_path=folder)
        unknown = [name for name in spec.tasks if not manager.match_tasks([name])]
        if unknown:
            raise RankfrontError(
                f"--tasks: lm-evaluation-harness has no {', '.join(map(repr, unknown))}; tasks of your own "
                "are YAML files in the folder of --include-path"
            )
        self.spec, self._manager = spec, manager
        self._evaluate, self._wrap = simple_evaluate, HFLM

    def results(self, model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
        """Of a model of transformers as it stands on some of the tasks: what the harness returns, less the
        record of every single answer.

        Raises:
            ScoringError: a logit that is not finite; the harness would count it as an answer.
        """
        spec = self.spec
        device, names = str(model.device), self._manager.match_tasks(list(tasks))
        wrapped = self._wrap(pretrained=model, tokenizer=tokenizer, device=device, batch_size=spec.batch_size)
        # An export has the model inside it generate, and does not run itself.
        inner = model.base if isinstance(model, RankfrontForCausalLM) else model
        watched = inner.register_forward_hook(_refuse_non_finite, with_kwargs=True)
        try:
            found = self._evaluate(
                wrapped, tasks=names, limit=spec.limit, task_manager=self._manager, log_samples=False
            )
        finally:
            watched.remove()
        assert found is not None  # only other ranks of a distributed run get nothing
        return dict(found)


def _refuse_non_finite(model: Any, inputs: Any, keywords: Mapping[str, Any], output: Any) -> None:
    """At every position but those that an attention mask (rows, positions) leaves out.

    Where log-likelihoods are asked for there is no mask: rows end in padding that the model reads as text.
    Where text is generated they begin with padding, which has nothing to attend to and may come to anything.
    A mask of another shape does not say where that is: the last position of a row is none of it.
    """
    logits, mask = output.logits, keywords.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        logits, mask = logits[:, -1:], None
    sound = torch.isfinite(logits.sum(-1, dtype=torch.float32))  # (rows, positions)
    if mask is not None:  # a generation may keep the logits of the last positions alone
        sound |= mask[:, -sound.shape[1] :] == 0
    if not sound.all():
        raise ScoringError("lm-evaluation-harness: a logit is not finite")


class LoadedFolder:
    """A model folder in memory on a device that is there, ready to be measured: an export, or any that
    transformers loads.

    Code that a folder brings is not run: exports load by rankfront's own classes.

    Raises:
        RankfrontError: the folder is no such model.
    """

    def __init__(self, folder: Path, device: str) -> None:
        quieten()
        model = whole_model(folder, str(folder), dtype="auto", use_safetensors=True)
        self.tokenizer: Any = load_tokenizer(folder, ModelSource(str(folder)))
        self.model: Any = model.to(device).eval()
        self.model.requires_grad_(False)

    def perplexity(self, text: TextSource, window: int, tokens: int, batch_tokens: int) -> TextScore:
        """The loss over the first `tokens` tokens of a text, as a search scores it.

        Raises:
            RankfrontError: the text cannot be read or is too short, or the window is too long.
            ScoringError: a non-finite loss.
        """
        limit = context_limit(self.model)
        if limit is not None and window > limit:
            raise RankfrontError(f"--window {window}: the model reads {limit} tokens")
        ids = windows(load_documents(text), between(text), self.tokenizer, window, tokens)
        return score_text(self.model, ids, batch_tokens, f"{text.source.rsplit('/', 1)[-1]}@{window}")

    def harness(self, harness: Harness) -> dict[str, Any]:
        """The harness's results on every task it was found for.

        Raises:
            ScoringError: a logit that is not finite.
        """
        return harness.results(self.model, self.tokenizer, harness.spec.tasks)
