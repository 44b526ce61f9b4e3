"""Token-weighted loss of a causal language model over windows of text, and divergence from the dense one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from actors.divergence import LOGIT_ROWS, DenseTop, batches, divergence, log_buckets
from actors.nonfinite import all_finite, culprit
from actors.samples import pack_floats
from actors.stages import Judge
from actors.types import KlScore, ScoringError, TextScore

Tensor = torch.Tensor

_IGNORED = -100


@dataclass(frozen=True)
class WindowLosses:
    """Nats summed over the predicted tokens of each window: loss (windows,), divergence too if asked."""

    nats: Tensor
    kl: Tensor | None


def score_text(model: nn.Module, windows: Tensor, batch_tokens: int, name: str) -> TextScore:
    """The loss over `windows` (windows, window), on every token but the first of each.

    Raises:
        ScoringError: non-finite logits or loss, naming the windows and the layer it began in.
    """
    return text_score(window_losses(model, windows, batch_tokens, name).nats, windows.shape[1] - 1, name)


@torch.inference_mode()
def window_losses(
    model: nn.Module,
    windows: Tensor,
    batch_tokens: int,
    name: str,
    dense: DenseTop | None = None,
    scored: Tensor | None = None,
    judge: Judge | None = None,
) -> WindowLosses:
    """Losses of `windows` (windows, window), and their divergence from `dense` where it is given.

    Each window predicts its last `scored` (windows,) tokens, each given all those before it in the window;
    by default window - 1, every one but the first. Exclusions: none. A `judge` may stop it at the end of a
    stage: the losses are then those of the first windows.

    Raises:
        ScoringError: non-finite logits, loss or divergence, naming the windows and the layer it began in.
    """
    device = next(model.parameters()).device
    if scored is None:
        scored = torch.full((len(windows),), windows.shape[1] - 1)
    nats, kl = [], []
    for start, batch in batches(windows, batch_tokens):
        batch = batch.to(device)
        forward = partial(model, batch, use_cache=False)
        logits = forward().logits
        kept = slice(start, start + len(batch))
        last = scored[kept].to(device)
        nats.append(_window_nats(logits, batch, last).cpu())
        where = f"windows {start}..{start + len(batch) - 1}"
        sound = torch.isfinite(nats[-1]).all()
        if not (sound and all_finite(logits)):
            what = "logits" if sound else "loss"
            raise ScoringError(f"{name}: non-finite {what} in {where}, {culprit(model, forward)}")
        if dense is not None:
            kl.append(window_divergence(logits, DenseTop(dense.ids[kept], dense.logs[kept]), last).cpu())
            if not torch.isfinite(kl[-1]).all():
                raise ScoringError(
                    f"{name}: non-finite divergence from the dense model in {where}, "
                    f"{culprit(model, forward)}"
                )
        done = start + len(batch)
        if judge is not None and done < len(windows) and judge.due(done):
            sums = {"nll": torch.cat(nats), **({"kl": torch.cat(kl)} if kl else {})}
            if judge.stops({key: (lost / scored[:done]).tolist() for key, lost in sums.items()}):
                break
    return WindowLosses(torch.cat(nats), torch.cat(kl) if kl else None)


def text_score(nats: Tensor, scored: Tensor | int, name: str) -> TextScore:
    """The score of windows that lost `nats` (windows,) in all, over `scored` tokens (windows,) or each."""
    tokens, values = _per_token(nats, scored)
    return TextScore(
        name=name,
        nats=nats.sum().item(),
        tokens=tokens,
        stderr=_stderr(values),
        windows=pack_floats(values.tolist()),
    )


def kl_score(nats: Tensor, scored: Tensor | int, top_k: int) -> KlScore:
    """The divergence of windows that diverged by `nats` (windows,) in all, over `scored` tokens likewise."""
    tokens, values = _per_token(nats, scored)
    return KlScore(
        top_k=top_k,
        nats=nats.sum().item(),
        tokens=tokens,
        stderr=_stderr(values),
        windows=pack_floats(values.tolist()),
    )


def _per_token(nats: Tensor, scored: Tensor | int) -> tuple[int, Tensor]:
    """Tokens scored in all, and a value of each window in nats/token, (windows,).

    Of equally many tokens each value is nats / tokens. Of unequally many it is that of the linearised ratio
    R = sum nats / sum tokens, namely R + (nats - R tokens) / mean tokens: their mean is R, weighed by tokens,
    and their spread tells its standard error (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    if isinstance(scored, int):
        return len(nats) * scored, nats / scored
    counts = scored.to(nats)
    ratio = nats.sum() / counts.sum()
    return int(scored.sum()), ratio + (nats - ratio * counts) / counts.mean()


def _stderr(values: Tensor) -> float:
    """Standard error of the mean of windows; 0 for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _unscored(window: int, scored: Tensor) -> Tensor:
    """True at positions whose next token is not among the last `scored` (b,) of its window: (b, w)."""
    places = torch.arange(window, device=scored.device)
    return (places < window - 1 - scored[:, None]) | (places == window - 1)


def _window_nats(logits: Tensor, batch: Tensor, scored: Tensor) -> Tensor:
    """Summed loss of each window: logits (b, w, vocabulary), batch (b, w), scored (b,) -> (b,) float64."""
    labels = batch.roll(-1, 1).masked_fill(_unscored(batch.shape[1], scored), _IGNORED)
    pairs = zip(logits.flatten(0, 1).split(LOGIT_ROWS), labels.flatten().split(LOGIT_ROWS), strict=True)
    losses = [
        nn.functional.cross_entropy(rows.float(), wanted, ignore_index=_IGNORED, reduction="none")
        for rows, wanted in pairs
    ]
    return torch.cat(losses).view(batch.shape).double().sum(1)


def window_divergence(logits: Tensor, dense: DenseTop, scored: Tensor) -> Tensor:
    """Divergence summed over the tokens each window predicts: (b, w, vocabulary), (b,) -> (b,) float64."""
    parts = zip(
        logits.flatten(0, 1).split(LOGIT_ROWS),
        dense.ids.flatten(0, 1).split(LOGIT_ROWS),
        dense.logs.flatten(0, 1).split(LOGIT_ROWS),
        strict=True,
    )
    found = [divergence(logs, log_buckets(rows.float(), ids)) for rows, ids, logs in parts]
    values = torch.cat(found).view(logits.shape[:2])
    return values.masked_fill(_unscored(values.shape[1], scored), 0.0).sum(1)
