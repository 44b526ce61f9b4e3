"""Perplexity against transformers' own loss, one window at a time."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from actors.models import load_model
from actors.perplexity import score_text
from actors.types import ModelSource, ScoringError


def losses(folder: Path, ids: torch.Tensor) -> list[float]:
    """Mean loss of every window in nats/token, as transformers computes it from labels, in float64."""
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return [plain(window[None], labels=window[None]).loss.item() for window in ids]


@pytest.mark.parametrize("batch_tokens", [1, 100, 1024])
def test_the_loss_is_that_of_transformers(batch_tokens: int, llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    expected = losses(llama, ids)
    found = score_text(model, ids, batch_tokens, "text@32")
    assert found.name == "text@32"
    assert found.tokens == len(ids) * (ids.shape[1] - 1)
    assert found.nats == pytest.approx(sum(expected) * (ids.shape[1] - 1), rel=1e-5)
    assert found.nll == pytest.approx(np.mean(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert found.stderr == pytest.approx(np.std(expected, ddof=1) / math.sqrt(len(ids)), rel=1e-4)


def test_a_single_window_has_no_spread(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    found = score_text(model, ids[:1], 1024, "text@32")
    assert found.stderr == 0
    assert found.nll == pytest.approx(losses(llama, ids[:1])[0], rel=1e-5)


class Uniform(nn.Module):
    """Knows nothing: every token of `size` is as likely, so its perplexity is `size`."""

    def __init__(
        self, size: int, wrong_from: int | None = None, wrong: Any = ((-1, -2, 3), torch.nan)
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.size, self.wrong_from, self.wrong, self.calls = size, wrong_from, wrong, 0

    def forward(self, ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.full((*ids.shape, self.size), 7.0)
        if self.wrong_from is not None and self.calls >= self.wrong_from:
            place, value = self.wrong
            logits[place] = value
        self.calls += 1
        return SimpleNamespace(logits=logits)


def test_ignorance_has_the_perplexity_of_the_vocabulary() -> None:
    found = score_text(Uniform(97), torch.arange(90).view(9, 10), 20, "text")
    assert found.perplexity == pytest.approx(97, rel=1e-6)
    assert found.tokens == 81
    assert found.stderr == pytest.approx(0, abs=1e-7)


def test_one_bad_value_fails_the_score_and_names_the_windows() -> None:
    with pytest.raises(ScoringError, match=r"text: non-finite loss in windows 4\.\.5"):
        score_text(Uniform(97, wrong_from=2), torch.arange(90).view(9, 10), 20, "text")


def test_weights_that_are_no_numbers_fail_the_score(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    layer = r"first in model\.layers\.1\.mlp\.up_proj$"
    with pytest.raises(ScoringError, match=rf"text@32: non-finite loss in windows 0\.\.23, {layer}"):
        score_text(model, ids, 1024, "text@32")


def test_one_bad_logit_fails_the_score_though_no_loss_reads_it() -> None:
    """The last position of a window predicts nothing, and a token of no chance costs no other token."""
    for place, value in (((-1, -1, 3), torch.nan), ((-1, 0, 3), -torch.inf)):
        model = Uniform(97, wrong_from=2, wrong=(place, value))
        with pytest.raises(
            ScoringError, match=r"text: non-finite logits in windows 4\.\.5, though the output"
        ):
            score_text(model, torch.arange(90).view(9, 10), 20, "text")
