"""The derivative-from-output on a grid: 32 short polynomials instead of rational functions, for vector look-ups.

Fits and certifies the `Cells` of a decoder: each cell's minimax polynomial with float32 coefficients, and the sup-norm
of |cells - g| in exact arithmetic over everything, neighbouring cells overlapping so that rounding may choose either.
Handles what `fit` handles; must not know kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from flint import arb, arb_series

from invref import enclosure
from invref.certify import FAR, beyond, larger
from invref.curve import DIGITS, Curve
from invref.decoders import CELLS_LEFT, CELLS_RIGHT, CELLS_TAIL, DEGREE, Cells, Decoder, nearest
from invref.engines import ARB
from invref.minimax import middle, rational

SPLIT = 0.85
"""The share of the largest |t| on the left from which on outputs belong to the tail."""
POINTS = 40
"""Of the fit, in each cell."""
SLACK = 2.0**-18
"""By how much of a cell's width rounding may move a place: 4 ulp at 32."""
STEADY = 2.0**-20
"""By which relative amount the left parts are narrowed, so that rounding leaves no place beyond their last cell."""

Place = Callable[[arb_series], arb_series]


def fit(curve: Curve, decoder: Decoder) -> Cells:
    """The certified cells of a decoder that has its segments (whose `end_t` they share)."""
    turning = float(decoder.turning_y)
    left = SPLIT * float(np.sqrt(-turning))
    split = float(np.float32(turning + left * left))
    reach = float((arb(split) - curve.turning[1]).sqrt()), float(arb(-split).sqrt())
    right = np.float32(CELLS_RIGHT / decoder.end_t)
    while Fraction(float(right)) * Fraction(decoder.end_t) < CELLS_RIGHT:
        right = np.nextafter(right, np.float32(np.inf))
    scales = (
        float(right),
        float(np.float32(CELLS_LEFT / reach[0] * (1 - STEADY))),
        float(np.float32(CELLS_TAIL / reach[1] * (1 - STEADY))),
    )
    far = float(enclosure.inverse(curve.formula, arb(-FAR), 0, DIGITS))
    rows: list[tuple[float, ...]] = []
    bound = beyond(curve, 0, far)
    for part, (scale, count) in enumerate(zip(scales, (CELLS_RIGHT, CELLS_LEFT, CELLS_TAIL), strict=True)):
        for cell in range(count):
            row = _polynomial(curve, part, scale, cell)
            if part == 0:
                row = _exact_at_zero(curve, decoder, scale, cell, row)
            rows.append(row)
            bound = larger(bound, _norm(curve, part, scale, cell, row, far))
            if part == 2 and cell == 0:
                factor = sum(abs(c) for c in row)  # on all of 0 <= z <= 1
                bound = larger(bound, beyond(curve, 0, far) + FAR * factor)
        if part == 0:
            rows.append((1.0, *[0.0] * DEGREE))
    return Cells(split, scales, tuple(rows), larger(bound, decoder.head.bound))


def _x(curve: Curve, part: int, u: float) -> arb:
    """The input whose output lies at u: the root's size, or sqrt(-y) in the tail."""
    if part == 2:
        return middle(enclosure.inverse(curve.formula, -arb(u) * arb(u), 0, DIGITS))
    return curve.turning[0] if u <= 0 else curve.x_of(u if part == 0 else -u)


def _polynomial(curve: Curve, part: int, scale: float, cell: int) -> tuple[float, ...]:
    """The minimax polynomial of one cell in z = u * scale - cell."""
    nodes = [0.5 - 0.5 * float((arb.pi() * (2 * k + 1) / (2 * POINTS)).cos()) for k in range(POINTS)]
    z, target, weight = [], [], []
    for node in nodes:
        u = float(np.float32((cell + node) / scale))
        f, g = curve.at(_x(curve, part, u))
        m = f if part == 2 else arb(1)
        z.append(middle(arb(u) * scale - cell))
        target.append(middle(g / m))
        weight.append(middle(abs(m)))
    best = rational(z, target, weight, (DEGREE, 0))
    return tuple(float(np.float32(float(c))) for c in best.numerator)


def _exact_at_zero(
    curve: Curve, decoder: Decoder, scale: float, cell: int, row: tuple[float, ...]
) -> tuple[float, ...]:
    """The row with its constant such that input 0 decodes to its exact derivative, if it lies in this cell."""
    high, low = decoder.turning_value(np.float32)
    u = np.sqrt((np.float32(0) - high) - low)
    place = nearest(Fraction(float(u)) * Fraction(scale), np.float32)
    if int(place) != cell:
        return row
    z = Fraction(float(place)) - cell
    value = np.float32(row[-1])
    for c in row[-2:0:-1]:
        value = nearest(Fraction(float(value)) * z + Fraction(c), np.float32)
    goal = np.float32(float(curve.at(arb(0))[1]))
    constant = nearest(Fraction(float(goal)) - Fraction(float(value)) * z, np.float32)
    return (float(constant), *row[1:])


def _norm(curve: Curve, part: int, scale: float, cell: int, row: tuple[float, ...], far: float) -> float:
    """The certified sup-norm of the error on one cell and a little beyond."""
    formula = curve.formula

    def error(v: arb_series) -> arb_series:
        f = formula.evaluate(v, ARB)
        if part == 2:
            u, m = (-f).sqrt(), f
        else:
            u, m = enclosure.signed_root(formula, 0, v), arb_series([1])
            u = u if part == 0 else -u
        z, value = u * scale - cell, arb_series([0])
        for c in reversed(row):
            value = value * z + c
        return m * value - formula.evaluate(v, ARB, order=1)

    ends = [max(0.0, (cell - SLACK) / scale), (cell + 1 + SLACK) / scale]
    x = sorted(far if part == 2 and u * u < FAR else float(_x(curve, part, u)) for u in ends)
    a, b = np.nextafter(x[0], -np.inf), np.nextafter(x[1], np.inf)
    return enclosure.sup_norm(error, float(a), float(b))[1]
