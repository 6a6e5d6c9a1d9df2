"""Taylor boxes: piecewise polynomials in float64 with a proved error bound, the fast stand-in for the exact functions.

A box holds consecutive floats [lo, hi], a centre c and coefficients p_0 … p_n. For a float v of the box, d is v - c
rounded to float64, and p(d) is evaluated there by Horner's rule, fused or not. Its distance from the truth is at most

    Σ |p_k - a_k| r^k               the true Taylor coefficients a_k are enclosed, and rounded to float64
  + |a_{n+1}(box)| r^(n+1)          Lagrange's remainder: that coefficient, enclosed over the whole box
  + Σ (3k + 1) u' |p_k| r^k         rounding: 2k + 1 times in Horner's rule, k times in d; u' = u / (1 - 3(n+1) u)
  + (n+1) 2^-1073 max(1, r)^(n+1)   underflow

with r ≥ |v - c| and u = 2^-53 (Higham, Accuracy and Stability of Numerical Algorithms, section 5.1). A range that
misses the tolerance is split where the ordinal has most trailing zeros, so that boxes are aligned to octaves. Where
the function is a constant, or its own argument, to within the tolerance, one box serves.
This module must not know decoders.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import isinf

import numpy as np
import numpy.typing as npt
from flint import arb, arb_series

from invref.enclosure import invert, round_up
from invref.engines import SERIES, coefficients, compose, precision, to_arb, variable
from invref.errors import ProofError, RangeError
from invref.formats import Format
from invref.formulas import Formula, get
from invref.pieces import limit
from invref.pieces import piece as piece_of

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DEGREE = 7
TOLERANCE = 1e-12
BITS = 128
UNIT = 2.0**-53


@dataclass(frozen=True)
class Boxes:
    """Sorted, gap-free boxes: polynomial i serves the ordinals first[i] ≤ o < stop[i], with error at most bounds[i]."""

    first: Integers
    stop: Integers
    centre: Floats
    coefficients: Floats
    bounds: Floats

    @property
    def bound(self) -> float:
        """The proved error bound of all boxes together."""
        return float(self.bounds.max())

    def __len__(self) -> int:
        return len(self.first)

    def evaluate(self, ordinals: Integers, values: Floats) -> Floats:
        """The polynomials at float64 `values`, whose `ordinals` are given; both of shape (n,)."""
        box = np.searchsorted(self.stop, ordinals, side="right")
        step = values - self.centre[box]
        result: Floats = self.coefficients[box, -1]
        for k in range(self.coefficients.shape[1] - 2, -1, -1):
            result = result * step + self.coefficients[box, k]
        return result


Polynomial = tuple[float, list[float], float]
"""Centre, coefficients, bound."""
Model = Callable[[float, float], Polynomial]
"""Makes the polynomial of the box [lo, hi] of floats; an infinite bound says that none was found."""


def derivative_boxes(formula: str | Formula, fmt: Format, first: int, stop: int, tolerance: float = TOLERANCE) -> Boxes:
    """Boxes of f'(x) over the ordinals [first, stop) of x. ProofError when the tolerance is out of reach."""
    formula = get(formula)
    return _build(fmt, first, stop, tolerance, lambda lo, hi: _direct(formula, lo, hi, tolerance, 1))


def value_boxes(formula: str | Formula, fmt: Format, first: int, stop: int, tolerance: float = TOLERANCE) -> Boxes:
    """Boxes of f(x), absolute error, as `derivative_boxes`."""
    formula = get(formula)
    return _build(fmt, first, stop, tolerance, lambda lo, hi: _direct(formula, lo, hi, tolerance, 0))


