"""Token-weighted loss of a causal language model over windows of text, and divergence from the dense one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from actors.divergence import LOGIT_ROWS, DenseTop, batches, divergence, log_buckets
from actors.samples import pack_floats
from actors.types import KlScore, ScoringError, TextScore

Tensor = torch.Tensor

_IGNORED = -100


@dataclass(frozen=True)
class WindowLosses:
    """Nats summed over the predicted tokens of each window: loss (windows,), divergence too if asked."""

    nats: Tensor
    kl: Tensor | None


def score_text(model: nn.Module, windows: Tensor, batch_tokens: int, name: str) -> TextScore:
    """The loss over `windows` (windows, window).

    Raises:
        ScoringError: a non-finite loss, naming the windows.
    """
    return text_score(window_losses(model, windows, batch_tokens, name).nats, windows.shape[1] - 1, name)


@torch.inference_mode()
def window_losses(
    model: nn.Module, windows: Tensor, batch_tokens: int, name: str, dense: DenseTop | None = None
) -> WindowLosses:
    """Losses of `windows` (windows, window), and their divergence from `dense` where it is given.

    Each window predicts window - 1 tokens: every one but its first, given those before it in the window.
    Exclusions: none.

    Raises:
        ScoringError: a non-finite loss or divergence, naming the windows.
    """
    device = next(model.parameters()).device
    nats, kl = [], []
    for start, batch in batches(windows, batch_tokens):
        batch = batch.to(device)
        logits = model(batch, use_cache=False).logits
        nats.append(_window_nats(logits, batch).cpu())
        where = f"windows {start}..{start + len(batch) - 1}"
        if not torch.isfinite(nats[-1]).all():
            raise ScoringError(f"{name}: non-finite loss in {where}")
        if dense is not None:
            kept = slice(start, start + len(batch))
            kl.append(window_divergence(logits, DenseTop(dense.ids[kept], dense.logs[kept])).cpu())
            if not torch.isfinite(kl[-1]).all():
                raise ScoringError(f"{name}: non-finite divergence from the dense model in {where}")
    return WindowLosses(torch.cat(nats), torch.cat(kl) if kl else None)


def text_score(nats: Tensor, predicted: int, name: str) -> TextScore:
    """The score of windows whose `predicted` tokens each lost `nats` (windows,)."""
    return TextScore(
        name=name,
        nats=nats.sum().item(),
        tokens=len(nats) * predicted,
        stderr=_stderr(nats / predicted),
        windows=pack_floats((nats / predicted).tolist()),
    )


def kl_score(nats: Tensor, predicted: int, top_k: int) -> KlScore:
    """The divergence of windows whose `predicted` tokens each diverged by `nats` (windows,)."""
    return KlScore(
        top_k=top_k,
        nats=nats.sum().item(),
        tokens=len(nats) * predicted,
        stderr=_stderr(nats / predicted),
        windows=pack_floats((nats / predicted).tolist()),
    )


def _stderr(values: Tensor) -> float:
    """Standard error of the mean of equally long windows; 0 for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _window_nats(logits: Tensor, batch: Tensor) -> Tensor:
    """Summed loss of each window: logits (b, w, vocabulary), batch (b, w) -> (b,) float64."""
    labels = torch.full_like(batch, _IGNORED)
    labels[:, :-1] = batch[:, 1:]
    pairs = zip(logits.flatten(0, 1).split(LOGIT_ROWS), labels.flatten().split(LOGIT_ROWS), strict=True)
    losses = [
        nn.functional.cross_entropy(rows.float(), wanted, ignore_index=_IGNORED, reduction="none")
        for rows, wanted in pairs
    ]
    return torch.cat(losses).view(batch.shape).double().sum(1)


def window_divergence(logits: Tensor, dense: DenseTop) -> Tensor:
    """Divergence summed over the tokens each window predicts: (b, w, vocabulary) -> (b,) float64."""
    parts = zip(
        logits.flatten(0, 1).split(LOGIT_ROWS),
        dense.ids.flatten(0, 1).split(LOGIT_ROWS),
        dense.logs.flatten(0, 1).split(LOGIT_ROWS),
        strict=True,
    )
    found = [divergence(logs, log_buckets(rows.float(), ids)) for rows, ids, logs in parts]
    return torch.cat(found).view(logits.shape[:2])[:, :-1].sum(1)
