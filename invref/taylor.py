"""Taylor boxes: piecewise polynomials in float64 with a proved error bound, the fast stand-in for the exact functions.

A box holds consecutive floats [lo, hi], a centre c and coefficients p_0 … p_n. For a float v of the box, d is v - c
rounded to float64, and p(d) is evaluated there by Horner's rule, fused or not. Its distance from the truth is at most

    Σ |p_k - a_k| r^k               the true Taylor coefficients a_k are enclosed, and rounded to float64
  + |a_{n+1}(box)| r^(n+1)          Lagrange's remainder: that coefficient, enclosed over the whole box
  + Σ (3k + 1) u' |p_k| r^k         rounding: 2k + 1 times in Horner's rule, k times in d; u' = u / (1 - 3(n+1) u)
  + (n+1) 2^-1073 max(1, r)^(n+1)   underflow

with r ≥ |v - c| and u = 2^-53 (Higham, Accuracy and Stability of Numerical Algorithms, section 5.1). A range that
misses the tolerance is split where the ordinal has most trailing zeros, so that boxes are aligned to octaves, and no
box holds values from both sides of a break. Where the function is a constant, or a straight line, to within the
tolerance, one box serves. A relative tolerance is times the least |value| in the box, but at least times a floor.
This module must not know decoders.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise
from math import inf, isfinite, isinf

import numpy as np
import numpy.typing as npt
from flint import arb, arb_series

from invref.enclosure import invert, over, round_down, round_up
from invref.engines import ARB, SERIES, coefficients, compose, precision, to_arb, variable
from invref.errors import ProofError, RangeError
from invref.formats import Format
from invref.formulas import Branch, Formula, get
from invref.intervals import Interval
from invref.language import Break, rational
from invref.pieces import branch_of, ends, limit
from invref.pieces import piece as piece_of
from invref.signs import Box, tidy

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DEGREE = 7
TOLERANCE = 1e-12
BITS = 128
UNIT = 2.0**-53
AT_END = 2.0**-64
"""A y nearer to the value at an end than this share of it counts as that value: gelu_10 stores 10 for 10 - 8e-23."""
BLURRED = 4
"""Bits of f' over a box below which f is expanded at the box's midpoint."""
SHARED = 1024
"""Boxes of fewer floats keep their own ends; wider ones share the next float with their neighbour."""
FAR = 16.0
"""Boxes whose ends add up to more are tried with intervals too."""


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


@dataclass(frozen=True)
class Polynomial:
    """The polynomial of one box, its bound, and a lower bound of the |value| that it stands for."""

    centre: float
    terms: list[float]
    bound: float
    least: float = 0.0


Model = Callable[[float, float], Polynomial]
"""Makes the polynomial of the box [lo, hi] of floats; an infinite bound says that none was found."""


def derivative_boxes(
    formula: str | Formula, fmt: Format, first: int, stop: int, tolerance: float = TOLERANCE, relative: bool = False
) -> Boxes:
    """Boxes of f'(x) over the ordinals [first, stop) of x; at a break, of the branch that owns it.

    `relative`: for slopes beyond 1 the tolerance is relative to them. ProofError when it is out of reach.
    """
    formula = get(formula)
    aim = _Aim(tolerance, 1.0 if relative else None)
    return _build(fmt, first, stop, aim, lambda lo, hi: _direct(formula, lo, hi, aim, 1), _cuts(formula, fmt))


def value_boxes(
    formula: str | Formula, fmt: Format, first: int, stop: int, tolerance: float = TOLERANCE, relative: bool = False
) -> Boxes:
    """Boxes of f(x), as `derivative_boxes`; `relative`: to the value itself, down to the smallest normal number."""
    formula = get(formula)
    aim = _Aim(tolerance, 2.0**fmt.emin if relative else None)
    return _build(fmt, first, stop, aim, lambda lo, hi: _direct(formula, lo, hi, aim, 0), _cuts(formula, fmt))


def output_boxes(
    formula: str | Formula,
    fmt: Format,
    piece: int,
    first: int,
    stop: int,
    tolerance: float = TOLERANCE,
    relative: bool = False,
) -> Boxes:
    """Boxes of g(y, piece) = f'(f⁻¹(y)) over the ordinals [first, stop) of y; `relative` as in `derivative_boxes`.

    A y at the limit of f at infinity, such as the -0.0 of a left tail, decodes to the limit of f', and one at an end
    that is known exactly to f' there. RangeError when some other y is outside the piece's range, and on a plateau;
    ProofError when the tolerance is out of reach, as it is within a few ulp of a turning value.
    """
    aim = _Aim(tolerance, 1.0 if relative else None)
    branch = _Branch(get(formula), fmt, piece, stop)
    return _build(fmt, first, stop, aim, lambda lo, hi: branch.model(lo, hi, aim), [])


@dataclass(frozen=True)
class _Aim:
    """The error that is allowed: absolute, or relative to the least |value| of a box with a floor under it."""

    tolerance: float
    floor: float | None

    def allows(self, made: Polynomial) -> bool:
        if self.floor is None:
            return made.bound <= self.tolerance
        return made.bound <= self.tolerance * max(made.least, self.floor)


def _cuts(formula: Formula, fmt: Format) -> list[int]:
    """For each break, the first ordinal whose value belongs to the branch on its right."""
    cuts = []
    for border in formula.breaks:
        ordinal = max(min(fmt.ordinal(float(border.at)), fmt.largest_ordinal), fmt.first_ordinal)
        while ordinal > fmt.first_ordinal and _is_right(_value(fmt, ordinal - 1), border):
            ordinal -= 1
        while ordinal <= fmt.largest_ordinal and not _is_right(_value(fmt, ordinal), border):
            ordinal += 1
        cuts.append(ordinal)
    return cuts


def _is_right(x: float, border: Break) -> bool:
    return x > border.at or (x == border.at and border.right_owns)


def _build(fmt: Format, first: int, stop: int, aim: _Aim, model: Model, cuts: list[int]) -> Boxes:
    if not fmt.first_ordinal <= first < stop <= fmt.largest_ordinal + 1:
        raise RangeError(f"ordinals {first} to {stop} are no range of {fmt.name}'s {fmt.finite_count} finite values")
    done: list[tuple[int, int, Polynomial]] = []
    edges = [first, *(cut for cut in cuts if first < cut < stop), stop]
    todo = list(pairwise(edges))[::-1]
    with precision(BITS, DEGREE + 3):
        while todo:
            low, high = todo.pop()
            made = model(_value(fmt, low), _value(fmt, high - 1))
            if aim.allows(made):
                done.append((low, high, made))
            elif high - low == 1:
                raise ProofError(
                    f"no bound of {aim.tolerance} at {_value(fmt, low)!r} in {fmt.name}: allow a larger tolerance"
                )
            else:
                middle = _roundest(low, high)
                todo += [(middle, high), (low, middle)]
    return Boxes(
        np.array([low for low, _, _ in done], dtype=np.int64),
        np.array([high for _, high, _ in done], dtype=np.int64),
        np.array([made.centre for _, _, made in done]),
        np.array([made.terms + [0.0] * (DEGREE + 1 - len(made.terms)) for _, _, made in done]),
        np.array([made.bound for _, _, made in done]),
    )


def _roundest(low: int, high: int) -> int:
    """The integer strictly between low and high with the most trailing zeros: an octave's end where there is one."""
    if low < 0 < high:
        return 0
    shift = (low ^ (high - 1)).bit_length() - 1
    return (high - 1) >> shift << shift


