"""The truth at array speed: f'(x) and g(y, piece) of float32 values from proved Taylor boxes.

Guarantees |returned - true| ≤ the boxes' proved bound (at most `TOLERANCE`) for every value inside the boxes, and NaN
outside them, so that an uncovered value can never pass a check. Must not know any layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
from flint import arb
from mpmath import isfinite
from numpy.typing import NDArray

from invref import formats, taylor
from invref.engines import ARB, precision
from invref.errors import ProofError
from invref.formats import Format
from invref.formulas import Formula
from invref.kernels.compiled import compiled
from invref.pieces import Piece, pieces, turning_points
from invref.taylor import Boxes

FLOAT32 = formats.get("float32")
BFLOAT16 = formats.get("bfloat16")
TOLERANCE = 1e-12
"""Proved bound asked of the boxes; what is measured against them is off by no more."""

CLEARANCE = 8
"""Pairs (y, s) count for the decoder error from this many ulp above (or below) the turning value on."""

TAIL = 1e-6
"""Where f' stays this near to 0 or 1, there is a tail."""

Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]

_SLICE = 256
_COEFFICIENTS = 8
_BITS = 128


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


def table_of(boxes: Boxes) -> Table:
    """The arrays of `boxes` that `evaluate` takes; ProofError where the proved bound exceeds `TOLERANCE`."""
    if not boxes.bound <= TOLERANCE:
        raise ProofError(f"the oracle's bound {boxes.bound:.3e} exceeds {TOLERANCE:.0e}: use more or smaller boxes")
    missing = _COEFFICIENTS - boxes.coefficients.shape[1]
    return boxes.first, boxes.stop, boxes.centre, np.pad(boxes.coefficients, ((0, 0), (0, missing)))


@dataclass(frozen=True)
class Range:
    """One monotone piece in float32: its inputs are the ordinals first ≤ o < stop.

    y of the ordinals low ≤ o ≤ high count for the decoder error: those at least `CLEARANCE` ulp inside the turning
    values, and all where the piece has no turning point at that end.
    """

    piece: Piece
    first: int
    stop: int
    low: int
    high: int

    @property
    def slope(self) -> float:
        """Sign of f' on the piece."""
        return 1.0 if self.piece.increasing else -1.0


class Oracle:
    """f' and g of one formula on float32 values; its boxes are built when first asked for, and kept."""

    def __init__(self, formula: Formula) -> None:
        self.formula = formula

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """The monotone pieces as ranges of float32 ordinals, from the left; together all finite inputs."""
        cuts = [FLOAT32.first_ordinal, *cuts_of(self.formula, FLOAT32), FLOAT32.largest_ordinal + 1]
        return tuple(
            Range(piece, first, stop, *_counting(piece))
            for piece, first, stop in zip(pieces(self.formula), cuts, cuts[1:], strict=False)
        )

    @cached_property
    def slopes(self) -> Table:
        """Boxes of f' over all finite inputs."""
        first, stop = FLOAT32.first_ordinal, FLOAT32.largest_ordinal + 1
        return table_of(taylor.derivative_boxes(self.formula, FLOAT32, first, stop, TOLERANCE))

    @cached_property
    def outputs(self) -> tuple[Table, ...]:
        """Boxes of g(y, piece) over the y that count for the decoder error, one table a piece."""
        return tuple(self._outputs(part) for part in self.ranges)

    def _outputs(self, part: Range) -> Table:
        lowest, highest = sorted((part.piece.left_limit, part.piece.right_limit))
        first, last = max(part.low, _at_least(lowest)), min(part.high, _at_most(highest))
        boxes = taylor.output_boxes(self.formula, FLOAT32, part.piece.index, first, last + 1, TOLERANCE)
        return table_of(boxes)

    @cached_property
    def tails(self) -> tuple[float, float]:
        """Inputs left of the first and right of the second number are tails: f' stays within `TAIL` of 0 or 1 there.

        Taken from the bfloat16 values; the largest of them where f' has no such limit.
        """
        grid = BFLOAT16.tensor(BFLOAT16.first_ordinal, BFLOAT16.finite_count).float().numpy()
        slopes = self.derivative(grid)
        settled = (np.abs(slopes) < TAIL) | (np.abs(1 - slopes) < TAIL)
        if settled.all():
            return inf, -inf
        unsettled = grid[~settled]
        return float(unsettled[0]), float(unsettled[-1])

    def derivative(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """f'(x), within `TOLERANCE`, for finite x of shape (n,)."""
        out = np.empty(x.shape, np.float64)
        evaluate(self.slopes, np.ascontiguousarray(x), out)
        return out

    def from_output(self, y: NDArray[np.float32], piece: int) -> NDArray[np.float64]:
        """g(y, piece), within `TOLERANCE`, for y of shape (n,); NaN outside the range that the piece's table covers."""
        out = np.empty(y.shape, np.float64)
        evaluate(self.outputs[piece], np.ascontiguousarray(y), out)
        return out


def cuts_of(formula: Formula, fmt: Format) -> list[int]:
    """For each turning point, the ordinal of the first value of `fmt` to the right of it."""
    points = turning_points(formula)
    nearest = [fmt.ordinal(float(point.x)) for point in points]
    return [ordinal + (fmt.value(ordinal) < point.x) for ordinal, point in zip(nearest, points, strict=True)]


def exact_slopes(formula: Formula, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """f'(x) for any float64 x of shape (n,), one at a time from Arb, rounded to float64."""
    with precision(_BITS):
        return np.array([float(formula.evaluate(arb(value), ARB, 1).mid()) for value in x.tolist()])


def exact_errors(formula: Formula, x: NDArray[np.float64], dx: NDArray[np.float64]) -> NDArray[np.float64]:
    """|dx - f'(x)| for float64 arrays of shape (n,), one at a time from Arb: upper bounds rounded to nearest."""
    with precision(_BITS):
        pairs = zip(x.tolist(), dx.tolist(), strict=True)
        return np.array([float(abs(arb(d) - formula.evaluate(arb(v), ARB, 1)).upper()) for v, d in pairs])


def _counting(piece: Piece) -> tuple[int, int]:
    """Ordinals of the least and the largest float32 y that count: `CLEARANCE` ulp from a turning value, or all."""
    ends = [(piece.left_limit, isfinite(piece.left)), (piece.right_limit, isfinite(piece.right))]
    (low, turns_low), (high, turns_high) = ends if piece.increasing else ends[::-1]
    return (
        _at_least(low + _clearance(low)) if turns_low else FLOAT32.first_ordinal,
        _at_most(high - _clearance(high)) if turns_high else FLOAT32.largest_ordinal,
    )


def _clearance(turning_value: Any) -> float:
    return CLEARANCE * FLOAT32.ulp(float(turning_value))


def _at_least(bound: Any) -> int:
    """Ordinal of the least finite float32 not below `bound`; of the two zeros -0.0 comes first."""
    nearest = max(FLOAT32.ordinal(float(bound)), FLOAT32.first_ordinal)
    nearest += FLOAT32.value(nearest) < bound
    return -1 if nearest == 0 else nearest


def _at_most(bound: Any) -> int:
    """Ordinal of the largest finite float32 not above `bound`: ordinal o is the negative of ordinal -1 - o."""
    return -1 - _at_least(-bound)
