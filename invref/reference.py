"""The truth in mpmath: value, derivatives, inverse and derivative-from-output, to any number of digits.

Every result carries a residual certificate that was computed with more digits than the result claims. For an
inverse: the residual f(x̂) - y, and an error bound ε such that f - y changes sign within x̂ ± ε, so that the true x
lies there. This is the readable reference; `enclosure` proves the same quantities on another engine.
This module must not know Arb, nor any float format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mpmath
import sympy

from invref.engines import MPMATH
from invref.errors import ProofError, RangeError
from invref.formulas import Branch, Formula, X, get
from invref.pieces import GUARD, End, Piece, branch_of, ends, piece

Number = TypeVar("Number")
"""mpf or exact arb."""
FARTHEST = mpmath.mpf(2) ** 40_000
"""How far out an end of a bracket is sought."""
ROUNDED = 30
"""A y beyond the turning value by less than this many digits (or as many as are asked for) is y*, rounded."""
ATTEMPTS = 8
"""How often the working precision is doubled before giving up."""


@dataclass(frozen=True)
class Certified:
    """A value with its certificate: |value - truth| ≤ error_bound, and |error_bound| ≤ 10^-digits |value|.

    The residual is f(x̂) - y for inverses, and for values the difference between two working precisions.
    """

    value: mpmath.mpf
    residual: mpmath.mpf
    error_bound: mpmath.mpf

    def __str__(self) -> str:
        """The digits that are certified, and the error bound."""
        relative = self.error_bound / abs(self.value) if self.value else mpmath.mpf(0)
        digits = int(-mpmath.log10(relative)) if relative else 50
        return f"{mpmath.nstr(self.value, digits)} ± {mpmath.nstr(self.error_bound, 2)}"


MOST_DIGITS = 10_000


def value(formula: str | Formula, x: Any, digits: int = 50) -> Certified:
    """f(x) to `digits` significant digits. FormulaError for a bad formula, RangeError where f(x) is not real."""
    return _value(get(formula), 0, x, digits)


def derivative(formula: str | Formula, x: Any, digits: int = 50) -> Certified:
    """f'(x), as `value`."""
    return _value(get(formula), 1, x, digits)


def second_derivative(formula: str | Formula, x: Any, digits: int = 50) -> Certified:
    """f''(x), as `value`."""
    return _value(get(formula), 2, x, digits)


def inverse(formula: str | Formula, y: Any, piece: int, digits: int = 50) -> Certified:
    """The x on that piece with f(x) = y, to `digits` significant digits. RangeError when y is outside its range.

    A y that misses the value at an end of the piece by less than `digits` digits can show counts as that value.
    RangeError on a plateau.
    """
    formula, target = get(formula), _number(y, digits)
    work = digits + GUARD
    for _ in range(ATTEMPTS):
        result = _solve(formula, target, piece, digits, work)
        if result is not None:
            return result
        work *= 2
    raise ProofError(f"{formula.name}: no certified inverse of y = {mpmath.nstr(target, 20)}: ask for fewer digits")


def derivative_from_output(formula: str | Formula, y: Any, piece: int, digits: int = 50) -> Certified:
    """g(y, piece) = f'(x) at the x on that piece with f(x) = y; residual f(x̂) - y.

    At the turning value, as far as `digits` digits can tell, it is 0 with an absolute error bound.
    """
    formula, target = get(formula), _number(y, digits)
    branch, end = branch_of(formula, piece), _at_end(formula, target, piece, digits)

    def slope_at(x: mpmath.mpf, count: int) -> Certified:
        return _evaluate(formula.name, branch, 1, x, count)

    if end is not None:
        root = inverse(formula, target, piece, digits)
        if end.order == 1:
            slope = slope_at(root.value, digits)
            return Certified(slope.value, root.residual, slope.error_bound)
        if end.mark.exact is not None:
            return Certified(mpmath.mpf(0), root.residual, mpmath.mpf(0))
        change = slope_at(root.value + root.error_bound, digits)
        # f' is 0 at the turning point itself: what it may be at the true x is bounded by its change, with a factor 2.
        return Certified(mpmath.mpf(0), root.residual, 2 * abs(change.value))
    work = digits + GUARD
    for _ in range(ATTEMPTS):
        root = inverse(formula, target, piece, work)
        with mpmath.workdps(2 * work):
            around = root.value - root.error_bound, root.value + root.error_bound
        slope, *others = (slope_at(at, work) for at in (root.value, *around))
        with mpmath.workdps(2 * work):
            # The slope's change across the interval that holds x; the factor 2 covers what is between its points.
            bound = slope.error_bound + 2 * max(abs(other.value - slope.value) for other in others)
        if bound <= abs(slope.value) * mpmath.mpf(10) ** -digits:
            return Certified(slope.value, root.residual, bound)
        work *= 2
    raise ProofError(f"{formula.name}: g at y = {mpmath.nstr(target, 20)} stays uncertain: ask for fewer digits")


