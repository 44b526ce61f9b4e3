"""Weights with their calibration: hand-made and drawn by hypothesis, and numpy's measures of what is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.decompose import METHODS, Factors, damping, decompose
from actors.moments import Moments, Spread

Floats = NDArray[np.float64]
SHAPES = [(7, 7), (12, 5), (5, 12), (1, 6), (6, 1)]
METHOD_NAMES = [*METHODS]
BIASES = ["mean", "none"]


@dataclass(frozen=True)
class Case:
    """A weight (m, n), the inputs (tokens, n) it is calibrated on and the gradients (tokens, m) there."""

    weight: Floats
    inputs: Floats
    gradients: Floats

    @property
    def full_rank(self) -> int:
        return min(self.weight.shape)

    @property
    def sides(self) -> list[str]:
        """The sides calibration may keep: the outputs only where they are the smaller side."""
        rows, cols = self.weight.shape
        return ["input"] if cols <= rows else ["input", "output"]

    def moments(self, side: str = "input") -> Moments:
        """The spread over all tokens of the side asked for, and what `curvature` needs of the smaller one."""
        rows = self.inputs if side == "input" else self.inputs @ self.weight.T
        small = self.inputs @ self.weight.T if self.weight.shape[0] <= self.weight.shape[1] else self.inputs
        gradient = torch.from_numpy(self.back.T @ self.back / len(rows))
        mean = torch.from_numpy(self.inputs.mean(0))
        alike = np.full(len(rows), 1 / len(rows))
        return Moments(mean, len(rows), side, spread(rows, alike), gradient, spread(small, self.weights))

    @property
    def weights(self) -> Floats:
        """A token's share of all gradient norms of the smaller side."""
        norms = np.linalg.norm(self.back, axis=1)
        return norms / norms.sum() if norms.sum() > 0 else norms

    @property
    def back(self) -> Floats:
        """Gradients of the smaller side, one row per token: g, or W^T g where W is tall."""
        rows, cols = self.weight.shape
        return self.gradients if rows <= cols else self.gradients @ self.weight

    def decompose(self, method: str = "feature", bias: str = "mean", side: str = "input") -> Factors:
        return decompose("target", torch.from_numpy(self.weight), self.moments(side), method, bias)

    def reading(self, bias: str) -> Floats:
        """Inputs as the method weighs them: centred where a mean bias takes the mean."""
        return self.inputs - self.inputs.mean(0) if bias == "mean" else self.inputs

    def weighted(self, bias: str) -> Floats:
        """Inputs as `curvature` weighs them, one row per token: by the norms of their gradients."""
        centre = self.weights @ self.inputs if bias == "mean" else 0
        return np.sqrt(self.weights)[:, None] * (self.inputs - centre)

    def error(self, approximation: Floats, bias: str) -> float:
        """Mean over the tokens of |(W - W_r) x|^2."""
        return float((((self.weight - approximation) @ self.reading(bias).T) ** 2).sum() / len(self.inputs))

    def loss(self, approximation: Floats, bias: str) -> float:
        """1/2 tr(G D S_g D^T), undamped: half the mean of (g . D x)^2 over all pairs of a gradient and an
        input, the inputs weighted by their own gradients."""
        crossed = self.gradients @ (self.weight - approximation) @ self.weighted(bias).T
        return float((crossed**2).sum() / 2 / len(self.inputs))

    def roots(self, bias: str) -> tuple[Floats, Floats]:
        """P (., m) and Q (., n) of the metric |P D Q^T|^2 that `curvature` minimises: P^T P is G and Q^T Q is
        S_g, the one of the smaller side damped."""
        rows, cols = self.weight.shape
        left = self.gradients / np.sqrt(len(self.gradients))
        right = self.weighted(bias)
        if rows <= cols:
            return numpy_root(damped(left.T @ left)), right
        return left, numpy_root(damped(right.T @ right))

    def metric(self, approximation: Floats, bias: str) -> float:
        left, right = self.roots(bias)
        return float(((left @ (self.weight - approximation) @ right.T) ** 2).sum())


def spread(rows: Floats, shares: Floats) -> Spread:
    """Mean and covariance of weighted rows; the shares sum to one, or all are zero."""
    mean = shares @ rows
    covariance = (rows - mean).T @ ((rows - mean) * shares[:, None])
    return Spread(torch.from_numpy(mean), torch.from_numpy(covariance), shares.sum())


def damped(moment: Floats) -> Floats:
    values = torch.from_numpy(np.linalg.eigvalsh(moment)).clamp_min(0)
    return moment + damping(values) * np.eye(len(moment))


def numpy_root(moment: Floats) -> Floats:
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def best_errors(whitened: Floats, ranks: int) -> Floats:
    """Least squared error of each rank 0..ranks of a matrix: the singular values it discards."""
    squares = np.linalg.svd(whitened, compute_uv=False)[:ranks] ** 2
    squares = np.concatenate((squares, np.zeros(ranks - len(squares))))
    return np.concatenate((squares[::-1].cumsum()[::-1], [0]))


def random_case(seed: int, rows: int, cols: int, tokens: int = 60) -> Case:
    chance = np.random.default_rng(seed)
    mixing = chance.normal(size=(cols, cols)) * np.logspace(0, -1.5, cols)
    inputs = chance.normal(size=(tokens, cols)) @ mixing + 2 * chance.normal(size=cols)
    mixing = chance.normal(size=(rows, rows)) * np.logspace(0, -1.5, rows)
    return Case(chance.normal(size=(rows, cols)), inputs, chance.normal(size=(tokens, rows)) @ mixing)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape; one token, constant or zero features, gradients that vanish, deficient weights."""
    rows, cols, tokens = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 30))
    case = random_case(draw(st.integers(0, 2**16)), rows, cols, tokens)
    weight, inputs, gradients = case.weight.copy(), case.inputs.copy(), case.gradients.copy()
    kind = draw(st.sampled_from(["plain", "low rank", "constant", "zero rows", "zero", "repeated", "thin"]))
    if kind == "low rank":
        inputs = inputs[:, :1] * np.ones(cols)
    elif kind == "constant":
        inputs[:, :: draw(st.integers(1, 3))] = draw(st.sampled_from([0.0, 1.0, -100.0]))
    elif kind == "zero rows":
        weight[:: draw(st.integers(1, 3))] = 0
    elif kind == "zero":
        weight[:] = 0
    elif kind == "repeated":
        weight[-1], weight[:, -1] = weight[0], weight[:, 0]
    elif kind == "thin":
        weight = weight[:, :1] @ weight[:1]
    gradients[:, :: draw(st.integers(1, 3))] *= draw(st.sampled_from([0.0, 1e-4, 1.0]))
    return Case(weight * draw(st.sampled_from([1e-6, 1.0, 1e4])), inputs, gradients)


def at_rank(factors: Factors, rank: int) -> Floats:
    return (factors.left[:, :rank] @ factors.right[:rank]).numpy()


def relative_difference(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300))


def product_in_single_precision(factors: Factors) -> Floats:
    """The product of factors rounded to float32, as a store keeps them."""
    return factors.left.float().double().numpy() @ factors.right.float().double().numpy()
