"""Token-weighted loss of a causal language model over windows of text."""

from __future__ import annotations

import math

import torch
from torch import nn

from actors.types import ScoringError, TextScore

Tensor = torch.Tensor

_IGNORED = -100
# Rows of logits whose log-softmax is taken at once: bounds the float32 copy (rows x vocabulary).
_LOSS_ROWS = 256


@torch.inference_mode()
def score_text(model: nn.Module, windows: Tensor, batch_tokens: int, name: str) -> TextScore:
    """Summed loss in nats over `windows` (windows, window); each window predicts window - 1 tokens.

    Numerator: every token but the first of each window, given the tokens before it in the window.
    Exclusions: none. The standard error of nats/token is over windows, which are equally long.

    Raises:
        ScoringError: a non-finite loss, naming the windows.
    """
    device = next(model.parameters()).device
    rows = max(1, batch_tokens // windows.shape[1])
    per_window = []
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows].to(device)
        logits = model(batch, use_cache=False).logits
        nats = _window_nats(logits, batch)
        if not torch.isfinite(nats).all():
            raise ScoringError(f"{name}: non-finite loss in windows {start}..{start + len(batch) - 1}")
        per_window.append(nats.cpu())
    nats = torch.cat(per_window)
    predicted = windows.shape[1] - 1
    spread = (nats / predicted).std().item() / math.sqrt(len(nats)) if len(nats) > 1 else 0.0
    return TextScore(name=name, nats=nats.sum().item(), tokens=len(nats) * predicted, stderr=spread)


def _window_nats(logits: Tensor, batch: Tensor) -> Tensor:
    """Summed loss of each window: logits (b, w, vocabulary), batch (b, w) -> (b,) float64."""
    labels = torch.full_like(batch, _IGNORED)
    labels[:, :-1] = batch[:, 1:]
    pairs = zip(logits.flatten(0, 1).split(_LOSS_ROWS), labels.flatten().split(_LOSS_ROWS), strict=True)
    losses = [
        nn.functional.cross_entropy(rows.float(), wanted, ignore_index=_IGNORED, reduction="none")
        for rows, wanted in pairs
    ]
    return torch.cat(losses).view(batch.shape).double().sum(1)
