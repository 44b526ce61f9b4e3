"""Seconds and bytes to decompose targets of Llama-7B's shapes, from moments of random data.

    python benchmarks/factor_scale.py [--device auto] [--shape 11008 4096] [--threads 2]

On a CPU the one target of `--shape`; on a GPU all seven of a block. Weights and moments are random, which
costs the same arithmetic as real ones.
"""

from __future__ import annotations

import argparse
import time

import torch
from _common import PeakMemory, machine, table

from actors.decompose import decompose
from actors.moments import Moments, Spread
from actors.planning import ITEMSIZE

HIDDEN, INNER, BLOCKS = 4096, 11008, 32
BLOCK = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
METHODS = ("weight", "feature", "curvature")


def random_moments(rows: int, cols: int, device: str) -> Moments:
    """Positive definite moments of the smaller side with eigenvalues over four orders of magnitude."""
    width = min(rows, cols)
    scale = torch.logspace(0, -4, width, dtype=torch.float64, device=device)

    def moment() -> torch.Tensor:
        mixed = torch.randn(width, width, device=device) * scale.sqrt().float()
        product = (mixed @ mixed.T).double()
        product.diagonal().add_(1e-4)
        return product

    mean = torch.randn(cols, dtype=torch.float64, device=device)
    side = "output" if rows <= cols else "input"
    own = mean if side == "input" else torch.randn(rows, dtype=torch.float64, device=device)

    def spread() -> Spread:
        return Spread(own, moment(), 65_536)

    return Moments(mean, 65_536, side, spread(), moment(), spread())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", type=int, nargs=2, default=[INNER, HIDDEN])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = BLOCK if device == "cuda" else {"one target": tuple(arguments.shape)}
    if device == "cuda":
        torch.linalg.eigh(torch.eye(64, dtype=torch.float64, device=device))  # load the solver once
    rows = []
    for name, (m, n) in shapes.items():
        matrix = torch.randn(m, n, device=device) / n**0.5
        moments = random_moments(m, n, device)
        for method in METHODS:
            seconds, work, error = _measure(name, matrix, moments, method, device)
            rows.append([name, f"{m} x {n}", method, f"{seconds:.1f}", _mb(work), f"{error:.0e}"])
    name = torch.cuda.get_device_name() if device == "cuda" else f"{arguments.threads} threads"
    print("# What decomposing a target of Llama-7B costs\n")
    print(f"`python benchmarks/factor_scale.py --device {device}`\n")
    head = ("target", "shape", "method", "seconds", "working memory, MB", "full rank against W, float32")
    print(table(head, rows))
    print(
        "\nBytes, from the shapes: moments in float64, factors as stored (left, right, energy, loss, bias).\n"
    )
    print(table(("target", "shape", "moments, MB", "factors fp32, MB", "factors bf16, MB"), _sizes()))
    print(f"\n{machine()}; {name}")


def _measure(
    name: str, matrix: torch.Tensor, moments: Moments, method: str, device: str
) -> tuple[float, int, float]:
    """Seconds, bytes beyond weight and moments, and the relative error of the float32 factors' product."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
    with PeakMemory() as peak:
        start = time.perf_counter()
        factors = decompose(name, matrix, moments, method, "mean")
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    work = torch.cuda.max_memory_allocated() - before if device == "cuda" else peak.bytes
    product = factors.left.float() @ factors.right.float()
    return seconds, work, ((product - matrix).norm() / matrix.norm()).item()


def _sizes() -> list[list[str]]:
    lines, total = [], [0, 0, 0]
    for name, (m, n) in BLOCK.items():
        rank = min(m, n)
        small = (2 * rank) * 8 + (m + rank) * 4
        values = [2 * rank * rank * ITEMSIZE, rank * (m + n) * 4 + small, rank * (m + n) * 2 + small]
        total = [a + b for a, b in zip(total, values, strict=True)]
        lines.append([name, f"{m} x {n}", *map(_mb, values)])
    lines.append(["a block", "", *map(_mb, total)])
    lines.append([f"{BLOCKS} blocks", "", *(_mb(BLOCKS * value) for value in total)])
    return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    main()
