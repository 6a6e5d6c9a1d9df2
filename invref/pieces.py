"""Turning points and monotone pieces of a formula, isolated by a proof that none is missed.

The float64 line is covered octave by octave, out to its largest value, by boxes that are bisected until on
each of them Arb shows that f' has no zero, or that f' is strictly monotone and so has at most one, which its
signs at the ends then decide. In a tail f' is a tiny positive factor times something of clear sign: the proof
drops such factors (exp, erfc, sigmoid) from a factored f' first. What is proved: these are all the turning points with
|x| ≤ 1.8e308. The limits at the ends are read off beyond that, at ±2^1100, with their enclosures.
This module must not know inverses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import mpmath
import sympy
from flint import arb

from invref.engines import ARB, MPMATH, erfc, erfcx, evaluate, precision, sigmoid, to_mpf
from invref.errors import FormulaError, RangeError
from invref.formulas import Formula, get

PROOF_BITS = 128
GUARD = 15
"""Decimal digits kept beyond those asked for."""
MOST_BOXES = 50_000
FARTHEST = 1024
"""The boxes end at ±2^FARTHEST, just beyond the largest float64."""
ODD = 1.0546875
"""Boxes end at ODD * 2^k and split at ODD/2: a turning point at a round number must not fall on a box's end."""
LIMIT_AT = 1100


@dataclass(frozen=True)
class TurningPoint:
    """A minimum or maximum of f: where, how deep, and f'' there. Accurate to the digits asked for."""

    index: int
    x: mpmath.mpf
    y: mpmath.mpf
    curvature: mpmath.mpf
    minimum: bool


@dataclass(frozen=True)
class Piece:
    """A maximal interval (left, right) on which f is strictly monotone, and the limits of f at its ends."""

    index: int
    left: mpmath.mpf
    right: mpmath.mpf
    increasing: bool
    left_limit: mpmath.mpf
    right_limit: mpmath.mpf


@lru_cache(maxsize=256)
def turning_points(formula: str | Formula, digits: int = 50) -> tuple[TurningPoint, ...]:
    """All turning points of f, from the left. FormulaError when they cannot be isolated."""
    formula = get(formula)
    found = []
    for index, (low, high, rising) in enumerate(_isolate(formula)):
        with mpmath.workdps(digits + GUARD):
            x = _zero_of_slope(formula, to_mpf(low), to_mpf(high), rising)
            y = formula.evaluate(x, MPMATH)
            found.append(TurningPoint(index, x, y, formula.evaluate(x, MPMATH, 2), rising))
    return tuple(found)


@lru_cache(maxsize=256)
def pieces(formula: str | Formula, digits: int = 50) -> tuple[Piece, ...]:
    """The monotone pieces of f, numbered from the left; K - 1 turning points part K of them."""
    formula = get(formula)
    turns = turning_points(formula, digits)
    ends = [
        (-mpmath.inf, limit(formula, -1)),
        *((turn.x, turn.y) for turn in turns),
        (mpmath.inf, limit(formula, +1)),
    ]
    rising = not turns[0].minimum if turns else bool(ends[0][1] < ends[1][1])
    return tuple(
        Piece(i, left[0], right[0], rising ^ bool(i % 2), left[1], right[1])
        for i, (left, right) in enumerate(pairwise(ends))
    )


def piece(formula: str | Formula, index: int, digits: int = 50) -> Piece:
    """The piece with this number; RangeError says how many there are."""
    all_pieces = pieces(get(formula), digits)
    if not 0 <= index < len(all_pieces):
        raise RangeError(f"{get(formula).name} has no piece {index}: its pieces are 0 to {len(all_pieces) - 1}")
    return all_pieces[index]


