"""KL divergence to the dense model, from its most likely tokens and one bucket for all others.

For a token with dense probabilities p and a trial's q, over the k tokens the dense model finds most likely
and the tail t of all others (p_t = 1 - sum p_i):

    KL(p || q) = sum_i p_i log(p_i / q_i) + p_t log(p_t / q_t),   nats

Merging the tail never makes it larger (log-sum inequality): it is a lower bound of the divergence over the
whole vocabulary, equal to it at k = vocabulary, and 0 only where all buckets agree.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from actors.nonfinite import culprit
from actors.relay import passes, upload
from actors.types import ScoringError

Tensor = torch.Tensor

# Rows of logits that are worked on at once: bounds float32 copies (rows x vocabulary).
LOGIT_ROWS = 256


@dataclass(frozen=True)
class DenseTop:
    """What is kept of the dense model: `ids` (windows, window, k) int32 of its most likely next tokens, and
    `logs` (windows, window, k + 1) float32, their log-probabilities and that of the tail, in nats."""

    ids: Tensor
    logs: Tensor

    @property
    def bytes(self) -> int:
        return self.ids.nbytes + self.logs.nbytes

    @property
    def top_k(self) -> int:
        return self.ids.shape[2]


@torch.inference_mode()
def dense_top(model: nn.Module, windows: Tensor, batch_tokens: int, top_k: int, name: str) -> DenseTop:
    """One pass of the dense model over `windows` (windows, window); the result stays on its device.

    `top_k` beyond the vocabulary is the whole vocabulary.

    Raises:
        ScoringError: a non-finite logit, naming the windows and the layer it began in.
    """
    ids = logs = torch.empty(0)
    batched = batches(windows, batch_tokens)
    works = (partial(_batch_top, model, batch, top_k) for _, batch in batched)
    with closing(passes(model, works)) as tops:
        for (start, batch), top in zip(batched, tops, strict=True):
            if start == 0:
                ids, logs = (each.new_empty(len(windows), *each.shape[1:]) for each in (top.ids, top.logs))
            kept = slice(start, start + len(batch))
            ids[kept], logs[kept] = top.ids, top.logs
            if not torch.isfinite(top.logs[:, :, 0]).all():
                raise ScoringError(
                    f"{name}: non-finite logits of the dense model in windows {start}..{kept.stop - 1}, "
                    f"{culprit(model, partial(forward, model, batch))}"
                )
    return DenseTop(ids, logs)


def _batch_top(model: nn.Module, batch: Tensor, top_k: int) -> DenseTop:
    """What is kept of windows (b, window)."""
    logits = forward(model, batch)
    kept = min(top_k, logits.shape[-1])
    ids = torch.empty(*batch.shape, kept, dtype=torch.int32, device=logits.device)
    logs = torch.empty(*batch.shape, kept + 1, dtype=torch.float32, device=logits.device)
    chunks = (each.flatten(0, 1).split(LOGIT_ROWS) for each in (logits, ids, logs))
    for rows, chosen, found in zip(*chunks, strict=True):
        rows = rows.float()
        chosen.copy_(rows.topk(kept, dim=1).indices)
        found.copy_(log_buckets(rows, chosen))
    return DenseTop(ids, logs)


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits (b, window, vocabulary) of windows (b, window), on the device of the model's head."""
    device = next(model.parameters()).device
    return model(upload(batch, device), use_cache=False).logits  # type: ignore[no-any-return]


def batches(windows: Tensor, batch_tokens: int) -> list[tuple[int, Tensor]]:
    """Windows in batches of at most `batch_tokens` tokens (but at least one window), each with its first."""
    rows = max(1, batch_tokens // windows.shape[1])
    return [(start, windows[start : start + rows]) for start in range(0, len(windows), rows)]


def log_buckets(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (n, k + 1) under `logits` (n, vocabulary) of the tokens `ids` (n, k) and all others.

    The tail is summed from its own logits: as 1 - sum it would lose all digits where it is small.
    """
    ids = ids.long()
    tail = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, ids), tail], 1).log_softmax(1)


def divergence(dense: Tensor, trial: Tensor) -> Tensor:
    """KL(dense || trial) of each row of log-probabilities (n, buckets): (n,) float64, nats.

    Summed as p log(p / q) - p + q: what is added is zero over buckets that sum to one, and makes every
    term at least 0, so that rounding cannot make a divergence negative. An empty bucket (the tail at
    k = vocabulary) adds nothing.
    """
    log_p, log_q = dense.double(), trial.double()
    p = log_p.exp()
    terms = p * (log_p - log_q) - p + log_q.exp()
    return terms.masked_fill(log_p == -torch.inf, 0.0).clamp(min=0.0).sum(1)
