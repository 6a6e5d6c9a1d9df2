"""The truth at array speed: f, f' and g(y, piece) of float32 values from proved Taylor boxes.

Guarantees |returned - true| ≤ the boxes' proved bound (at most `TOLERANCE`, of max(1, |f'|) where f' has no bound) for
every value inside the boxes, and NaN outside them, so that an uncovered value can never pass a check. Must not know
any layer.
"""

from __future__ import annotations

from functools import cached_property
from math import inf, isfinite

import numpy as np
from flint import arb
from mpmath import isinf
from numpy.typing import NDArray

from invref import formats, taylor
from invref.engines import ARB, precision
from invref.formats import Format
from invref.formulas import Formula
from invref.pieces import limit
from verify import ranges
from verify.lookup import TOLERANCE, Table, constant, joined, looked_up, table_of
from verify.ranges import BITS, CLEARANCE, FLOAT32, Edge, Range, at_least, at_most

__all__ = ["CLEARANCE", "FLOAT32", "TAIL", "TOLERANCE", "Oracle", "Range", "exact_errors", "exact_slopes"]

BFLOAT16 = formats.get("bfloat16")

TAIL = 1e-6
"""Where f' stays this near to 0 or 1, there is a tail."""

BEYOND = 2.0**200
"""Stands for outputs that no format holds."""


