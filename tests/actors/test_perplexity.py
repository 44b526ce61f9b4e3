"""Perplexity against transformers' own loss, one window at a time."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaForCausalLM

from actors.models import load_model
from actors.perplexity import score_text, text_score, window_losses
from actors.samples import unpack_floats
from actors.text import ScoredText, windows
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


def rolling(folder: Path, ids: list[int], window: int, stride: int) -> tuple[list[float], list[int]]:
    """Nats and tokens of each window, as the perplexity guide of transformers takes them, in float64."""
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    nats, counts, seen = [], [], 0
    for begin in range(0, len(ids) - window + 1, stride):
        inputs = torch.tensor([ids[begin : begin + window]])
        labels = inputs.clone()
        labels[:, : window - (begin + window - seen)] = -100
        seen = begin + window
        counts.append(int((labels[:, 1:] != -100).sum()))
        with torch.no_grad():
            nats.append(plain(inputs, labels=labels).loss.item() * counts[-1])
    return nats, counts


@pytest.mark.parametrize(("stride", "batch_tokens"), [(8, 1024), (8, 100), (31, 1024), (32, 1024)])
def test_a_stride_scores_each_token_once_with_more_before_it(
    stride: int, batch_tokens: int, llama: Path
) -> None:
    tokenizer, cap = tiny.tiny_tokenizer(), 32 + 15 * stride
    ids = tokenizer.encode("\n\n".join(tiny.documents()), add_special_tokens=False)[:cap]
    text = ScoredText("text", windows(tiny.documents(), "\n\n", tokenizer, 32, cap + 1, stride), stride)
    nats, counts = rolling(llama, ids, 32, stride)
    model = load_model(llama, ModelSource(str(llama)))
    losses = window_losses(model, text.windows, batch_tokens, "text", scored=text.scored)
    found = text_score(losses.nats, text.scored, "text")
    np.testing.assert_allclose(losses.nats.numpy(), nats, rtol=1e-5)
    assert text.scored.tolist() == counts
    assert text.length == cap
    assert found.tokens == (cap - 1 if stride < 32 else 16 * 31)
    assert found.nll == pytest.approx(sum(nats) / sum(counts), rel=1e-5)


@pytest.mark.parametrize("stride", [8, 32])
def test_behind_bos_every_token_of_the_text_is_scored(stride: int, llama: Path) -> None:
    """Against windows made by hand, each what the tokenizer makes of its text unless told not to."""
    tokenizer = tiny.beginning_with_bos()
    ids = tokenizer("\n\n".join(tiny.documents()))["input_ids"][1:]
    cut = windows(tiny.documents(), "\n\n", tokenizer, 32, 32 + 7 * stride, stride)
    text = ScoredText("text", cut, stride)
    model = load_model(llama, ModelSource(str(llama)))
    losses = window_losses(model, text.windows, 1024, "text", scored=text.scored)
    found = text_score(losses.nats, text.scored, "text")
    step, nats, seen = min(stride, 31), [], 0
    for begin in range(0, 8 * step, step):
        end = begin + 31
        inputs = torch.tensor([[tokenizer.bos_token_id, *ids[begin:end]]])
        labels = inputs.clone()
        labels[:, : 32 - (end - seen)] = -100
        nats.append(model(inputs, labels=labels).loss.item() * (end - seen))
        seen = end
    np.testing.assert_allclose(losses.nats.numpy(), nats, rtol=1e-5)
    assert found.tokens == seen


def test_the_standard_error_is_of_the_token_weighted_mean() -> None:
    """Windows of unequally many tokens: that of the ratio, by the textbook's formula; values of that mean."""
    nats, counts = np.array([62.0, 25.0, 18.0, 22.0]), np.array([31, 8, 8, 8])
    found = text_score(torch.tensor(nats), torch.tensor(counts), "text")
    ratio = nats.sum() / counts.sum()
    squares = ((nats - ratio * counts) ** 2).sum() / 3
    assert found.nll == pytest.approx(ratio)
    assert found.stderr == pytest.approx(math.sqrt(squares / 4) / counts.mean())
    assert np.mean(unpack_floats(found.windows)) == pytest.approx(ratio)
    same = text_score(torch.tensor(nats), torch.full((4,), 31), "text")
    assert unpack_floats(same.windows) == pytest.approx(nats / 31)


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
