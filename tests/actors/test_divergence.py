"""Divergence from the dense model against the full-vocabulary formula in float64 numpy."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, rel_entr
from transformers import LlamaForCausalLM

from actors.divergence import dense_top, divergence, log_buckets
from actors.models import load_model
from actors.perplexity import kl_score, score_text, window_losses
from actors.samples import unpack_floats
from actors.types import ModelSource, ScoringError

VOCABULARY = 384


def logits_of(folder: Path, ids: torch.Tensor, scale: float = 1.0) -> np.ndarray:
    """Logits (windows, window, vocabulary) of the plain model in float64, its MLPs scaled."""
    plain = scaled(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), scale)
    with torch.no_grad():
        return plain(ids).logits.numpy()


def scaled(model: LlamaForCausalLM, scale: float) -> LlamaForCausalLM:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def reference(dense: np.ndarray, trial: np.ndarray, k: int) -> np.ndarray:
    """Per window, over k tokens and the tail as a sum of probabilities: dense, trial (b, w, v) -> (b,)."""
    p, q = (np.exp(log_softmax(logits, axis=-1)) for logits in (dense, trial))
    order = np.argsort(-p, axis=-1, kind="stable")
    p, q = (np.take_along_axis(probability, order, -1) for probability in (p, q))
    kept = rel_entr(p[..., :k], q[..., :k]).sum(-1)
    tail = rel_entr(p[..., k:].sum(-1), q[..., k:].sum(-1)) if k < p.shape[-1] else 0.0
    return (kept + tail)[:, :-1].sum(-1)


@pytest.mark.parametrize("k", [1, 16, VOCABULARY, 10 * VOCABULARY])
@pytest.mark.parametrize("batch_tokens", [1, 100, 1024])
def test_it_is_that_of_numpy(k: int, batch_tokens: int, llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    top = dense_top(model, ids, 1024, k, "text@32")
    assert top.top_k == min(k, VOCABULARY)
    losses = window_losses(scaled(model, 1.2), ids, batch_tokens, "text@32", top)
    expected = reference(logits_of(llama, ids), logits_of(llama, ids, 1.2), k)
    assert expected.min() > 0.01
    np.testing.assert_allclose(losses.kl.numpy(), expected, rtol=1e-4)
    score = kl_score(losses.kl, 31, top.top_k)
    assert score.mean == pytest.approx(expected.mean() / 31, rel=1e-4)
    assert score.stderr == pytest.approx(np.std(expected / 31, ddof=1) / np.sqrt(len(ids)), rel=1e-3)
    assert unpack_floats(score.windows) == pytest.approx(expected / 31, rel=1e-4)
    assert (score.tokens, score.top_k) == (31 * len(ids), top.top_k)


def test_overlapping_windows_count_what_their_loss_counts(llama: Path, ids: torch.Tensor) -> None:
    """The last `scored` positions of each window that predict a token of it."""
    model = load_model(llama, ModelSource(str(llama)))
    top = dense_top(model, ids, 1024, 16, "text@32/8")
    scored = torch.tensor([31] + [8] * (len(ids) - 1))
    found = window_losses(scaled(model, 1.2), ids, 100, "text@32/8", top, scored).kl
    dense, trial = logits_of(llama, ids), logits_of(llama, ids, 1.2)
    last = reference(dense[:, -9:], trial[:, -9:], 16)
    expected = [reference(dense[:1], trial[:1], 16)[0], *last[1:]]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    score = kl_score(found, scored, 16)
    assert score.mean == pytest.approx(np.sum(expected) / scored.sum().item(), rel=1e-4)


def test_more_tokens_show_more_of_it(llama: Path, ids: torch.Tensor) -> None:
    """Merging tokens into the tail hides divergence and never makes any."""
    model = load_model(llama, ModelSource(str(llama)))
    tops = [dense_top(model, ids, 1024, k, "text@32") for k in (1, 4, 32, VOCABULARY)]
    scaled(model, 0.8)
    found = [window_losses(model, ids, 1024, "text@32", top).kl for top in tops]
    for fewer, more in pairwise(found):
        assert (fewer < more).all()


def test_the_dense_model_does_not_diverge_from_itself(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    for k in (8, VOCABULARY):
        top = dense_top(model, ids, 100, k, "text@32")
        assert window_losses(model, ids, 100, "text@32", top).kl.tolist() == [0.0] * len(ids)


def test_asking_for_it_changes_no_loss(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    top = dense_top(model, ids, 100, 8, "text@32")
    with_it = window_losses(model, ids, 100, "text@32", top)
    without = window_losses(model, ids, 100, "text@32")
    assert without.kl is None
    assert with_it.nats.tolist() == without.nats.tolist()
    assert with_it.nats.sum().item() == score_text(model, ids, 100, "text@32").nats


LOGITS = hnp.arrays(np.float32, (2, 3, 12), elements=st.floats(-60, 60, width=32))


@settings(max_examples=200)
@given(LOGITS, st.integers(1, 12), st.floats(0, 1e-3))
def test_it_is_never_below_zero(logits: np.ndarray, k: int, near: float) -> None:
    """Whatever is rounded: also where trial and dense are almost, or exactly, the same."""
    dense = torch.from_numpy(logits[0])
    ids = dense.topk(k, dim=1).indices
    for trial in (torch.from_numpy(logits[1]), dense + near * torch.from_numpy(logits[1]), dense + 1):
        found = divergence(log_buckets(dense, ids), log_buckets(trial, ids))
        assert found.dtype == torch.float64
        assert (found >= 0).all()
        log_p, log_q = (log_softmax(x.double().numpy(), axis=-1) for x in (dense, trial))
        # float32 logits of up to 60 carry 4e-6 of rounding each: it counts by the largest |log q|
        rounding = 1e-5 * (1 + np.abs(log_q).max(-1))
        assert (found.numpy() <= rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1) + rounding).all()


def test_a_tail_of_almost_nothing_keeps_its_digits() -> None:
    """Its probability, 2 e^-30, is far below what is left of 1 - sum in float32."""
    logits = torch.tensor([[0.0, -30.0, -30.0]])
    found = log_buckets(logits, torch.tensor([[0]]))
    assert found[0, 1].item() == pytest.approx(np.log(2) - 30, rel=1e-6)


def test_memory_is_what_is_stated(llama: Path, ids: torch.Tensor) -> None:
    top = dense_top(load_model(llama, ModelSource(str(llama))), ids, 1024, 7, "text@32")
    assert top.bytes == ids.numel() * (8 * 7 + 4)


def test_a_dense_model_of_no_numbers_is_named(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    model.get_submodule("model.norm").weight.fill_(torch.nan)
    where = r"windows 0\.\.2, first in model\.norm$"
    with pytest.raises(ScoringError, match=f"text@32: non-finite logits of the dense model in {where}"):
        dense_top(model, ids, 100, 8, "text@32")


def test_a_trial_of_no_numbers_fails(llama: Path, ids: torch.Tensor) -> None:
    model = load_model(llama, ModelSource(str(llama)))
    top = dense_top(model, ids, 100, 8, "text@32")
    logs = top.logs.clone()
    logs[4, 3, 0] = torch.nan
    broken = type(top)(top.ids, logs)
    with pytest.raises(ScoringError, match=r"text@32: non-finite divergence .* in windows 3\.\.5"):
        window_losses(model, ids, 100, "text@32", broken)
