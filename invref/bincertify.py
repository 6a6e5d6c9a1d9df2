"""What is proved of a binned decoder: the sup-norm of every bin's polynomial against f', and of what lies outside.

On a box of x, f and f' are Taylor polynomials with remainders from Arb; put into a bin's polynomial they leave one
polynomial of small balls, whose Chebyshev coefficients bound it. Bounds hold for exact arithmetic on the float32
coefficients, relative to |f'| where that is above 1, for every float32 input; bins are certified a little beyond their
ends, so that rounding of d may choose the neighbour. What evaluation in float32 adds is measured by the verifier.
"""

from __future__ import annotations

import math
from functools import cache
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
from flint import arb, arb_poly

from invref.arcs import BITS, LARGEST, Arc
from invref.binpoly import Octave
from invref.engines import ARB, coefficients, evaluate, precision, variable
from invref.errors import ProofError
from invref.formulas import Branch
from invref.signs import Box

Array = npt.NDArray[np.float64]

ACCEPTED = 2.0**-23
"""A box with this bound is not split further."""
PROMISED = 2.0**-22
"""No bin may have a larger bound."""
SIGN = 2.0**-4
"""Where f' is small, a box is split until its bound is below this share of it; at worst below all of it."""
SLACK = 2.0**-20
ORDER = 9
CHEBYSHEV = 24
"""Terms of an error polynomial that are written in Chebyshev polynomials; those beyond count with their size."""
DEEPEST = 8
DEEPEST_TAIL = 24


def bound(arc: Arc, octaves: list[Octave], base: float, slope: float, limit: float, until: float) -> float:
    """The certified bound of one cell, which is looked up at distances below `until`.

    ProofError where PROMISED, or the sign of f', cannot be proved, or where the bins end before that.
    """
    worst = 0.0
    _covered(arc, octaves, until)
    with precision(BITS, ORDER + 4):
        for octave in octaves:
            for j in range(octave.served):
                width = 2.0 ** (octave.exponent - octave.splits)
                low = 2.0**octave.exponent + j * width
                scale, shift = 1 / width, -(low / width) - 0.5
                a = _covering(arc, low * (1 - SLACK), -1)
                b = _covering(arc, low + width * (1 + SLACK), 1)
                worst = _larger(worst, _norm(arc, octave.rows[j].tolist(), scale, shift, a, b, 0))
        first = 2.0 ** octaves[0].exponent if octaves else 0.0
        if not arc.finite:
            rest = abs(arb(slope)) * first
            near = _covering(arc, first * (1 + SLACK), 1) if octaves else arc.origin
            worst = _larger(worst, _outside(arc, near, -arc.direction, 0.0, float(rest)))
        elif octaves and first > arc.reach:
            edge = _covering(arc, first * (1 + SLACK), 1)
            worst = _larger(worst, _norm(arc, [base, slope], 1.0, 0.0, arc.origin, edge, 0, signed=False))
        if arc.last is None and (not octaves or octaves[-1].exponent < 127):
            reached = 2.0 ** (octaves[-1].exponent + 1) if octaves else first
            start = _covering(arc, reached * (1 - SLACK), -1) if octaves else arc.origin
            worst = _larger(worst, _outside(arc, start, arc.direction, limit, 0.0))
    return worst


def _covered(arc: Arc, octaves: list[Octave], until: float) -> None:
    """ProofError unless the octaves follow one another up to `until`; beyond an arc's end there is only its limit."""
    end, first = 0.0, octaves[0].exponent if octaves else 0
    for k, octave in enumerate(octaves):
        share = (octave.served + SLACK) / 2.0**octave.splits
        if octave.exponent != first + k or (octave is not octaves[-1] and octave.served < 1 << octave.splits):
            raise ProofError(f"the bins have a gap at distance {2.0**octave.exponent:.3g}")
        end = 2.0**octave.exponent * (1 + share)
    if arc.last is not None and not until <= end:
        raise ProofError(f"the bins end at distance {end:.9g} of {until:.9g}")


def _larger(a: float, b: float) -> float:
    if not math.isfinite(b):
        raise ProofError(f"a bound of a bin is {b}")
    return max(a, b)


def _covering(arc: Arc, d: float, way: int) -> arb:
    """An input at distance d or a little less (-1) or more (+1), never beyond the anchor."""
    step = 2.0**-30
    u = arc.u_of(d)
    while step < 1:
        x = arc.x_at(u)
        distance = arc.at(x)[0]
        if (distance <= d) if way < 0 else (distance >= d):
            return x
        if way > 0 and arc.last is not None and u > arc.last + 1e-3:
            return x
        u += way * step
        step *= 4
    raise ProofError(f"no input at distance {d} near x = {float(arc.x_at(u)):.6g}")


def _norm(
    arc: Arc, row: list[float], scale: float, shift: float, a: arb, b: arb, depth: int, signed: bool = True
) -> float:
    """Upper bound of |P(scale * d + shift) - f'| / max(1, |f'|) for x between a and b."""
    error, least = _taylor(arc, row, scale, shift, a, b)
    relative = error / max(1.0, least)
    if relative <= ACCEPTED and (not signed or error <= SIGN * least):
        return relative
    middle = arb(((a + b) / 2).mid())
    if depth == DEEPEST:
        if relative <= PROMISED and (not signed or error < least):
            return relative
        raise ProofError(f"|polynomial - f'| near x = {float(middle):.6g} is only known to be below {relative:.3g}")
    return max(
        _norm(arc, row, scale, shift, a, middle, depth + 1, signed),
        _norm(arc, row, scale, shift, middle, b, depth + 1, signed),
    )


