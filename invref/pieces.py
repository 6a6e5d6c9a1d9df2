"""Landmarks and monotone pieces of a formula, isolated by a proof that none is missed.

Landmarks are breaks, turning points, and flat points (where f' is 0 and keeps its sign). Each branch is covered, out to
the largest float64, by boxes that are bisected until on each of them `signs` shows that f' has no zero, or that f' is
strictly monotone and so has at most one, which its signs at the ends then decide. Zeros of f' of higher order are
proved at numbers where sympy finds exact zeros, by the first derivative that has none in a neighbourhood. What is
proved: these are all the landmarks with |x| ≤ 1.8e308, and f is smooth between them. The limits at the ends are read
off beyond that, at ±2^1100, with their enclosures. This module must not know inverses.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import mpmath
import sympy
from flint import arb

from invref.engines import ARB, MPMATH, SERIES, coefficients, precision, steps, to_arb, to_mpf, variable
from invref.errors import FormulaError, RangeError
from invref.formulas import Branch, Formula, X, affine_zeros, get
from invref.language import rational
from invref.signs import Box, tidy

PROOF_BITS = 128
POINT_BITS = (PROOF_BITS, 8 * PROOF_BITS, 64 * PROOF_BITS)
"""Precisions at which a value at one point is tried: 2^1100 cancels against a limit at the last of them."""
GUARD = 15
"""Decimal digits kept beyond those asked for."""
MOST_STEPS = 400_000
"""Operations spent on boxes before a formula is refused: some 10,000 boxes of a simple one."""
MOST_PIECES = 16
HIGHEST_ORDER = 16
"""Zeros of f - f(x0) of higher order than this are not looked for."""
FARTHEST = 1024
"""The boxes end at ±2^FARTHEST, just beyond the largest float64."""
ODD = 1.0546875
"""Boxes end at ODD * 2^k and split at ODD/2: a turning point at a round number must not fall on a box's end."""
WIDEST_RATIO = 4
"""A box that spans more than this ratio is split at a power of 2."""
NARROWEST = arb(2) ** -100
"""Where a box of this relative width is undecided, its x is a point that no narrower box will decide."""
LIMIT_AT = 1100
LARGE = arb(2) ** 1000
CORE = 64.0
"""Boxes up to here are decided first, so that a refusal names the nearest trouble."""


@dataclass(frozen=True)
class TurningPoint:
    """A minimum or maximum of f: where, how deep, and f'' there. Accurate to the digits asked for.

    `index` is the number of the landmark; the curvature is 0 where f - y is of higher order than 2.
    """

    index: int
    x: mpmath.mpf
    y: mpmath.mpf
    curvature: mpmath.mpf
    minimum: bool


@dataclass(frozen=True)
class Landmark:
    """What parts two neighbouring pieces: a "turning" point, a "flat" point or a "break".

    f - f(x) is of this order in the distance from x, on both sides of a turning or flat point; 0 at a break.
    """

    index: int
    kind: str
    x: mpmath.mpf
    exact: Fraction | None
    order: int
    minimum: bool


@dataclass(frozen=True)
class Piece:
    """A maximal interval (left, right) without landmarks, and the limits of f at its ends.

    f is strictly monotone there, or constant: a plateau, whose `increasing` means nothing. The ends are "infinity",
    "turning", "flat" or "break"; f minus its limit there is of this order in the distance from the end (0: infinity).
    """

    index: int
    left: mpmath.mpf
    right: mpmath.mpf
    increasing: bool
    left_limit: mpmath.mpf
    right_limit: mpmath.mpf
    branch: int = 0
    plateau: bool = False
    left_end: str = "infinity"
    right_end: str = "infinity"
    left_order: int = 0
    right_order: int = 0


@dataclass(frozen=True)
class End:
    """A finite end of a piece: its landmark, the limit y of f there, and how f - y behaves inside the piece."""

    mark: Landmark
    side: int
    """-1 for the left end, 1 for the right end."""
    y: mpmath.mpf
    order: int
    above: bool
    """Whether f is above y inside the piece."""


@dataclass(frozen=True)
class _Zero:
    """A zero of f' inside a branch: in the box, or exactly at a number; f' has the sign `before` on its left."""

    low: arb
    high: arb
    before: int
    after: int
    exact: Fraction | None = None
    order: int = 2