FAILED = Polynomial(0.0, [0.0], inf)


def _constant(value: arb) -> Polynomial:
    """The model of a function that is enclosed by one ball."""
    if not value.is_finite():
        return FAILED
    middle = float(value.mid())
    return Polynomial(0.0, [middle], round_up(value - middle), round_down(value))


def _taylor(lo: float, hi: float, centre: float, terms: list[arb], remainder: arb) -> Polynomial:
    """The polynomial with enclosed coefficients `terms` around the centre, and its bound over [lo, hi]."""
    radius = (arb(hi) - centre).abs_upper().max((arb(lo) - centre).abs_upper())
    rounded = [float(a.mid()) for a in terms]
    if not np.isfinite(rounded).all():
        return FAILED
    unit = arb(UNIT) / (1 - 3 * len(terms) * arb(UNIT))
    rest = remainder.abs_upper() * radius ** len(terms)
    bound = rest
    for k, (p, a) in enumerate(zip(rounded, terms, strict=True)):
        bound += ((a - p).abs_upper() + (3 * k + 1) * unit * abs(p)) * radius**k
    bound += len(terms) * arb(2) ** -1073 * radius.max(arb(1)) ** len(terms)
    rest += sum((a.abs_upper() * radius**k for k, a in enumerate(terms[1:], start=1)), arb(0))
    least = terms[0].abs_lower() - rest
    return Polynomial(centre, rounded, round_up(bound), round_down(least) if least > 0 else 0.0)