def output_boxes(
    formula: str | Formula, fmt: Format, piece: int, first: int, stop: int, tolerance: float = TOLERANCE
) -> Boxes:
    """Boxes of g(y, piece) = f'(f⁻¹(y)) over the ordinals [first, stop) of y.

    A y at the limit of f at infinity, such as the -0.0 of a left tail, decodes to the limit of f'. RangeError when
    some other y is outside the piece's range; ProofError when the tolerance is out of reach.
    """
    branch = _Branch(get(formula), fmt, piece)
    return _build(fmt, first, stop, tolerance, lambda lo, hi: branch.model(lo, hi, tolerance))


def _build(fmt: Format, first: int, stop: int, tolerance: float, model: Model) -> Boxes:
    if not fmt.first_ordinal <= first < stop <= fmt.largest_ordinal + 1:
        raise RangeError(f"ordinals {first} to {stop} are no range of {fmt.name}'s {fmt.finite_count} finite values")
    done: list[tuple[int, int, Polynomial]] = []
    todo = [(first, stop)]
    with precision(BITS, DEGREE + 3):
        while todo:
            low, high = todo.pop()
            made = model(fmt.value(low), fmt.value(high - 1))
            if made[2] <= tolerance:
                done.append((low, high, made))
            elif high - low == 1:
                raise ProofError(
                    f"no bound of {tolerance} at {fmt.value(low)!r} in {fmt.name}: allow a larger tolerance"
                )
            else:
                middle = _roundest(low, high)
                todo += [(middle, high), (low, middle)]
    return Boxes(
        np.array([low for low, _, _ in done], dtype=np.int64),
        np.array([high for _, high, _ in done], dtype=np.int64),
        np.array([made[0] for _, _, made in done]),
        np.array([made[1] + [0.0] * (DEGREE + 1 - len(made[1])) for _, _, made in done]),
        np.array([made[2] for _, _, made in done]),
    )


def _roundest(low: int, high: int) -> int:
    """The integer strictly between low and high with the most trailing zeros: an octave's end where there is one."""
    if low < 0 < high:
        return 0
    shift = (low ^ (high - 1)).bit_length() - 1
    return (high - 1) >> shift << shift


FAILED: Polynomial = (0.0, [0.0], float("inf"))


def _constant(value: arb) -> Polynomial:
    """The model of a function that is enclosed by one ball."""
    if not value.is_finite():
        return FAILED
    middle = float(value.mid())
    return 0.0, [middle], round_up(value - middle)


def _taylor(lo: float, hi: float, centre: float, terms: list[arb], remainder: arb) -> Polynomial:
    """The polynomial with enclosed coefficients `terms` around the centre, and its bound over [lo, hi]."""
    radius = (arb(hi) - centre).abs_upper().max((arb(lo) - centre).abs_upper())
    rounded = [float(a.mid()) for a in terms]
    unit = arb(UNIT) / (1 - 3 * len(terms) * arb(UNIT))
    bound = remainder.abs_upper() * radius ** len(terms)
    for k, (p, a) in enumerate(zip(rounded, terms, strict=True)):
        bound += ((a - p).abs_upper() + (3 * k + 1) * unit * abs(p)) * radius**k
    bound += len(terms) * arb(2) ** -1073 * radius.max(arb(1)) ** len(terms)
    return centre, rounded, round_up(bound)


def _direct(formula: Formula, lo: float, hi: float, tolerance: float, order: int) -> Polynomial:
    """The model of f or f' over an interval of x."""

    def series(x: arb, count: int) -> list[arb]:
        f = formula.evaluate(variable(x, count + order), SERIES)
        return coefficients(f.derivative() if order else f)

    over = series(arb(lo).union(arb(hi)), DEGREE + 2)
    constant = _constant(over[0])
    if constant[2] <= tolerance:
        return constant
    if order == 0 and lo > 0:
        identity = _identity(formula, lo, hi)
        if identity[2] <= tolerance:
            return identity
    centre = _middle(lo, hi)
    return _taylor(lo, hi, centre, series(arb(centre), DEGREE + 1), over[DEGREE + 1])