def bracketed_newton(
    function: Callable[[Any], tuple[Any, Any]],
    low: Number,
    high: Number,
    rising: bool,
    tolerance: Number,
    start: Number | None = None,
    clean: Callable[[Any], Any] = lambda number: number,
) -> Number:
    """Root of a monotone function, given as (value, slope), inside [low, high], for any kind of number.

    Newton steps, replaced by bisection where they leave the bracket or do not halve the step before last;
    stops when the step falls below `tolerance` relative to x. `clean` rounds a number after arithmetic.
    """
    a: Any = low
    b: Any = high
    x: Any = clean((a + b) / 2) if start is None else start
    before = last = abs(b - a)
    while True:
        residual, slope = function(x)
        if residual == 0:
            return cast(Number, x)
        if (residual < 0) == rising:
            a = x
        else:
            b = x
        nearer = clean(x - residual / slope) if slope != 0 else a
        if not a < nearer < b or 2 * abs(nearer - x) > before:
            nearer = clean((a + b) / 2)
        before, last = last, abs(nearer - x)
        if last <= tolerance * abs(nearer) or nearer in (a, b):
            return cast(Number, nearer)
        x = nearer


def _number(number: Any, digits: int) -> mpmath.mpf:
    """`number` as an mpf: exactly for floats, integers and mpf, decimal text rounded with a generous guard."""
    if not 1 <= digits <= MOST_DIGITS:
        raise RangeError(f"cannot give {digits} digits: ask for 1 to {MOST_DIGITS:,}")
    with mpmath.workdps(max(2 * digits + GUARD, 400)):
        try:
            result = mpmath.mpf(number.item() if hasattr(number, "item") else number)
        except (TypeError, ValueError):
            raise RangeError(f"{number!r} is not a number: give a float, an integer, an mpf or decimal text") from None
    if not mpmath.isfinite(result):
        raise RangeError(f"{number} is not a finite number: limits are in invref.pieces")
    return result


def _value(formula: Formula, order: int, x: Any, digits: int) -> Certified:
    argument = _number(x, digits)
    return _evaluate(formula.name, formula.branches[formula.branch_of(argument)], order, argument, digits)


def _evaluate(name: str, branch: Branch, order: int, argument: mpmath.mpf, digits: int) -> Certified:
    with mpmath.workdps(digits + GUARD):
        rough = branch.evaluate(argument, MPMATH, order)
    work = digits + GUARD
    for _ in range(ATTEMPTS):
        work *= 2
        with mpmath.workdps(work):
            better = branch.evaluate(argument, MPMATH, order)
            if not isinstance(better, mpmath.mpf) or not mpmath.isfinite(better):
                raise RangeError(f"{name} has no real value at x = {mpmath.nstr(argument, 20)}")
            residual = rough - better
            if not better and not _is_root(branch, order, argument):
                # Two precisions that agree on 0 may both have lost a small value to a difference.
                continue
            if abs(residual) <= abs(better) * mpmath.mpf(10) ** -digits / 2:
                # One unit of the finer precision covers a difference that is lost in both.
                return Certified(better, residual, abs(residual) + abs(better) * mpmath.mpf(10) ** (1 - work))
            rough = better
    raise ProofError(f"{name}: derivative {order} at x = {mpmath.nstr(argument, 20)} does not settle")


def _is_root(branch: Branch, order: int, x: mpmath.mpf) -> bool:
    """Whether sympy proves that the derivative is exactly 0 at x."""
    exact = sympy.Rational(*mpmath.libmp.to_rational(x._mpf_))
    return bool(branch.derivative(order).subs(X, exact).is_zero)


