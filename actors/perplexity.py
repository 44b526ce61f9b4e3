"""Token-weighted loss of a causal language model over windows of text, and divergence from the dense one."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from actors.divergence import LOGIT_ROWS, DenseTop, batches, divergence, forward, log_buckets
from actors.nonfinite import culprit, finite
from actors.relay import passes, upload
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
    if scored is None:
        scored = torch.full((len(windows),), windows.shape[1] - 1)
    nats, kl = [], []
    batched = batches(windows, batch_tokens)
    works = (partial(_batch_losses, model, batch, start, scored, dense) for start, batch in batched)
    with closing(passes(model, works)) as found:
        for (start, batch), (lost, diverged, sound) in zip(batched, found, strict=True):
            done = start + len(batch)
            fault = _fault(lost, diverged, sound)
            if fault is not None:
                first = culprit(model, partial(forward, model, batch))
                raise ScoringError(f"{name}: non-finite {fault} in windows {start}..{done - 1}, {first}")
            nats.append(lost.cpu())
            if diverged is not None:
                kl.append(diverged.cpu())
            if judge is not None and done < len(windows) and judge.due(done):
                sums = {"nll": torch.cat(nats), **({"kl": torch.cat(kl)} if kl else {})}
                if judge.stops({key: (values / scored[:done]).tolist() for key, values in sums.items()}):
                    break
    return WindowLosses(torch.cat(nats), torch.cat(kl) if kl else None)


def _batch_losses(
    model: nn.Module, batch: Tensor, start: int, scored: Tensor, dense: DenseTop | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of windows (b, w), the first of them the `start`-th: their loss (b,) float64, their divergence likewise
    where it is asked for, and whether all logits are numbers; on the device of the logits."""
    logits, kept = forward(model, batch), slice(start, start + len(batch))
    batch, last = (upload(each, logits.device) for each in (batch, scored[kept]))
    nats = _window_nats(logits, batch, last)
    if dense is None:
        return nats, None, finite(logits)
    top = DenseTop(dense.ids[kept], dense.logs[kept])
    return nats, window_divergence(logits, top, last), finite(logits)


def _fault(nats: Tensor, diverged: Tensor | None, sound: Tensor) -> str | None:
    """What of a batch is not a number, None where all is; reads the values back."""
    if not torch.isfinite(nats).all():
        return "loss"
    if not sound:
        return "logits"
    if diverged is not None and not torch.isfinite(diverged).all():
        return "divergence from the dense model"
    return None


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