def _taylor(arc: Arc, row: list[float], scale: float, shift: float, a: arb, b: arb) -> tuple[float, float]:
    """Bounds on x between a and b: of |P(scale * d + shift) - f'| from above, of |f'| from below."""
    middle = arb(((a + b) / 2).mid())
    radius = arb((abs(b - a).upper() / 2 * (1 + arb(2) ** -60)).upper())
    at = coefficients(evaluate(arc.expression, variable(middle, ORDER + 2), ARB))
    over = coefficients(evaluate(arc.expression, variable(a.union(b), ORDER + 2), ARB))[ORDER + 1]
    if not over.is_finite():
        return math.inf, 0.0
    powers = [radius**k for k in range(ORDER + 2)]
    f = [c * p for c, p in zip(at[: ORDER + 1], powers, strict=False)]
    f[0] -= arc.anchor
    slope = [(k + 1) * at[k + 1] * powers[k] for k in range(ORDER)]
    z = arb_poly([c * arc.side * scale for c in f]) + arb_poly([arb(shift)])
    rest = over.abs_upper() * powers[ORDER + 1] * scale
    value = arb_poly([arb(0)])
    for c in reversed(row):
        value = value * z + arb_poly([arb(c)])
    size = float(sum((c.abs_upper() for c in z.coeffs()), arb(0)).upper()) + float(rest.upper())
    if not size < LARGEST:
        return math.inf, 0.0
    steepness = sum(k * abs(c) * size ** (k - 1) for k, c in enumerate(row) if k)
    remainder = rest * steepness + (ORDER + 1) * over.abs_upper() * powers[ORDER]
    error = _sup((value - arb_poly(slope)).coeffs()) + float(remainder.upper()) * (1 + 1e-12)
    least = (abs(slope[0]) - sum((c.abs_upper() for c in slope[1:]), arb(0)) - remainder).lower()
    return error, float(least)


@cache
def _to_chebyshev() -> Array:
    """Row j, column k: the coefficient of T_j in x^k."""
    matrix = np.zeros((CHEBYSHEV, CHEBYSHEV))
    for k in range(CHEBYSHEV):
        for i in range(k // 2 + 1):
            j = k - 2 * i
            matrix[j, k] = comb(k, i) * 2.0 ** (1 - k) / (2 if j == 0 else 1)
    return matrix


def _sup(terms: list[Any]) -> float:
    """Upper bound on [-1, 1] of a polynomial with ball coefficients."""
    head = np.zeros(CHEBYSHEV)
    rest = 0.0
    for k, c in enumerate(terms):
        if k < CHEBYSHEV:
            head[k] = float(c.mid())
            rest += float(c.rad())
        else:
            rest += float(c.abs_upper())
    chebyshev = np.abs(_to_chebyshev() @ head).sum()
    return float((chebyshev + rest + CHEBYSHEV * 2.0**-50 * np.abs(head).sum()) * (1 + 1e-12))


def _outside(arc: Arc, start: arb, way: int, limit: float, extra: float) -> float:
    """Upper bound of |limit - f'| / max(1, |limit|) + extra from an input outwards to the largest float32."""
    worst, scale = 0.0, max(1.0, abs(limit))
    low, end = start, way * arb(LARGEST)
    while way * low < LARGEST:
        reach = max(abs(float(low)), 1.0)
        high = arb(low.mid() + way * reach)
        worst = max(worst, _box(arc, low, high if way * high < LARGEST else end, limit, scale, extra, 0))
        low = arb(high.mid())
    return worst


def _box(arc: Arc, low: arb, high: arb, limit: float, scale: float, extra: float, depth: int) -> float:
    slope = coefficients(evaluate(arc.expression, variable(low.union(high), 2), ARB))[1]
    error = (float((slope - limit).abs_upper()) + extra) / scale if slope.is_finite() else math.inf
    if not error <= ACCEPTED:
        error = min(error, _taylor(arc, [limit], 0.0, 0.0, low, high)[0] / scale + extra / scale)
    if not error <= ACCEPTED:
        # Where a tiny factor meets a huge one, balls lose what exponentials taken together keep.
        ends = (low, high) if low < high else (high, low)
        found = Box(*ends).bounds(Branch(arc.expression).derivative(1))
        distance = (found.low - limit).abs_upper().max((found.high - limit).abs_upper())
        error = (float(distance) + extra) / scale if distance.is_finite() else math.inf
    if error <= ACCEPTED:
        return error * (1 + 1e-12)
    if depth == DEEPEST_TAIL:
        raise ProofError(f"|f' - {limit}| near x = {float(low):.6g} is only known to be below {error:.3g}")
    middle = arb(((low + high) / 2).mid())
    halves = ((low, middle), (middle, high))
    return max(_box(arc, *half, limit, scale, extra, depth + 1) for half in halves)
