"""What a target holds at a rank, in exact integers: the search counts by this rule, the export stores by it.

A rank-r target of shape (m, n), with m bias values on top where its layer had a bias or the factors bring
one (`bias: mean`):

    form       weights           indices
    dense      m n               0          the product W_r = A_r B_r itself
    factored   r (m + n)         0          A_r (m, r) and B_r (r, n)
    pivoted    r (m + n - r)     m          r rows of W_r and the coefficients of the others (actors.pivoting)

Weights and biases have the model's precision; indices are int32, and count as bytes but not as parameters.
Standard library only: both sides import it.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.types import TargetSpec

DENSE, FACTORED, PIVOTED = "dense", "factored", "pivoted"
# Of forms of equal bytes the first is stored: one product beats two, and two beat two and a gather.
FORMS = (DENSE, FACTORED, PIVOTED)
AUTO = "auto"

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a parameter by the name of its precision."""
INDEX_BYTES = 4


@dataclass(frozen=True)
class Stored:
    """A stored layer: its form, its parameters (weights and bias) and its bytes (indices included).

    `macs` are the multiply-accumulates of a token: one for each weight, whichever the form.
    """

    form: str
    parameters: int
    bytes: int
    macs: int


def in_form(form: str, rows: int, cols: int, rank: int, bias: bool, itemsize: int) -> Stored:
    """A (rows, cols) layer of that rank stored in one form."""
    weights = {
        DENSE: rows * cols,
        FACTORED: rank * (rows + cols),
        PIVOTED: rank * (rows + cols - rank),
    }[form]
    parameters = weights + (rows if bias else 0)
    indices = rows * INDEX_BYTES if form == PIVOTED else 0
    return Stored(form, parameters, parameters * itemsize + indices, weights)


def stored_layer(storage: str, rows: int, cols: int, rank: int, bias: bool, itemsize: int) -> Stored:
    """A layer as `storage` stores it: in the form it names, or for `auto` in the form of fewest bytes."""
    forms = FORMS if storage == AUTO else (storage,)
    return min(
        (in_form(form, rows, cols, rank, bias, itemsize) for form in forms), key=lambda found: found.bytes
    )


def stored_target(storage: str, target: TargetSpec, rank: int | None, bias: str, itemsize: int) -> Stored:
    """A target at a rank, with the factors' bias rule (`mean` or `none`); None is the dense layer itself."""
    if rank is None:
        return in_form(DENSE, target.rows, target.cols, target.full_rank, target.bias, itemsize)
    has_bias = target.bias or bias == "mean"
    return stored_layer(storage, target.rows, target.cols, rank, has_bias, itemsize)