@dataclass(frozen=True)
class _Proof:
    """The zeros of f' on a branch, from the left, and the orders of f at the branch's finite ends."""

    zeros: tuple[_Zero, ...]
    left_order: int
    right_order: int
    sign: int
    """Of f' on the first piece; 0 on a plateau."""


@lru_cache(maxsize=256)
def turning_points(formula: str | Formula, digits: int = 50) -> tuple[TurningPoint, ...]:
    """All turning points of f at which it is smooth, from the left. FormulaError when they cannot be isolated."""
    formula = get(formula)
    branches = _branch_of_landmark(formula)
    found = []
    for mark in landmarks(formula, digits):
        if mark.kind == "turning":
            with mpmath.workdps(digits + GUARD):
                branch = formula.branches[branches[mark.index]]
                y = branch.evaluate(mark.x, MPMATH)
                curvature = branch.evaluate(mark.x, MPMATH, 2) if mark.order == 2 else mpmath.mpf(0)
                found.append(TurningPoint(mark.index, mark.x, y, curvature, mark.minimum))
    return tuple(found)


@lru_cache(maxsize=256)
def landmarks(formula: str | Formula, digits: int = 50) -> tuple[Landmark, ...]:
    """All landmarks of f, from the left: one between neighbouring pieces."""
    formula = get(formula)
    found: list[Landmark] = []
    proofs = prove(formula)
    for number, (branch, proof) in enumerate(zip(formula.branches, proofs, strict=True)):
        with mpmath.workdps(digits + GUARD):
            for zero in proof.zeros:
                kind = "turning" if zero.before != zero.after else "flat"
                if zero.exact is None:
                    x = _zero_of_slope(branch, to_mpf(zero.low), to_mpf(zero.high), zero.after > 0)
                else:
                    x = _mpf(zero.exact)
                found.append(Landmark(len(found), kind, x, zero.exact, zero.order, zero.after > 0))
            if number < len(formula.breaks):
                at = formula.breaks[number].at
                found.append(Landmark(len(found), "break", _mpf(at), at, 0, False))
    return tuple(found)


@lru_cache(maxsize=256)
def pieces(formula: str | Formula, digits: int = 50) -> tuple[Piece, ...]:
    """The monotone pieces and plateaus of f, numbered from the left; K - 1 landmarks part K of them."""
    formula = get(formula)
    marks = landmarks(formula, digits)
    found: list[Piece] = []
    start: Landmark | None = None
    for number, (branch, proof) in enumerate(zip(formula.branches, prove(formula), strict=True)):
        signs = [proof.sign, *(zero.after for zero in proof.zeros)]
        orders = [proof.left_order, *(zero.order for zero in proof.zeros), proof.right_order]
        for (left_order, right_order), sign in zip(pairwise(orders), signs, strict=True):
            index = len(found)
            stop = marks[index] if index < len(marks) else None
            with mpmath.workdps(digits + GUARD):
                left, right = (
                    limit(formula, side) if mark is None else branch.evaluate(mark.x, MPMATH)
                    for mark, side in ((start, -1), (stop, +1))
                )
            found.append(
                Piece(
                    index,
                    -mpmath.inf if start is None else start.x,
                    mpmath.inf if stop is None else stop.x,
                    sign > 0,
                    left,
                    right,
                    number,
                    sign == 0,
                    "infinity" if start is None else start.kind,
                    "infinity" if stop is None else stop.kind,
                    left_order,
                    right_order,
                )
            )
            start = stop
    return tuple(found)


def piece(formula: str | Formula, index: int, digits: int = 50) -> Piece:
    """The piece with this number; RangeError says how many there are."""
    all_pieces = pieces(get(formula), digits)
    if not 0 <= index < len(all_pieces):
        raise RangeError(f"{get(formula).name} has no piece {index}: its pieces are 0 to {len(all_pieces) - 1}")
    return all_pieces[index]