class Oracle:
    """f, f' and g of one formula on float32 values; its boxes are built when first asked for, and kept.

    With `gradient`, a formula whose values are what the gradient is meant to be, that takes the place of f'.
    """

    def __init__(self, formula: Formula, gradient: Formula | None = None) -> None:
        self.formula = formula
        self.gradient = gradient

    @cached_property
    def relative(self) -> bool:
        """Whether errors are measured relative to max(1, |f'|), because f' has no bound."""
        return self.gradient is None and ranges.unbounded(self.formula)

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """The monotone pieces as ranges of float32 ordinals, from the left; together all finite inputs not at jumps."""
        return ranges.between_jumps(self.edges(FLOAT32)) if self.gradient else ranges.ranges(self.formula)

    def edges(self, fmt: Format) -> tuple[Edge, ...]:
        """The inputs of `fmt` at jumps of the gradient (or of f), which no range holds."""
        if self.gradient:
            return ranges.jumps_of(self.gradient, self.formula, fmt)
        return ranges.edges_of(self.formula, fmt)

    def cuts(self, fmt: Format) -> list[tuple[int, int]]:
        """Where each piece but the last stops and where the next one starts, as ordinals of `fmt`."""
        if self.gradient:
            return [(edge.first, edge.stop) for edge in self.edges(fmt)]
        return ranges.cuts_of(self.formula, fmt)

    def piece_at(self, fmt: Format, ordinal: int) -> int:
        """Number of the piece that holds an input of `fmt`; at a jump, that of the piece on its right."""
        return int(np.searchsorted([stop for stop, _ in self.cuts(fmt)], ordinal, side="right"))

    @cached_property
    def slopes(self) -> Table:
        """Boxes of f' over all finite inputs, but for those whose f' may be too large for a float64."""
        if self.gradient:
            return table_of(taylor.value_boxes(self.gradient, FLOAT32, *_everywhere(), TOLERANCE))
        span = ranges.representable(self.formula)
        boxes = taylor.derivative_boxes(self.formula, FLOAT32, *span, TOLERANCE, relative=self.relative)
        return table_of(boxes, self.relative)

    @cached_property
    def values(self) -> Table:
        """Boxes of f over all finite inputs, with an error relative to |f| down to the smallest normal."""
        first, stop = ranges.representable(self.formula)
        inner = table_of(taylor.value_boxes(self.formula, FLOAT32, first, stop, TOLERANCE, relative=True), True)
        left, right = (float(limit(self.formula, sign)) for sign in (-1, +1))
        start, end = _everywhere()
        return joined([constant(_beyond(left), start, first), inner, constant(_beyond(right), stop, end)])

    @cached_property
    def outputs(self) -> tuple[Table, ...]:
        """Boxes of g(y, piece) over the y that count for the decoder error, one table a piece."""
        return tuple(self._outputs(part) for part in self.ranges)

    def _outputs(self, part: Range) -> Table:
        if part.low > part.high:
            return joined([])
        piece = part.piece
        ends = [(piece.left_limit, self._slope_at_end(part, -1)), (piece.right_limit, self._slope_at_end(part, +1))]
        (lowest, below), (highest, above) = ends if piece.increasing else ends[::-1]
        first, last = max(part.low, at_least(lowest)), min(part.high, at_most(highest))
        # Outputs at a limit or rounded to beyond it decode to what f' is there.
        while first <= last and below is not None and FLOAT32.value(first) == lowest:
            first += 1
        while first <= last and above is not None and FLOAT32.value(last) == highest:
            last -= 1
        tables = []
        if below is not None:
            tables.append(constant(below, part.low, first))
        if first <= last:
            boxes = taylor.output_boxes(
                self.formula, FLOAT32, piece.index, first, last + 1, TOLERANCE, relative=self.relative
            )
            tables.append(table_of(boxes, self.relative))
        if above is not None:
            tables.append(constant(above, max(first, last + 1), part.high + 1))
        return joined(tables)

    def _slope_at_end(self, part: Range, outward: int) -> float | None:
        """f' at an end of a piece where f has a limit that the outputs may reach; None where they are kept clear."""
        piece = part.piece
        end, value = (piece.left_end, piece.left_limit) if outward < 0 else (piece.right_end, piece.right_limit)
        if isinf(value) or ranges.singular(self.formula, piece, end, outward):
            return None
        if end == "infinity":
            slope = float(limit(self.formula, outward, 1))
            return slope if isfinite(slope) else None
        return ranges.slope_at_break(self.formula, piece, outward)

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

    @cached_property
    def typical(self) -> float:
        """The size of the numbers that a kernel adds up to f': the largest |f'| of |x| ≤ 4, and at least 1."""
        slopes = np.abs(self.derivative(np.linspace(-4, 4, 1025, dtype=np.float32)))
        return float(np.max(slopes, initial=1.0, where=np.isfinite(slopes)))

    def derivative(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """f'(x), within `TOLERANCE`, for finite x of shape (n,)."""
        return looked_up(self.slopes, x)

    def value(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """f(x), within a relative `TOLERANCE`, for finite x of shape (n,)."""
        return looked_up(self.values, x)

    def from_output(self, y: NDArray[np.float32], piece: int) -> NDArray[np.float64]:
        """g(y, piece), within `TOLERANCE`, for y of shape (n,); NaN outside the range that the piece's table covers."""
        return looked_up(self.outputs[piece], y)

    def exact(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the gradient should be at any float64 x of shape (n,), one at a time from Arb, rounded to float64."""
        return exact_values(self.gradient, x, 0) if self.gradient else exact_slopes(self.formula, x)


def _everywhere() -> tuple[int, int]:
    return FLOAT32.first_ordinal, FLOAT32.largest_ordinal + 1


def _beyond(end: float) -> float:
    return BEYOND if end > 0 else -BEYOND


def exact_slopes(formula: Formula, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """f'(x) for any float64 x of shape (n,), one at a time from Arb, rounded to float64."""
    return exact_values(formula, x, 1)


def exact_values(formula: Formula, x: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """The derivative of that order, as `exact_slopes`."""
    with precision(BITS):
        return np.array([float(formula.evaluate(arb(value), ARB, order).mid()) for value in x.tolist()])


def exact_errors(formula: Formula, x: NDArray[np.float64], dx: NDArray[np.float64]) -> NDArray[np.float64]:
    """|dx - f'(x)| for float64 arrays of shape (n,), one at a time from Arb: upper bounds rounded to nearest."""
    with precision(BITS):
        pairs = zip(x.tolist(), dx.tolist(), strict=True)
        return np.array([float(abs(arb(d) - formula.evaluate(arb(v), ARB, 1)).upper()) for v, d in pairs])
