"""Proof in Arb: balls around the same quantities as `reference`, the signed root as a power series, and sup-norms.

Every ball returned contains the true value. An inverse is proved by interval Newton: if N(X) = m - (f(m) - y)/f'(X)
lies inside X, exactly one solution is in X, and it is in N(X). This module must not know any float format or decoder.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import lru_cache
from math import factorial, inf
from typing import Any

import mpmath
from flint import arb, arb_series, ctx

from invref.balls import binomial_shift
from invref.engines import ARB, SERIES, coefficients, compose, precision, to_arb, variable
from invref.errors import ProofError, RangeError
from invref.formulas import Branch, Formula, get
from invref.language import rational
from invref.pieces import End, branch_of, ends, landmarks, turning_points
from invref.pieces import piece as piece_of
from invref.reference import ROUNDED, bracketed_newton

GUARD_BITS = 32
MOST_BITS = 1 << 15
"""Working precision at which a result that still is too wide is given up."""
FARTHEST = arb(2) ** 40_000
"""How far out an end of a bracket is sought."""
WIDENINGS = (1, 4, 16, 64)
"""Factors by which the ball around an approximate inverse is widened before its proof is given up."""
NEAR = 0.03125
"""Closer than this to a turning point, the signed root is expanded around the turning point itself."""
NARROW = 2.0**-30
"""A ball of smaller radius counts as a point: cancellation near x* costs it more than width does."""
FAR = 0.25
"""Wide balls out to here are expanded around the turning point too."""
EXTRA_TERMS = 16
"""Terms of that expansion beyond those asked for: its remainder is about NEAR^EXTRA_TERMS."""
SUP_BITS = 128
SUP_ORDER = 10
MOST_BOXES = 4000


def value(formula: str | Formula, x: Any, digits: int = 50) -> arb:
    """A ball that contains f(x), of relative radius ≤ 10^-digits when x is exact, else for all x in the ball."""
    return _evaluate(get(formula), 0, to_arb(x), digits)


def derivative(formula: str | Formula, x: Any, digits: int = 50) -> arb:
    """A ball that contains f'(x), as `value`."""
    return _evaluate(get(formula), 1, to_arb(x), digits)


def second_derivative(formula: str | Formula, x: Any, digits: int = 50) -> arb:
    """A ball that contains f''(x), as `value`."""
    return _evaluate(get(formula), 2, to_arb(x), digits)


def inverse(formula: str | Formula, y: Any, piece: int, digits: int = 50) -> arb:
    """A ball of relative radius ≤ 10^-digits that contains the x on that piece with f(x) = y.

    RangeError when y is outside the piece's range, and on a plateau. A y that misses the value at an end of the piece
    by less than `digits` digits can show counts as that value. ProofError when existence or uniqueness is not proved.
    """
    formula, target = get(formula), to_arb(y)
    end = at_end(formula, target, piece, digits)
    if end is not None:
        return end
    return _refine(digits, lambda bits: invert(formula, target, piece, bits), target.is_exact())


def derivative_from_output(formula: str | Formula, y: Any, piece: int, digits: int = 50) -> arb:
    """A ball of relative radius ≤ 10^-digits around g(y, piece) = f'(f⁻¹(y)); around 0 at the turning value."""
    formula, target = get(formula), to_arb(y)
    branch = branch_of(formula, piece)
    end = at_end(formula, target, piece, digits)
    if end is not None:
        return _evaluate(branch, 1, end, digits)
    return _refine(
        digits, lambda bits: branch.evaluate(invert(formula, target, piece, bits), ARB, 1), target.is_exact()
    )


@lru_cache(maxsize=256)
def turning_point(formula: str | Formula, index: int, digits: int = 50) -> tuple[arb, arb]:
    """Balls that contain the turning point that is landmark `index` and the turning value, to `digits` digits.

    RangeError when there is no such turning point.
    """
    formula = get(formula)
    turns = turning_points(formula, digits)
    if all(turn.index != index for turn in turns):
        raise RangeError(f"{formula.name} has no turning point {index}: it has {len(turns)}")
    branch = branch_of(formula, index)
    x = _landmark(formula, index, digits)
    with precision(_bits(digits) + 2 * GUARD_BITS):
        return x, branch.evaluate(x, ARB)


