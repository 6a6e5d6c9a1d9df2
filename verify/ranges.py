"""Where a formula's pieces lie in a format: ranges of ordinals, the inputs at jumps, and the outputs that count.

Guarantees that every finite input is in one range or at one jump. Must not know any layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from flint import arb
from mpmath import isinf, mpf

from invref import formats
from invref.engines import ARB, precision, to_arb
from invref.formats import Format
from invref.formulas import Formula
from invref.language import rational
from invref.pieces import Landmark, Piece, landmarks, limit, pieces

FLOAT32 = formats.get("float32")

CLEARANCE = 8
"""Pairs (y, s) count for the decoder error from this many ulp above (or below) the turning value on."""

JUMP = 1e-12
"""One-sided values or slopes at a break that differ by more are a jump."""

BITS = 128
NO_OUTPUT = FLOAT32.largest_ordinal + 1, FLOAT32.first_ordinal - 1


@dataclass(frozen=True)
class Range:
    """One monotone piece in float32: its inputs are the ordinals first ≤ o < stop.

    y of the ordinals low ≤ o ≤ high count for the decoder error: those at least `CLEARANCE` ulp inside the values where
    f' is 0, and all where the piece has no such end; none where f is constant.
    """

    piece: Piece
    first: int
    stop: int
    low: int
    high: int

    @property
    def slope(self) -> float:
        """Sign of f' on the piece, 0 where f is constant."""
        return 0.0 if self.piece.plateau else 1.0 if self.piece.increasing else -1.0


@dataclass(frozen=True)
class Edge:
    """The inputs of a format exactly at a break where f or f' jumps, first ≤ o < stop, and f' on both sides of it."""

    first: int
    stop: int
    least: float
    largest: float


def ranges(formula: Formula) -> tuple[Range, ...]:
    """The pieces of f as ranges of float32 ordinals, from the left; together all finite inputs but those at jumps."""
    bounds = _bounds(cuts_of(formula, FLOAT32))
    return tuple(
        Range(piece, first, stop, *counting(formula, piece))
        for piece, (first, stop) in zip(pieces(formula), bounds, strict=True)
    )


def between_jumps(edges: tuple[Edge, ...]) -> tuple[Range, ...]:
    """The line cut at float32 `edges` alone, for a gradient that is no derivative: no output counts."""
    ends = [-mpf("inf"), *(mpf(FLOAT32.value(edge.first)) for edge in edges), mpf("inf")]
    bounds = _bounds([(edge.first, edge.stop) for edge in edges])
    nan = mpf("nan")
    return tuple(
        Range(Piece(i, left, right, True, nan, nan), first, stop, *NO_OUTPUT)
        for i, (left, right, (first, stop)) in enumerate(zip(ends, ends[1:], bounds, strict=False))
    )


