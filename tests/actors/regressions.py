"""Reduced-rank regression by brute force: least squares on the rows themselves, no moments, float64 numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def reduced_rank(
    outputs: Floats,
    inputs: Floats,
    rank: int,
    centred: bool,
    ridge: float = 0.0,
    towards: Floats | None = None,
) -> Floats:
    """W_r (m, n) of least |y - W_r x' - b|^2 over rows y (tokens, m), x' (tokens, n); no b unless `centred`.

    With a `ridge` the fit of any rank has tokens x ridge x |A - `towards`|^2 added to its error, as rows of
    data; the rank is then cut by the SVD of what it predicts.
    """
    if centred:
        outputs, inputs = outputs - outputs.mean(0), inputs - inputs.mean(0)
    rows, wanted = inputs, outputs
    if towards is not None:
        root = np.sqrt(ridge * len(inputs))
        rows = np.vstack([inputs, root * np.eye(inputs.shape[1])])
        wanted = np.vstack([outputs, root * towards.T])
    fitted = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    kept = np.linalg.svd(inputs @ fitted, full_matrices=False)[2][:rank]
    return (fitted @ kept.T @ kept).T


def error(
    outputs: Floats, inputs: Floats, weights: Floats, centred: bool, bias: Floats | None = None
) -> float:
    """Mean over tokens of |y - W_r x' - b|^2: with `bias`, or the best one where `centred`, or none."""
    rest = outputs - inputs @ weights.T - (0 if bias is None else bias)
    if centred and bias is None:
        rest = rest - rest.mean(0)
    return float(np.square(rest).sum(1).mean())