@lru_cache(maxsize=256)
def _landmark(formula: Formula, index: int, digits: int) -> arb:
    """A ball that contains the x of a landmark, to `digits` digits."""
    mark = landmarks(formula, digits)[index]
    with precision(_bits(digits) + 2 * GUARD_BITS):
        if mark.exact is not None:
            return to_arb(rational(mark.exact))
        branch, middle = branch_of(formula, index), to_arb(mark.x)
        box = arb(middle, (abs(middle) + 1) * arb(10) ** -(digits + 5))
        # Newton on f': pieces proved that there is one turning point near, this proves that it is in the box.
        newton = middle - branch.evaluate(middle, ARB, 1) / branch.evaluate(box, ARB, 2)
        if not box.contains_interior(newton):
            raise ProofError(f"turning point {index} of {formula.name} is not enclosed: ask for fewer digits")
        return newton


def at_end(formula: Formula, y: arb, index: int, digits: int) -> arb | None:
    """A ball around the end of the piece that contains the inverse of y, when `digits` digits cannot tell y from y*.

    With h the ball's radius, f changes at least by min|f''| h²/2 inside it, so a y closer to the turning value y* is
    taken there; an end that is known exactly is taken for its own value only. A y beyond y* has no inverse, but counts
    as y* when it is out by its own rounding.
    """
    branch = branch_of(formula, index)
    for end in ends(formula, index):
        fine = 2 * max(digits, ROUNDED)
        x = _landmark(formula, end.mark.index, fine)
        with precision(_bits(fine)):
            value_there = branch.evaluate(x, ARB)
            inside = (y - value_there) * (1 if end.above else -1)
            radius = (x.abs_lower() if x.abs_lower() > 0 else arb(1)) * arb(10) ** -digits / 4
            if end.mark.exact is None:
                box = arb(x.mid(), radius.upper() + x.rad())
                reached = branch.evaluate(box, ARB, 2).abs_lower() * radius * radius / 2
            else:
                box, reached = x, arb(0)
            rounded = value_there.abs_lower() * arb(10) ** -max(digits, ROUNDED)
            exactly = y.is_exact() and y.is_finite() and inside.contains(0)
            if exactly or (-inside < rounded and inside < reached):
                return box
    return None