def _bounds(cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    starts = [FLOAT32.first_ordinal, *(start for _, start in cuts)]
    return list(zip(starts, [*(stop for stop, _ in cuts), FLOAT32.largest_ordinal + 1], strict=True))


@lru_cache(maxsize=256)
def cuts_of(formula: Formula, fmt: Format) -> list[tuple[int, int]]:
    """For each landmark, where the piece on its left stops and where the one on its right starts, as ordinals of `fmt`.

    Between the two lie the inputs at a jump; inputs at any other break belong to the piece whose branch owns them.
    """
    cuts = []
    for mark, left, right in zip(landmarks(formula), pieces(formula)[:-1], pieces(formula)[1:], strict=True):
        first, after = _around(mark.x if mark.exact is None else mark.exact, fmt)
        if first == after:
            cuts.append((first, first))
        elif mark.kind != "break":
            # A zero of f' at ±0 parts the two zeros.
            cuts.append((after - 1, after - 1))
        elif _jump(formula, mark, left, right):
            cuts.append((first, after))
        else:
            cut = first if _right_owns(formula, mark) else after
            cuts.append((cut, cut))
    return cuts


@lru_cache(maxsize=256)
def edges_of(formula: Formula, fmt: Format) -> tuple[Edge, ...]:
    """The inputs of `fmt` at jumps of f or f', from the left."""
    found = []
    for mark, cut in zip(landmarks(formula), cuts_of(formula, fmt), strict=True):
        if cut[0] < cut[1]:
            sides = formula.slopes_at(_at_break(mark))
            found.append(Edge(*cut, min(sides), max(sides)))
    return tuple(found)


@lru_cache(maxsize=256)
def jumps_of(gradient: Formula, forward: Formula | None, fmt: Format) -> tuple[Edge, ...]:
    """As `edges_of`, where the values of `gradient` take the place of f': its own jumps, and those of the forward."""
    breaks = {b.at for b in gradient.breaks if _apart(gradient.sides_at(b))}
    breaks |= {b.at for b in forward.breaks if _apart(forward.sides_at(b))} if forward else set()
    found = []
    for at in sorted(breaks):
        first, after = _around(at, fmt)
        sides = gradient.sides_at(at) if any(b.at == at for b in gradient.breaks) else 2 * (_at(gradient, at),)
        if first < after:
            found.append(Edge(first, after, min(sides), max(sides)))
    return tuple(found)


def _at(gradient: Formula, at: Fraction) -> float:
    with precision(BITS):
        value = gradient.evaluate(to_arb(rational(at)), ARB)
        return float(value.mid() if isinstance(value, arb) else value)


def _apart(sides: tuple[float, float]) -> bool:
    return abs(sides[0] - sides[1]) > JUMP


def unbounded(formula: Formula) -> bool:
    """Whether f' has no bound on the line."""
    return any(isinf(limit(formula, sign, 1)) for sign in (-1, +1))


@lru_cache(maxsize=256)
def representable(formula: Formula) -> tuple[int, int]:
    """Float32 ordinals first ≤ o < stop of the inputs whose f stays well within float64 where f' has no bound."""
    least, largest = FLOAT32.first_ordinal, FLOAT32.largest_ordinal

    def fits(ordinal: int) -> bool:
        with precision(BITS):
            value = formula.evaluate(arb(FLOAT32.value(ordinal)), ARB)
        return bool(value.is_finite() and value.abs_upper() < arb(2) ** 200)

    def last(end: int) -> int:
        inside, outside = 0, end
        if fits(end):
            return end
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if fits(middle) else (inside, middle)
        return inside

    first = last(least) if isinf(limit(formula, -1, 1)) else least
    return first, (last(largest) if isinf(limit(formula, +1, 1)) else largest) + 1


def at_least(bound: Any) -> int:
    """Ordinal of the least finite float32 not below `bound`; of the two zeros -0.0 comes first."""
    nearest = max(FLOAT32.ordinal(float(bound)), FLOAT32.first_ordinal)
    if nearest <= FLOAT32.largest_ordinal:
        nearest += FLOAT32.value(nearest) < bound
    return -1 if nearest == 0 else nearest


def at_most(bound: Any) -> int:
    """Ordinal of the largest finite float32 not above `bound`; of the two zeros +0.0 comes last."""
    nearest = min(FLOAT32.ordinal(float(bound)), FLOAT32.largest_ordinal)
    if nearest >= FLOAT32.first_ordinal:
        nearest -= FLOAT32.value(nearest) > bound
    return 0 if nearest == -1 else nearest


def singular(formula: Formula, piece: Piece, end: str, outward: int) -> bool:
    """Whether f' is 0 at this end ("turning", "flat", "break"; outward -1 for the left one) of a piece."""
    if end != "break":
        return end in ("turning", "flat")
    return abs(slope_at_break(formula, piece, outward)) < JUMP


def slope_at_break(formula: Formula, piece: Piece, outward: int) -> float:
    """f' at an end of a piece that is a break, from inside."""
    mark = landmarks(formula)[piece.index - (outward < 0)]
    return formula.slopes_at(_at_break(mark))[0 if outward > 0 else 1]


def _around(at: Any, fmt: Format) -> tuple[int, int]:
    """The first value of `fmt` not below a Fraction or mpf, and the first above it."""
    number = Fraction if isinstance(at, Fraction) else mpf
    nearest = fmt.ordinal(float(at))

    def first(beyond: Callable[[Any], bool]) -> int:
        ordinal = nearest - 2
        while ordinal <= fmt.largest_ordinal and not (
            ordinal >= fmt.first_ordinal and beyond(number(fmt.value(ordinal)))
        ):
            ordinal += 1
        return ordinal

    return first(lambda value: value >= at), first(lambda value: value > at)


def _jump(formula: Formula, mark: Landmark, left: Piece, right: Piece) -> bool:
    return _apart(formula.slopes_at(_at_break(mark))) or abs(left.right_limit - right.left_limit) > JUMP


def _at_break(mark: Landmark) -> Fraction:
    """Where a break lies; it is known exactly."""
    assert mark.exact is not None
    return mark.exact


def _right_owns(formula: Formula, mark: Landmark) -> bool:
    return next(entry.right_owns for entry in formula.breaks if entry.at == mark.exact)


def counting(formula: Formula, piece: Piece, clearance: int = CLEARANCE) -> tuple[int, int]:
    """Ordinals of the least and the largest float32 y that count: `clearance` ulp from where f' is 0, or all."""
    if piece.plateau:
        return NO_OUTPUT
    ends = [
        (piece.left_limit, singular(formula, piece, piece.left_end, -1)),
        (piece.right_limit, singular(formula, piece, piece.right_end, +1)),
    ]
    (low, clear_low), (high, clear_high) = ends if piece.increasing else ends[::-1]
    return (
        at_least(low + clearance * FLOAT32.ulp(float(low))) if clear_low else FLOAT32.first_ordinal,
        at_most(high - clearance * FLOAT32.ulp(float(high))) if clear_high else FLOAT32.largest_ordinal,
    )
