"""KL divergence to the dense model, from its most likely tokens and one bucket for all others.

For a token with dense probabilities p and a trial's q, over the k tokens the dense model finds most likely
and the tail t of all others (p_t = 1 - sum p_i):

    KL(p || q) = sum_i p_i log(p_i / q_i) + p_t log(p_t / q_t),   nats

Merging the tail never makes it larger (log-sum inequality): it is a lower bound of the divergence over the
whole vocabulary, equal to it at k = vocabulary, and 0 only where all buckets agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from actors.nonfinite import culprit
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
    device = next(model.parameters()).device
    count, window = windows.shape
    ids = logs = torch.empty(0)
    for start, batch in batches(windows, batch_tokens):
        forward = partial(model, batch.to(device), use_cache=False)
        logits = forward().logits
        kept = min(top_k, logits.shape[-1])
        if start == 0:
            ids = torch.empty(count, window, kept, dtype=torch.int32, device=device)
            logs = torch.empty(count, window, kept + 1, dtype=torch.float32, device=device)
        ids_out = ids[start : start + len(batch)].view(-1, kept).split(LOGIT_ROWS)
        logs_out = logs[start : start + len(batch)].view(-1, kept + 1).split(LOGIT_ROWS)
        chunks = logits.flatten(0, 1).split(LOGIT_ROWS)
        for rows, chosen, found in zip(chunks, ids_out, logs_out, strict=True):
            rows = rows.float()
            chosen.copy_(rows.topk(kept, dim=1).indices)
            found.copy_(log_buckets(rows, chosen))
        if not torch.isfinite(logs[start : start + len(batch), :, 0]).all():
            raise ScoringError(
                f"{name}: non-finite logits of the dense model in windows {start}..{start + len(batch) - 1}, "
                f"{culprit(model, forward)}"
            )
    return DenseTop(ids, logs)


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