@lru_cache(maxsize=256)
def limit(formula: str | Formula, sign: int, order: int = 0) -> mpmath.mpf:
    """Limit of f (or of its derivative of that order) as x goes to ±infinity: a number, or ±infinity.

    Read off enclosures at ±2^550 and ±2^1100: beyond 2^500 means infinite, below 2^-500 means 0, and any other limit
    must be reached there to PROOF_BITS/2 bits, and is a float when it can be one; FormulaError otherwise.
    """
    formula = get(formula)
    with precision(PROOF_BITS):
        near, far = (formula.evaluate(arb(sign) * arb(2) ** k, ARB, order) for k in (LIMIT_AT // 2, LIMIT_AT))
        threshold = arb(2) ** 500
        if far.abs_lower() > threshold:
            return mpmath.inf if far > 0 else -mpmath.inf
        if far.abs_upper() < 1 / threshold:
            return mpmath.mpf(0)
        if (far - near).abs_upper() < arb(2) ** (-PROOF_BITS // 2):
            short = float(far)
            return mpmath.mpf(short) if far.contains(short) else to_mpf(far)
    end = "+" if sign > 0 else "-"
    raise FormulaError(
        f"{formula.name} shows no clear limit as x goes to {end}infinity: use a formula that settles there"
    )


def _zero_of_slope(formula: Formula, low: mpmath.mpf, high: mpmath.mpf, rising: bool) -> mpmath.mpf:
    """Newton on f' inside a box where f' is monotone and changes sign; bisection when a step leaves the box."""
    x = (low + high) / 2
    while True:
        slope = formula.evaluate(x, MPMATH, 1)
        if (slope < 0) == rising:
            low = x
        else:
            high = x
        step = slope / formula.evaluate(x, MPMATH, 2)
        nearer = x - step
        if not low <= nearer <= high:
            nearer = (low + high) / 2
        if abs(nearer - x) <= abs(x) * mpmath.mpf(10) ** (2 - mpmath.mp.dps) or nearer in (low, high):
            return nearer
        x = nearer


@lru_cache(maxsize=64)
def _isolate(formula: Formula) -> tuple[tuple[arb, arb, bool], ...]:
    """Boxes (low, high, f' goes from minus to plus) with exactly one turning point in each, and none elsewhere."""
    slope, curvature = formula.derivative(1), formula.derivative(2)
    forms = [slope, _sign_form(slope)]
    found = []
    with precision(PROOF_BITS):
        ends = [ODD * arb(2) ** k for k in range(FARTHEST + 1)]
        octaves = list(pairwise(ends))
        todo = [*reversed(octaves), (-ends[0], ends[0]), *((-high, -low) for low, high in octaves)]
        budget = MOST_BOXES
        while todo:
            low, high = todo.pop()
            budget -= 1
            box = low.union(high)
            if any(_excludes_zero(evaluate(form, box, ARB)) for form in forms):
                continue
            if _excludes_zero(evaluate(curvature, box, ARB)):
                before, after = (_sign(forms, end) for end in (low, high))
                if before and after:
                    if before != after:
                        found.append((low, high, after > 0))
                    continue
            if budget < 0:
                raise FormulaError(
                    f"the turning points of {formula.name} could not be isolated near x = {float(low):.6g}: "
                    "use a formula that is smooth on the whole line, with finitely many, simple turning points"
                )
            middle = (low + (high - low) * ODD / 2).mid()
            todo += [(middle, high), (low, middle)]
    return tuple(found)


def _excludes_zero(ball: arb) -> bool:
    return bool(ball.is_finite() and ball.abs_lower() > 0)


def _sign(forms: list[sympy.Expr], x: arb) -> int:
    """Sign of f' at a point, 0 when unknown."""
    for form in forms:
        value = evaluate(form, x, ARB)
        if _excludes_zero(value):
            return 1 if value > 0 else -1
    return 0


def _sign_form(slope: sympy.Expr) -> sympy.Expr:
    """An expression with the sign of `slope`: positive factors dropped after erfc(z) is written exp(-z²) erfcx(z)."""
    scaled = slope.replace(erfc, lambda z: sympy.exp(-(z**2)) * erfcx(z))
    product = sympy.factor_terms(scaled)
    factors = [f for f in sympy.Mul.make_args(product) if not isinstance(f, sympy.exp | erfc | erfcx | sigmoid)]
    return sympy.Mul(*factors)