def _direct(formula: Formula, lo: float, hi: float, aim: _Aim, order: int) -> Polynomial:
    """The model of f or f' over an interval of x."""
    branch = formula.branches[formula.branch_of(lo)]

    def series(x: arb, count: int) -> list[arb]:
        f = branch.evaluate(variable(x, count + order), SERIES)
        if not isinstance(f, arb_series):
            f = arb_series([f], prec=count + order)
        return coefficients(f.derivative() if order else f)

    over = series(arb(lo).union(arb(hi)), DEGREE + 2)
    constant = _constant(over[0])
    if aim.allows(constant):
        return constant
    if abs(lo + hi) > FAR:
        for model in (_level, _line):
            made = model(branch, lo, hi, order)
            if aim.allows(made):
                return made
    if order == 0 and lo > 0:
        identity = _identity(branch, lo, hi)
        if aim.allows(identity):
            return identity
    centre = _middle(lo, hi)
    return _taylor(lo, hi, centre, series(arb(centre), DEGREE + 1), over[DEGREE + 1])


def _level(branch: Branch, lo: float, hi: float, order: int) -> Polynomial:
    """A constant, where the function is monotone over the box: all its values lie between those at the ends."""
    box = Box(arb(lo), arb(hi))
    change = branch.derivative(order + 1)
    if not box.sign(change) and not box.sign(tidy(change)):
        return FAILED
    with precision(_wide(lo, hi)):
        ends = [branch.evaluate(arb(x), ARB, order) for x in (lo, hi)]
        return _constant(ends[0].union(ends[1]))


def _wide(lo: float, hi: float) -> int:
    """Bits that survive when numbers as large as the box's cancel to numbers near 1."""
    return BITS + 2 * max(0, int(np.frexp(max(abs(lo), abs(hi)))[1]))


def _line(branch: Branch, lo: float, hi: float, order: int) -> Polynomial:
    """A constant for f', or a straight line for f, from intervals that hold where balls overflow or lose the sign."""
    slopes = _ball(Box(arb(lo), arb(hi)).bounds(branch.derivative(1)))
    if order == 1:
        return _constant(slopes)
    if not slopes.is_finite():
        return FAILED
    centre = _middle(lo, hi)
    value = branch.evaluate(arb(centre), ARB)
    if not value.is_finite():
        value = _ball(Box(arb(centre), arb(centre)).bounds(branch.expression))
    radius = (arb(hi) - centre).abs_upper().max((arb(lo) - centre).abs_upper())
    # Of the error in the slope only its size is known: it is an error of the value, at most `radius` times as large.
    made = _taylor(lo, hi, centre, [value, slopes.mid()], arb(0))
    spread = round_up(slopes - slopes.mid()) * round_up(radius) * (1 + 2.0**-50)
    return Polynomial(made.centre, made.terms, (made.bound + spread) * (1 + 2.0**-50), max(made.least - spread, 0.0))


def _ball(values: Interval) -> arb:
    if not values.is_finite:
        return arb("nan")
    return values.low.union(values.high)


def _identity(branch: Branch, lo: float, hi: float) -> Polynomial:
    """The model f(x) = x, exact in float64; f - x changes by at most sup|f' - 1| over the box."""
    with precision(_wide(lo, hi)):
        slope = _ball(Box(arb(lo), arb(hi)).bounds(branch.derivative(1)))
        gap = _ball(Box(arb(lo), arb(lo)).bounds(branch.expression)) - lo
        gap = gap + (slope - 1) * (arb(hi) - lo) * arb(0.5, 0.5)
        return Polynomial(0.0, [0.0, 1.0], round_up(gap), lo)


def _middle(lo: float, hi: float) -> float:
    """A float64 about halfway, never outside."""
    return min(max(lo / 2 + hi / 2, lo), hi)


@lru_cache(maxsize=1 << 16)
def _value(fmt: Format, ordinal: int) -> float:
    return fmt.value(ordinal)