def invert(formula: Formula, y: arb, index: int, bits: int, bracket: tuple[arb, arb, arb] | None = None) -> arb:
    """The inverse at `bits` bits of working precision, proved; its radius is whatever that gives.

    `bracket` narrows the search when the caller knows two points of the piece around the solution, and a guess.
    """
    with precision(bits):
        middle_y, rising, branch = y.mid(), piece_of(formula, index).increasing, branch_of(formula, index)
        low, high, start = _bracket(formula, middle_y, index) if bracket is None else bracket

        def residual(at: arb) -> tuple[arb, arb]:
            series = coefficients(branch.evaluate(variable(at, 2), SERIES))
            gap = series[0] - middle_y
            return arb(0) if gap.contains(0) else gap.mid(), series[1].mid()

        tolerance = arb(2) ** (GUARD_BITS // 4 - bits)
        x = bracketed_newton(residual, low, high, rising, tolerance, start, arb.mid)
        return _certify(formula, y, index, x, bits)


def _certify(formula: Formula, y: arb, index: int, x: arb, bits: int) -> arb:
    """A ball around the inverse near the approximate inverse x, proved to be on the piece."""
    branch = branch_of(formula, index)
    error = branch.evaluate(x, ARB) - y
    newton = x if error.is_zero() else _interval_newton(branch, x, error, bits)
    if newton is None or not _on_piece(formula, index, newton, bits):
        raise ProofError(f"the inverse of {formula.name} at y = {y.str(20)} on piece {index} is not proved")
    return newton


def _interval_newton(branch: Branch, x: arb, error: arb, bits: int) -> arb | None:
    """A ball that holds the one zero near x of f - y, given error = f(x) - y; None when that is not proved."""
    radius = (error / branch.evaluate(x, ARB, 1)).abs_upper() * 2 + abs(x) * arb(2) ** -bits
    for widening in WIDENINGS:
        box = arb(x, radius * widening)
        newton = x - error / branch.evaluate(box, ARB, 1)
        if newton.is_finite() and box.contains_interior(newton):
            return newton
    return None


def _on_piece(formula: Formula, index: int, x: arb, bits: int) -> bool:
    """Whether a ball surely lies between the landmarks that bound a piece."""
    for end in ends(formula, index):
        at = _landmark(formula, end.mark.index, int(bits / 3.3))
        if not (x > at if end.side < 0 else x < at):
            return False
    return True


def _bracket(formula: Formula, y: arb, index: int) -> tuple[arb, arb, arb | None]:
    """Points around the inverse on an unbounded or bounded piece, and a start for Newton near an end where f' is 0."""
    digits = int(ctx.prec * 0.6)
    part, branch = piece_of(formula, index, digits), branch_of(formula, index)
    low, high = to_arb(part.left), to_arb(part.right)
    lowest, highest = sorted((part.left_limit, part.right_limit))
    if not to_arb(lowest) < y < to_arb(highest):
        raise RangeError(
            f"y = {y.str(20)} is outside the range of {formula.name} on piece {index}, "
            f"({mpmath.nstr(lowest, 20)}, {mpmath.nstr(highest, 20)}): choose a y inside, or another piece"
        )
    start = None
    for end in ends(formula, index, digits):
        if end.order > 1:
            distance = _distance(branch, y, end)
            if distance < 0.5:
                start = (to_arb(end.mark.x) - end.side * distance).mid()
    above = 1 if part.increasing else -1
    origin = next((end for end in (low, high) if end.is_finite()), arb(0))
    reach = arb(1)
    while not low.is_finite() or not high.is_finite():
        if not low.is_finite() and above * (branch.evaluate((origin - reach).mid(), ARB) - y) < 0:
            low = (origin - reach).mid()
        if not high.is_finite() and above * (branch.evaluate((origin + reach).mid(), ARB) - y) > 0:
            high = (origin + reach).mid()
        reach *= reach if reach > 2 else 2
        if reach > FARTHEST:
            raise ProofError(f"y = {y.str(20)} is too close to a limit of {formula.name}: ask for more digits")
    return low, high, start if start is not None and low < start < high else None


def _distance(branch: Branch, y: arb, end: End) -> arb:
    """About how far from an end f takes the value y, from the first derivative that is not 0 there."""
    leading = branch.evaluate(to_arb(end.mark.x), ARB, end.order).mid() / factorial(end.order)
    return (abs((y - to_arb(end.y)) / leading)).root(end.order).mid()


def _bits(digits: int) -> int:
    return int(digits * 3.33) + GUARD_BITS


def _evaluate(function: Formula | Branch, order: int, x: arb, digits: int) -> arb:
    return _refine(digits, lambda _: function.evaluate(x, ARB, order), x.is_exact())


def _refine(digits: int, attempt: Callable[[int], arb], exact: bool) -> arb:
    """Repeat at twice the precision until the ball is narrow enough; once only when the input itself is a ball."""
    bits = _bits(digits)
    while True:
        with precision(bits):
            try:
                ball = attempt(bits)
                if not exact or ball.is_zero() or ball.rel_accuracy_bits() >= digits * 3.3220:
                    return ball
            except ProofError:
                if not exact or bits > MOST_BITS:
                    raise
        if bits > MOST_BITS:
            raise ProofError(f"{digits} digits need more than {MOST_BITS} bits: ask for fewer")
        bits *= 2


def signed_root(formula: str | Formula, index: int, x: arb_series) -> arb_series:
    """The series of t = ±sqrt(|f(x) - y*|) around turning point `index`, minus on its left.

    Valid for a ball as the constant term of x: every coefficient of the result is an enclosure over that ball.
    A narrow ball away from x* takes sqrt(f - y*). Otherwise t = (x - x*) sqrt(q), with q = (f - y*)/(x - x*)² expanded
    around x*. Its coefficients come from q(x) = ∫ (1-s) f''(x* + s(x - x*)) ds over s in [0, 1]: the k-th Taylor
    coefficient of q at a point is an average of (k+2)-nd Taylor coefficients of f between x* and that point.
    """
    formula, count = get(formula), x.prec
    inner = coefficients(x)
    point, turning_value = turning_point(formula, index, int(ctx.prec / 3.3))
    sign = 1 if landmarks(formula)[index].minimum else -1
    branch = branch_of(formula, index)
    step = inner[0] - point
    if step.abs_lower() > NEAR and (step.rad() < NARROW or step.abs_upper() > FAR):
        root = (sign * (over(branch, inner[0], count) - turning_value)).sqrt()
        root = root if step > 0 else -root
    else:
        terms = count + EXTRA_TERMS
        with precision(ctx.prec, terms + 2):
            hull = inner[0].union(point)
            around = coefficients(branch.evaluate(variable(point, terms + 1), SERIES))[2:]
            around.append(coefficients(branch.evaluate(variable(hull, terms + 2), SERIES))[-1])
        quotient = arb_series(binomial_shift(around, step, count), prec=count)
        root = variable(step, count) * (sign * quotient).sqrt()
    return compose(root, inner) if any(inner[1:]) else arb_series(coefficients(root)[:1], prec=count)


def over(branch: Branch, x: arb, count: int) -> arb_series:
    """The series of f over a ball, tighter than direct evaluation: expanded at the midpoint, with a remainder."""
    if x.is_exact():
        return branch.evaluate(variable(x, count), SERIES)
    with precision(ctx.prec, count + 1):
        terms = coefficients(branch.evaluate(variable(x.mid(), count), SERIES))
        terms.append(coefficients(branch.evaluate(variable(x, count + 1), SERIES))[-1])
    return arb_series(binomial_shift(terms, x - x.mid(), count), prec=count)


def sup_norm(
    error: Callable[[arb_series], arb_series], a: float, b: float, relative: float = 0.05
) -> tuple[float, float]:
    """Bounds (lower, upper) of the supremum of |error(x)| over [a, b], with upper ≤ (1 + relative) lower.

    The upper bound is proved: on each box a Taylor polynomial at the midpoint, plus a remainder from the series
    over the whole box; the box with the largest bound is halved until the two bounds meet. The lower bound is taken at
    midpoints and ends. ProofError when they do not meet.
    """
    with precision(SUP_BITS, SUP_ORDER + 1):
        lower = max(round_down(coefficients(error(variable(end, 1)))[0]) for end in (a, b))
        heap: list[tuple[float, int, arb, arb]] = []
        todo = [(arb(a), arb(b))]
        for boxes in range(MOST_BOXES):
            for low, high in todo:
                upper, here = _box_bounds(error, low, high)
                lower = max(lower, here)
                heapq.heappush(heap, (-upper, 2 * boxes + len(heap), low, high))
            upper = -heap[0][0]
            if upper <= lower * (1 + relative) and upper < inf:
                return lower, upper
            _, _, low, high = heapq.heappop(heap)
            middle = ((low + high) / 2).mid()
            todo = [(low, middle), (middle, high)]
    raise ProofError(
        f"the sup-norm over [{a}, {b}] is only known to lie in [{lower}, {upper}]: "
        "split the interval, or allow a larger `relative`"
    )


def _box_bounds(error: Callable[[arb_series], arb_series], low: arb, high: arb) -> tuple[float, float]:
    """Upper bound of |error| over [low, high] (infinity when none is found), lower bound of |error| at its midpoint."""
    middle = ((low + high) / 2).mid()
    radius = (high - middle).abs_upper().max((middle - low).abs_upper())
    try:
        at = coefficients(error(variable(middle, SUP_ORDER)))
        over = coefficients(error(variable(low.union(high), SUP_ORDER + 1)))
    except ValueError:  # Arb's answer to a series divided by one that may start with 0
        return inf, 0.0
    bound = arb(0)
    for term in [over[SUP_ORDER], *reversed(at)]:
        bound = bound * radius + term.abs_upper()
    return round_up(bound), round_down(at[0])


def round_up(ball: arb) -> float:
    """A float that no absolute value in the ball exceeds; infinity when the ball is not finite."""
    if not ball.is_finite():
        return inf
    return float(ball.abs_upper()) * (1 + 2.0**-50) + 5e-324


def round_down(ball: arb) -> float:
    """A float that no absolute value in the ball falls below; 0 when the ball is not finite."""
    return float(ball.abs_lower()) * (1 - 2.0**-50) if ball.is_finite() else 0.0
