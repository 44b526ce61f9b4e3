"""Strong pivoting: a low-rank matrix as a few of its own rows and small coefficients of the others.

W_r = P [I; C] R: R (r, n) are pivot rows of W_r (m, n) and C (m - r, r) writes the other rows in them
(PIFA, arXiv 2501.19090). Any r independent rows will do in exact arithmetic. Stored in few bits, an error
in R reaches the other rows multiplied by C, so the pivots are chosen for small coefficients: those of
column-pivoted QR, and from there maxvol's swaps (Goreinov, Oseledets, Savostyanov, Tyrtyshnikov,
Zamarashkin: "How to find a good submatrix", 2010).
"""

from __future__ import annotations

import scipy.linalg
import torch

Tensor = torch.Tensor

# Largest |coefficient| that is left alone. Rows that maximise the volume exist with none above 1; a swap
# raises the volume by the coefficient it removes, so a bound above 1 is reached. On the factors of
# SmolLM2-135M QR alone leaves 0.9..1.5, and 0 to 5 swaps to this bound take up to 15% off the error of the
# product in bfloat16 (0.7..4 times that of the factored product).
COEFFICIENT_BOUND = 1.05
# A swap passes over C twice (0.1 s at m = 11008, r = 2000); what no such number of swaps mends is kept as
# it is: correct, if less exact in few bits.
MAX_SWAPS = 1000


def pivot(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivot rows R (r, n), coefficients C (m - r, r) and order (m,) of left^T right, in float64.

    left is A_r^T (r, m) and right B_r (r, n): A_r B_r = [R; C R][order]. C is that of A_r's rows, which
    differ from those of W_r by B_r alone. Where A_r has a lower rank q < r, only q of the pivots have
    coefficients other than zero. Costs 2 r^2 (m - r/3) operations of QR, half of them bound by memory, and
    r^2 (m - r) of a triangular solve: 18 and 37 s in two runs at m = 11008, r = 2000 on two shared cores.
    """
    left, right = left.double().cpu(), right.double().cpu()
    rank, rows = left.shape
    coordinates, permutation = _coordinates(left)
    coefficients, places = _bounded(coordinates, rank)
    permutation = permutation[places]
    missing = rank - coordinates.shape[0]
    order = torch.empty(rows, dtype=torch.int32)
    order[permutation] = torch.arange(rows, dtype=torch.int32)
    pivots = left[:, permutation[:rank]].T @ right
    return pivots, torch.nn.functional.pad(coefficients, (0, missing)), order


def _coordinates(left: Tensor) -> tuple[Tensor, Tensor]:
    """A basis-free picture of A_r's rows: T (q, m), unit upper trapezoidal, and the row of each column (m,).

    Coefficients depend on the span of A_r's columns only, so these are scaled first: a column of small
    energy is not taken for rounding. Column-pivoted QR of A_r^T then brings independent rows to the front
    and tells the rank q; divided by the diagonal, |T| <= 1 up to rounding.
    """
    largest = left.abs().amax(dim=1, keepdim=True)
    scaled = left / torch.where(largest > 0, largest, 1.0)
    triangle, order = scipy.linalg.qr(scaled.numpy(), mode="r", pivoting=True)
    triangle = torch.from_numpy(triangle)
    diagonal = triangle.diagonal()
    rounding = max(left.shape) * torch.finfo(torch.float64).eps * diagonal[0].abs()
    full = int((diagonal.abs() > rounding).sum())
    return triangle[:full] / diagonal[:full, None], torch.from_numpy(order.astype("int64"))


def _bounded(coordinates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Coefficients (m - r, q) within the bound, and for each place (m,) the column of T that is there.

    The first q places are pivots; the last m - r are the rows they write. Swapping row i of C with pivot j
    is a rank-1 update (Goreinov et al., section 3); the coefficients are solved for once more at the end,
    so that the updates' rounding does not stay in them.
    """
    full, rows = coordinates.shape
    places = torch.arange(rows)
    if full == 0 or rank == rows:
        return coordinates.new_zeros(rows - rank, full), places
    basis, rest = coordinates[:, :full], coordinates[:, rank:]
    # (m - r, q), contiguous: the updates go row by row
    coefficients = torch.linalg.solve_triangular(basis, rest, upper=True, unitriangular=True).T.contiguous()
    for _ in range(MAX_SWAPS):
        row, column = divmod(int(coefficients.abs().argmax()), full)
        value = coefficients[row, column].item()
        if abs(value) <= COEFFICIENT_BOUND:
            break
        _swap(coefficients, row, column)
        places[[column, rank + row]] = places[[rank + row, column]]
    if bool((places[:full] >= full).any()):
        basis, rest = coordinates[:, places[:full]], coordinates[:, places[rank:]]
        coefficients = torch.linalg.solve(basis, rest).T
    return coefficients, places


def _swap(coefficients: Tensor, row: int, column: int) -> None:
    """Make row `row` a pivot in place of pivot `column`, which becomes that row; C is changed in place."""
    value = coefficients[row, column].item()
    old, change = coefficients[:, column].clone(), coefficients[row].clone()
    change[column] -= 1
    coefficients.addr_(old, change, alpha=-1 / value)
    coefficients[row] = -change / value
    coefficients[row, column] += 1