class _Branch:
    """g on one piece, by series reversion of f around the inverse of a box's centre."""

    def __init__(self, formula: Formula, fmt: Format, index: int, stop: int) -> None:
        self.formula, self.fmt, self.index, self.stop = formula, fmt, index, stop
        part = piece_of(formula, index)
        self.branch = branch_of(formula, index)
        sides = ((-1, part.left, part.left_limit), (1, part.right, part.right_limit))
        self.limits = {float(y): to_arb(limit(formula, sign, 1)) for sign, x, y in sides if isinf(x) and not isinf(y)}
        for end in ends(formula, index):
            if end.mark.exact is not None and abs(float(end.y) - end.y) <= abs(end.y) * AT_END:
                with precision(BITS):
                    x = to_arb(rational(end.mark.exact))
                    self.limits[float(end.y)] = arb(0) if end.order > 1 else self.branch.evaluate(x, ARB, 1)
        self.rising = part.increasing
        self.solved: dict[float, arb] = {}
        self.known: list[float] = []

    def inverse(self, y: float) -> arb:
        """The inverse of y, sought between those already known of the nearest y on both sides."""
        if y not in self.solved:
            place = bisect(self.known, y)
            bracket = None
            if 0 < place < len(self.known):
                near = self.known[place - 1 : place + 1]
                below, above = (self.solved[at].mid() for at in near)
                share = (y - near[0]) / (near[1] - near[0]) if near[1] - near[0] < inf else 0.5
                start = (below + (above - below) * min(max(share, 2.0**-20), 1 - 2.0**-20)).mid()
                bracket = (below, above, start) if self.rising else (above, below, start)
            self.solved[y] = self._invert(y, bracket)
            self.known.insert(place, y)
        return self.solved[y]

    def _invert(self, y: float, bracket: tuple[arb, arb, arb] | None) -> arb:
        """The inverse, with more bits where f - y cancels, as it does near an end of a high order."""
        for bits in (BITS, 2 * BITS, 8 * BITS):
            try:
                return invert(self.formula, arb(y), self.index, bits, bracket)
            except ProofError:
                continue
        return invert(self.formula, arb(y), self.index, 32 * BITS)

    def model(self, lo: float, hi: float, aim: _Aim) -> Polynomial:
        """The polynomial of g over the floats from lo to hi."""
        inner, limits = self._inside(lo, hi)
        if inner is None:
            return _constant(reduce(arb.union, limits))
        x = self.inverse(inner[0]).union(self.inverse(self._shared(*inner)))
        f = self._series(x, DEGREE + 3)
        constant = _constant(reduce(arb.union, limits, coefficients(f)[1]))
        if not isfinite(constant.bound):
            slopes = Box(x.lower(), x.upper()).bounds(self.branch.derivative(1))
            constant = _constant(reduce(arb.union, limits, _ball(slopes)))
        if aim.allows(constant):
            return constant
        around = self._reverted(f)
        if limits or around is None:
            return FAILED
        centre = _middle(lo, hi)
        at = self._reverted(self._series(self.inverse(centre), DEGREE + 2))
        return _taylor(lo, hi, centre, at, around[DEGREE + 1]) if at is not None else FAILED

    def _shared(self, lo: float, hi: float) -> float:
        """An end of the box that its right neighbour has too: the next float, where the box is wide enough."""
        after = self.fmt.ordinal(hi) + 1
        if after >= self.stop or after - self.fmt.ordinal(lo) < SHARED or _value(self.fmt, after) in self.limits:
            return hi
        return _value(self.fmt, after)

    def _series(self, x: arb, terms: int) -> arb_series:
        """f over a ball; expanded at its midpoint where the slope would come out with hardly a digit."""
        f: arb_series = self.branch.evaluate(variable(x, terms), SERIES)
        if not x.is_exact() and coefficients(f)[1].rel_accuracy_bits() < BLURRED:
            sharper = over(self.branch, x, terms)
            if coefficients(sharper)[1].rel_accuracy_bits() > coefficients(f)[1].rel_accuracy_bits():
                return sharper
        return f

    def _inside(self, lo: float, hi: float) -> tuple[tuple[float, float] | None, list[arb]]:
        """The ends of the box without the floats (±0 are two) where a limit or an end tells g, and g there."""
        limits = [self.limits[y] for y in {lo, hi} if y in self.limits]
        low, high = self.fmt.ordinal(lo), self.fmt.ordinal(hi)
        while low <= high and _value(self.fmt, low) in self.limits:
            low += 1
        while high >= low and _value(self.fmt, high) in self.limits:
            high -= 1
        return (None if low > high else (_value(self.fmt, low), _value(self.fmt, high))), limits

    @staticmethod
    def _reverted(f: arb_series) -> list[arb] | None:
        """Taylor coefficients of f' as a function of f - f(c), from those of f; None where f' may vanish."""
        slope = coefficients(f)[1]
        if not slope.is_finite() or slope.contains(0):
            return None
        inner = arb_series([0, *coefficients(f)[1:]], prec=f.prec).reversion()
        outer = f.derivative()
        return coefficients(compose(outer, coefficients(inner)[: outer.prec]))