def _at_end(formula: Formula, y: mpmath.mpf, index: int, digits: int) -> End | None:
    """The end of the piece if `digits` digits of x cannot tell y from its value, or y is out by its own rounding."""
    beyond = mpmath.mpf(10) ** -max(digits, ROUNDED)
    for end in ends(formula, index, 2 * max(digits, ROUNDED)):
        with mpmath.workdps(2 * digits + GUARD):
            inside = y - end.y if end.above else end.y - y
            if end.mark.exact is not None:
                reached = mpmath.mpf(0)
            else:
                width = (abs(end.mark.x) or 1) * mpmath.mpf(10) ** -digits / 4
                reached = abs(_curvature(formula, index, end)) / 2 * width**2
            if inside == 0 or -abs(end.y) * beyond < inside < reached:
                return end
    return None


def _curvature(formula: Formula, index: int, end: End) -> mpmath.mpf:
    """The first derivative that is not 0 at an end."""
    return branch_of(formula, index).evaluate(end.mark.x, MPMATH, end.order)


def _solve(formula: Formula, y: mpmath.mpf, index: int, digits: int, work: int) -> Certified | None:
    """One attempt at `work` digits; None when the certificate fails."""
    end, branch = _at_end(formula, y, index, digits), branch_of(formula, index)
    with mpmath.workdps(2 * work):
        if end is not None:
            x = end.mark.x
            width = mpmath.mpf(0) if end.mark.exact is not None else (abs(x) or 1) * mpmath.mpf(10) ** -digits
            return Certified(x, branch.evaluate(x, MPMATH) - y, width)
        zero = mpmath.mpf(0)
        if _inside(zero, piece(formula, index)) and branch.evaluate(zero, MPMATH) == y:
            return Certified(zero, zero, zero)
    with mpmath.workdps(work):
        part = piece(formula, index, max(work, 2 * digits + GUARD))
        low, high, start = _bracket(formula, y, part)
        noise = abs(y) * mpmath.mpf(10) ** (3 - work)

        def residual_and_slope(at: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
            residual = branch.evaluate(at, MPMATH) - y
            return residual if abs(residual) > noise else mpmath.mpf(0), branch.evaluate(at, MPMATH, 1)

        tolerance = mpmath.mpf(10) ** (-digits - GUARD // 2)
        x = bracketed_newton(residual_and_slope, low, high, part.increasing, tolerance, start)
    with mpmath.workdps(2 * work):
        width = abs(x) * mpmath.mpf(10) ** -digits
        before, residual, after = (branch.evaluate(at, MPMATH) - y for at in (x - width, x, x + width))
        certified = before < 0 < after if part.increasing else before > 0 > after
        return Certified(x, residual, width) if certified else None


def _inside(x: mpmath.mpf, part: Piece) -> bool:
    return bool(part.left < x < part.right)


def _bracket(formula: Formula, y: mpmath.mpf, part: Piece) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf | None]:
    """Ends around the inverse of y on a piece, and a start for Newton from the power of x - x* at a near end."""
    branch = branch_of(formula, part.index)
    lowest, highest = sorted((part.left_limit, part.right_limit))
    if not lowest < y < highest:
        raise RangeError(
            f"y = {mpmath.nstr(y, 20)} is outside the range of {formula.name} on piece {part.index}, "
            f"({mpmath.nstr(lowest, 20)}, {mpmath.nstr(highest, 20)}): choose a y inside, or another piece"
        )
    start = None
    for end in ends(formula, part.index, 2 * mpmath.mp.dps):
        if end.order > 1:
            leading = _curvature(formula, part.index, end) / mpmath.factorial(end.order)
            distance = mpmath.root(abs((y - end.y) / leading), end.order)
            if distance < 0.5:
                start = end.mark.x - end.side * distance
    low, high = part.left, part.right
    above = 1 if part.increasing else -1
    origin = next((end for end in (low, high) if mpmath.isfinite(end)), mpmath.mpf(0))
    reach = mpmath.mpf(1)
    while not mpmath.isfinite(low) or not mpmath.isfinite(high):
        if not mpmath.isfinite(low) and above * (branch.evaluate(origin - reach, MPMATH) - y) < 0:
            low = origin - reach
        if not mpmath.isfinite(high) and above * (branch.evaluate(origin + reach, MPMATH) - y) > 0:
            high = origin + reach
        reach *= max(2, reach)
        if reach > FARTHEST:
            raise ProofError(f"y = {mpmath.nstr(y, 20)} is too close to a limit of {formula.name}: ask for more digits")
    return low, high, start if start is not None and low < start < high else None
