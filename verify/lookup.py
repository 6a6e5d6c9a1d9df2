"""Look float32 values up in tables of proved Taylor boxes, at array speed.

Guarantees |returned - true| ≤ the boxes' proved bound for every value inside the boxes, and NaN outside them, so that
an uncovered value can never pass a check. Must not know what the boxes enclose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from invref.errors import ProofError
from invref.taylor import Boxes
from verify.compiled import compiled

TOLERANCE = 1e-12
"""Proved bound asked of the boxes; what is measured against them is off by no more."""

Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
"""First ordinal, ordinal after the last, centre and coefficients of each box."""

_SLICE = 256
_COEFFICIENTS = 8


@compiled()
def box_of(first: Any, ordinal: int, hint: int) -> int:
    """Index of the box that holds `ordinal`: the last one whose first ordinal is not above it (0 if there is none)."""
    last = first.size - 1
    if first[hint] <= ordinal and (hint == last or ordinal < first[hint + 1]):
        return hint
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) >> 1
        if first[middle] <= ordinal:
            low = middle
        else:
            high = middle - 1
    return low


@compiled()
def evaluate(table: Table, values: Any, out: Any) -> None:
    """Write the boxes' polynomial at each float32 of `values` to `out` (float64); NaN where no box holds the value.

    Fast where neighbours share a box; right for any order.
    """
    first, stop, centre, coefficients = table
    bits = values.view(np.int32)
    ordinals = np.empty(_SLICE, np.int32)
    box = 0
    for start in range(0, values.size, _SLICE):
        n = min(_SLICE, values.size - start)
        for i in range(n):
            pattern = bits[start + i]
            ordinals[i] = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
        low = ordinals[0]
        high = ordinals[0]
        for i in range(n):
            low = min(low, ordinals[i])
            high = max(high, ordinals[i])
        box = box_of(first, low, box)
        inputs, result = values[start : start + n], out[start : start + n]
        if first[box] <= low and high < stop[box]:
            c = coefficients[box]
            if not c[1:].any():
                # Most floats are so large or so small that f' is constant to within the bound.
                result[:] = c[0]
            else:
                at, c0, c1, c2, c3, c4, c5, c6, c7 = centre[box], c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
                for i in range(n):
                    h = inputs[i] - at
                    result[i] = ((((((c7 * h + c6) * h + c5) * h + c4) * h + c3) * h + c2) * h + c1) * h + c0
            continue
        for i in range(n):
            box = box_of(first, ordinals[i], box)
            if first[box] <= ordinals[i] < stop[box]:
                h = inputs[i] - centre[box]
                r = 0.0
                for k in range(_COEFFICIENTS - 1, -1, -1):
                    r = r * h + coefficients[box, k]
                result[i] = r
            else:
                result[i] = np.nan


def table_of(boxes: Boxes, relative: bool = False) -> Table:
    """The arrays of `boxes` that `evaluate` takes; ProofError where the proved bound exceeds `TOLERANCE`.

    `relative` boxes were asked for that tolerance relative to the value, and state their bound absolutely.
    """
    if not (relative or boxes.bound <= TOLERANCE):
        raise ProofError(f"the oracle's bound {boxes.bound:.3e} exceeds {TOLERANCE:.0e}: use more or smaller boxes")
    missing = _COEFFICIENTS - boxes.coefficients.shape[1]
    return boxes.first, boxes.stop, boxes.centre, np.pad(boxes.coefficients, ((0, 0), (0, missing)))


def constant(value: float, first: int, stop: int) -> Table:
    """One box: `value` at the ordinals first ≤ o < stop; none where that is empty."""
    count = int(first < stop)
    coefficients = np.zeros((count, _COEFFICIENTS))
    coefficients[:, 0] = value
    return np.full(count, first), np.full(count, stop), np.zeros(count), coefficients


def joined(tables: Sequence[Table]) -> Table:
    """Tables put side by side, in ascending order; one box that holds nothing where all are empty."""
    filled = [table for table in tables if table[0].size] or [constant(np.nan, 0, 1)]
    first, stop, centre, coefficients = (np.concatenate(arrays) for arrays in zip(*filled, strict=True))
    return first, stop, centre, coefficients


def looked_up(table: Table, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The boxes' polynomial at float32 `values` of shape (n,); NaN where no box holds the value."""
    out = np.empty(values.shape, np.float64)
    evaluate(table, np.ascontiguousarray(values), out)
    return out