@lru_cache(maxsize=1024)
def ends(formula: str | Formula, index: int, digits: int = 50) -> tuple[End, ...]:
    """The finite ends of a piece; RangeError on a plateau, where the output does not tell the input."""
    formula = get(formula)
    part, marks = piece(formula, index, digits), landmarks(formula, digits)
    if part.plateau:
        raise RangeError(
            f"{formula.name} is {mpmath.nstr(part.left_limit, 20)} on the whole of piece {index}: "
            "the output does not tell x there; choose another piece"
        )
    found = []
    if part.left_end != "infinity":
        found.append(End(marks[index - 1], -1, part.left_limit, part.left_order, part.increasing))
    if part.right_end != "infinity":
        found.append(End(marks[index], 1, part.right_limit, part.right_order, not part.increasing))
    return tuple(found)


def branch_of(formula: Formula, index: int) -> Branch:
    """The smooth branch on which a piece lies; that of landmark `index` too, when it is a turning or flat point."""
    return formula.branches[piece(formula, index).branch]


@lru_cache(maxsize=256)
def limit(formula: str | Formula, sign: int, order: int = 0) -> mpmath.mpf:
    """Limit of f (or of its derivative of that order) as x goes to ±infinity: a number, or ±infinity.

    Read off enclosures at ±2^550 and ±2^1100. Infinite: beyond 2^500 there, or x times the next derivative tends to
    a number other than 0, as for log(x). 0: below 2^-100 and falling. Any other limit must be reached there to
    PROOF_BITS/2 bits, and is a float when it can be one; FormulaError otherwise.
    """
    formula = get(formula)
    branch = formula.branches[0 if sign < 0 else -1]
    if branch.constant:
        with mpmath.workprec(PROOF_BITS):
            return branch.evaluate(mpmath.mpf(0), MPMATH, order) + mpmath.mpf(0)
    threshold, tiny = arb(2) ** 500, arb(2) ** -100
    for bits in POINT_BITS:
        with precision(bits):
            near, far = (_tail_value(branch, arb(sign) * arb(2) ** k, order) for k in (LIMIT_AT // 2, LIMIT_AT))
            if far.abs_lower() > threshold:
                return mpmath.inf if far > 0 else -mpmath.inf
            if far.abs_upper() < tiny and (
                far.abs_upper() < near.abs_lower() * tiny or near.abs_upper() < 1 / threshold
            ):
                return mpmath.mpf(0)
            if (far - near).abs_upper() < far.abs_lower() * arb(2) ** (-PROOF_BITS // 2):
                short = float(far)
                return mpmath.mpf(short) if far.contains(short) else to_mpf(far)
            growth = [at * branch.evaluate(at, ARB, order + 1) for at in (arb(sign) * arb(2) ** k for k in (550, 1100))]
            if all(g.abs_lower() > tiny for g in growth) and (growth[0] - growth[1]).abs_upper() < tiny:
                return mpmath.inf if growth[1] > 0 else -mpmath.inf
    end = "+" if sign > 0 else "-"
    raise FormulaError(
        f"{formula.name} shows no clear limit as x goes to {end}infinity: use a formula that settles there"
    )


def _tail_value(branch: Branch, x: arb, order: int) -> arb:
    """The value far out; where a ball overflows, what intervals say: a number, or at least how large it is."""
    value = branch.evaluate(x, ARB, order)
    if value.is_finite() and (value.is_zero() or value.rel_accuracy_bits() > PROOF_BITS // 2):
        return value
    reach = Box(x, x).bounds(branch.derivative(order))
    if reach.is_finite:
        return reach.low.union(reach.high)
    if reach.low > LARGE:
        return LARGE
    return -LARGE if reach.high < -LARGE else value


def _mpf(exact: Fraction) -> mpmath.mpf:
    return mpmath.mpf(exact.numerator) / exact.denominator


def _branch_of_landmark(formula: Formula) -> list[int]:
    """For each landmark, the branch it lies on; for a break, the one on its left."""
    return [
        number
        for number, proof in enumerate(prove(formula))
        for _ in range(len(proof.zeros) + (number < len(formula.breaks)))
    ]


def _zero_of_slope(branch: Branch, low: mpmath.mpf, high: mpmath.mpf, rising: bool) -> mpmath.mpf:
    """Newton on f' inside a box where f' is monotone and changes sign; bisection when a step leaves the box."""
    x = (low + high) / 2
    while True:
        slope = branch.evaluate(x, MPMATH, 1)
        if (slope < 0) == rising:
            low = x
        else:
            high = x
        step = slope / branch.evaluate(x, MPMATH, 2)
        nearer = x - step
        if not low <= nearer <= high:
            nearer = (low + high) / 2
        if abs(nearer - x) <= abs(x) * mpmath.mpf(10) ** (2 - mpmath.mp.dps) or nearer in (low, high):
            return nearer
        x = nearer


@lru_cache(maxsize=256)
def prove(formula: Formula) -> tuple[_Proof, ...]:
    """For each branch, the zeros of f' on it and that there are no others; FormulaError says where that fails."""
    ends = [None, *(b.at for b in formula.breaks), None]
    with precision(PROOF_BITS, HIGHEST_ORDER + 2):
        proofs = tuple(
            _prove_branch(formula.name, branch, low, high)
            for branch, (low, high) in zip(formula.branches, pairwise(ends), strict=True)
        )
    count = sum(len(proof.zeros) + 1 for proof in proofs)
    if count > MOST_PIECES:
        raise FormulaError(
            f"{formula.name[:60]} has {count} pieces: use a formula with at most {MOST_PIECES}, "
            "which four side bits can tell apart"
        )
    return proofs


def _prove_branch(name: str, branch: Branch, left: Fraction | None, right: Fraction | None) -> _Proof:
    if branch.constant:
        return _Proof((), 0, 0, 0)
    farthest = ODD * arb(2) ** FARTHEST
    low = -farthest if left is None else to_arb(rational(left)).lower()
    high = farthest if right is None else to_arb(rational(right)).upper()
    zeros, holes, orders = [], [], {left: 0 if left is None else 1, right: 0 if right is None else 1}
    for at in _candidates(branch, left, right):
        order, radius = _order_at(name, branch, at)
        if order == 1:
            continue
        x = to_arb(rational(at))
        hole = (x - radius).lower(), (x + radius).upper()
        holes.append(hole)
        if at in (left, right):
            orders[at] = order
        else:
            before, after = (_sign_at(branch, end) for end in hole)
            zeros.append(_Zero(*hole, before, after, at, order))
    edges = [low, *(end for hole in sorted(holes, key=lambda h: float(h[0])) for end in hole), high]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if start < stop:
            zeros += _isolate(name, branch, start, stop)
    zeros.sort(key=lambda zero: float(zero.low))
    sign = zeros[0].before if zeros else _sign_at(branch, _inside(left, right))
    return _Proof(tuple(zeros), orders[left], orders[right], sign)


def _inside(left: Fraction | None, right: Fraction | None) -> arb:
    """A number inside a branch's interval, not a round one."""
    if left is not None and right is not None:
        return to_arb(rational(left + (right - left) * Fraction(ODD) / 2)).mid()
    if left is not None:
        return to_arb(rational(left + Fraction(ODD))).mid()
    return to_arb(rational(right - Fraction(ODD))).mid() if right is not None else arb(ODD)


def _candidates(branch: Branch, left: Fraction | None, right: Fraction | None) -> list[Fraction]:
    """Rational numbers of the closed interval at which f' may vanish to a higher order, or at its ends at all."""
    numbers = {Fraction(0), *affine_zeros(branch.expression), *affine_zeros(branch.derivative(1))}
    numbers |= {end for end in (left, right) if end is not None}
    inside = [q for q in numbers if (left is None or left <= q) and (right is None or q <= right)]
    return sorted(q for q in inside if branch.evaluate(to_arb(rational(q)), ARB, 1).contains(0))


def _order_at(name: str, branch: Branch, at: Fraction) -> tuple[int, arb]:
    """The order of f - f(at) at a number where f' is near 0, and a radius within which that derivative has no zero."""
    x, order = to_arb(rational(at)), 1
    while True:
        # The sharpest test first: a ball without 0 needs no exact arithmetic.
        if not branch.evaluate(x, ARB, order).contains(0):
            break
        if branch.derivative(order).subs(X, rational(at)) != 0:
            value = sympy.simplify(branch.derivative(order).subs(X, rational(at)))
            if value != 0:
                raise FormulaError(_undecided(name, branch, x))
        order += 1
        if order > HIGHEST_ORDER:
            raise FormulaError(
                f"{name[:60]} is flat at x = {float(at):.6g} to more than order {HIGHEST_ORDER}: use a lower power"
            )
    for k in range(-1, 100):
        radius = arb(2) ** -k
        around = coefficients(branch.evaluate(variable(arb(x.mid(), radius + x.rad()), order + 1), SERIES))
        if around[order].is_finite() and not around[order].contains(0):
            return order, radius
    raise FormulaError(_undecided(name, branch, x))


def _isolate(name: str, branch: Branch, start: arb, stop: arb) -> list[_Zero]:
    """Boxes with exactly one zero of f' in each, which it crosses, and none elsewhere between start and stop."""
    slope, curvature = branch.derivative(1), branch.derivative(2)
    found = []
    inner = [end for end in (arb(-CORE), arb(CORE)) if start < end < stop]
    todo = sorted(pairwise([start, *inner, stop]), key=lambda box: -float(abs(box[0] + box[1]).min(arb(1e300))))
    budget, cost = MOST_STEPS, steps(slope) + steps(curvature)
    while todo:
        low, high = todo.pop()
        budget -= cost
        box = Box(low, high)
        if box.defined(branch.expression):
            if box.sign(slope):
                continue
            if box.sign(curvature) or box.sign(tidy(curvature)):
                before, after = _sign_at(branch, low), _sign_at(branch, high)
                if before and after:
                    if before != after:
                        found.append(_Zero(low, high, before, after))
                    continue
            elif box.sign(tidy(slope)):
                continue
        largest = low.abs_upper().max(high.abs_upper())
        if budget < 0 or (high - low < largest * NARROWEST and largest > arb(2) ** -1000):
            raise FormulaError(_undecided(name, branch, (low + high) / 2))
        middle = _middle(low, high)
        todo += [(middle, high), (low, middle)]
    return found


def _middle(low: arb, high: arb) -> arb:
    """Where to split a box: at a power of 2 while it spans many, else about halfway."""
    if low < 0 < high:
        ends = [end for end in (high, low) if abs(end) > WIDEST_RATIO]
        if ends:
            return arb(ODD) if ends[0] > 0 else arb(-ODD)
    else:
        near, far = sorted((abs(low), abs(high)), key=float) if high < 1e300 and low > -1e300 else _by_size(low, high)
        if near == 0 and far > WIDEST_RATIO:
            return (arb(ODD) if high > 0 else arb(-ODD)).mid()
        if near > 0 and far > WIDEST_RATIO * near:
            exponent = (_exponent(near) + _exponent(far)) // 2
            middle = ODD * arb(2) ** exponent
            if near < middle < far:
                return middle if high > 0 else -middle
    return (low + (high - low) * ODD / 2).mid()


def _by_size(low: arb, high: arb) -> tuple[arb, arb]:
    return (low, high) if high > 0 else (-high, -low)


def _exponent(x: arb) -> int:
    man, exp = x.man_exp()
    return int(man).bit_length() + int(exp)


def _sign_at(branch: Branch, x: arb) -> int:
    """Sign of f' at an exact number, 0 when unknown."""
    for bits in POINT_BITS:
        with precision(bits):
            sign = Box(x, x).sign(branch.derivative(1))
        if sign:
            return sign
    return 0


def _undecided(name: str, branch: Branch, x: arb) -> str:
    """What is wrong near a number at which boxes stay undecided."""
    near = float(x)
    at = f"{name[:60]!r} near x = {near:.6g}" if abs(near) < 1e100 else f"{name[:60]!r} far out"
    point = x.mid()
    with precision(POINT_BITS[-1]):
        value, slope = (branch.evaluate(point, ARB, order) for order in (0, 1))
    if not value.is_finite() or (value.abs_lower() > arb(2) ** 60 and abs(near) < 1e6):
        return f"{at} is not finite: use a formula that is, on the whole line"
    if not slope.is_finite() or (slope.abs_lower() > arb(2) ** 30 and abs(near) < 1e6):
        return f"{at} has no derivative: declare the break with where(x > {near:.6g}, ..., ...)"
    return (
        f"the turning points of {at} could not be isolated: use a formula that is smooth on the whole line, "
        "with finitely many, simple turning points"
    )