def _identity(formula: Formula, lo: float, hi: float) -> Polynomial:
    """The model f(x) = x, exact in float64; f - x changes by at most sup|f' - 1| over the box."""
    wide = BITS + 2 * max(0, int(np.frexp(hi)[1]))
    with precision(wide):
        slope = coefficients(formula.evaluate(variable(arb(lo).union(arb(hi)), 2), SERIES))[1]
        at = formula.evaluate(variable(arb(lo), 1), SERIES)
        gap = coefficients(at)[0] - lo + (slope - 1) * (arb(hi) - lo) * arb(0.5, 0.5)
        return 0.0, [0.0, 1.0], round_up(gap)


def _middle(lo: float, hi: float) -> float:
    """A float64 about halfway, never outside."""
    return min(max(lo / 2 + hi / 2, lo), hi)


class _Branch:
    """g on one piece, by series reversion of f around the inverse of a box's centre."""

    def __init__(self, formula: Formula, fmt: Format, index: int) -> None:
        self.formula, self.fmt, self.index = formula, fmt, index
        branch = piece_of(formula, index)
        ends = ((-1, branch.left, branch.left_limit), (1, branch.right, branch.right_limit))
        self.limits = {float(y): to_arb(limit(formula, sign, 1)) for sign, x, y in ends if isinf(x) and not isinf(y)}
        self.rising = branch.increasing
        self.solved: dict[float, arb] = {}
        self.known: list[float] = []

    def inverse(self, y: float) -> arb:
        """The inverse of y, sought between those already known of the nearest y on both sides."""
        if y not in self.solved:
            place = bisect(self.known, y)
            bracket = None
            if 0 < place < len(self.known):
                ends = [self.solved[at].mid() for at in self.known[place - 1 : place + 1]]
                bracket = (ends[0], ends[1]) if self.rising else (ends[1], ends[0])
            self.solved[y] = invert(self.formula, arb(y), self.index, BITS, bracket)
            self.known.insert(place, y)
        return self.solved[y]

    def model(self, lo: float, hi: float, tolerance: float) -> Polynomial:
        """The polynomial of g over the floats from lo to hi."""
        inner, limits = self._inside(lo, hi)
        if inner is None:
            return _constant(reduce(arb.union, limits))
        x = self.inverse(inner[0]).union(self.inverse(inner[1]))
        f = self.formula.evaluate(variable(x, DEGREE + 3), SERIES)
        constant = _constant(reduce(arb.union, limits, coefficients(f)[1]))
        if constant[2] <= tolerance:
            return constant
        over = self._reverted(f)
        if limits or over is None:
            return FAILED
        centre = _middle(lo, hi)
        at = self._reverted(self.formula.evaluate(variable(self.inverse(centre), DEGREE + 2), SERIES))
        return _taylor(lo, hi, centre, at, over[DEGREE + 1]) if at is not None else FAILED

    def _inside(self, lo: float, hi: float) -> tuple[tuple[float, float] | None, list[arb]]:
        """The ends of the box without the floats (±0 are two) that equal a limit at infinity, and g at those limits."""
        limits = [self.limits[y] for y in {lo, hi} if y in self.limits]
        low, high = self.fmt.ordinal(lo), self.fmt.ordinal(hi)
        while low <= high and self.fmt.value(low) in self.limits:
            low += 1
        while high >= low and self.fmt.value(high) in self.limits:
            high -= 1
        return (None if low > high else (self.fmt.value(low), self.fmt.value(high))), limits

    @staticmethod
    def _reverted(f: arb_series) -> list[arb] | None:
        """Taylor coefficients of f' as a function of f - f(c), from those of f; None where f' may vanish."""
        slope = coefficients(f)[1]
        if not slope.is_finite() or slope.contains(0):
            return None
        inner = arb_series([0, *coefficients(f)[1:]], prec=f.prec).reversion()
        outer = f.derivative()
        return coefficients(compose(outer, coefficients(inner)[: outer.prec]))
