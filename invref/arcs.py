"""Arcs: the stretches of a formula's curve that one cell of a binned decoder serves, with exact points on them.

An arc starts at an anchor, one end of a monotone piece: a turning point, a flat point, a break, the limit at an
infinite end, or the middle of a piece. On it d = ±(y - y_anchor) grows from 0; g = f' as a function of d is what gets
fitted. Points are taken in x, so that no inverse is needed: a scaffold of exact points tells which x gives roughly the
d asked for, and (d, g) there is exact. Must not know how decoders are made of this.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property

import sympy
from flint import arb

from invref.engines import ARB, coefficients, evaluate, precision, variable
from invref.errors import FormulaError

BITS = 192
NEGLIGIBLE = 2.0**-27
"""Closer than this to its limit (relative above 1), f' counts as equal to it in float32."""
STEP = 0.25
"""Step of the scaffold in its own coordinate, before halving."""
LARGEST = 2.0**128
FARTHEST = 2.0**130
MOST_POINTS = 20_000
CLOSE, MOST_CORRECTIONS = 2.0**-14, 8
"""How near in log d an input must be to the distance that was asked for: bins may be 2^-10 of it wide."""
SETTLED = 6
"""So many points in a row must be at the limit before it counts as reached."""
OCTAVE = math.log(2)

Point = tuple[float, float, float, float]
"""u, log d, du / dlog d, f'."""


@dataclass(frozen=True)
class Arc:
    """x = origin + direction * h(u): h = exp for an anchor at a finite x, the origin; else scale * sinh.

    d = side * (f - anchor) grows with u. `last` is the u of the arc's far end, None when that is at infinity, where f'
    has the limit `limit`. Distances below `reach` do not occur.
    """

    expression: sympy.Expr
    finite: bool
    origin: arb
    direction: int
    anchor: arb
    side: int
    last: float | None
    limit: float
    reach: float

    def x_at(self, u: float) -> arb:
        """The input with coordinate u, as an exact ball."""
        h = math.exp(u) if self.finite else self.scale * math.sinh(u)
        return arb((self.origin + self.direction * arb(h)).mid())

    def at(self, x: arb) -> tuple[arb, arb]:
        """(d, f') at an exact input."""
        f = coefficients(evaluate(self.expression, variable(x, 2), ARB))
        return self.side * (f[0] - self.anchor), f[1]

    @cached_property
    def scale(self) -> float:
        """How far one goes from the origin of an arc anchored at infinity until d has changed much: a power of 16."""
        with precision(BITS, 16):
            d, g = self.at(self.origin)
            size = float(abs(d / g))
        if not 1 / FARTHEST < size < FARTHEST:
            raise FormulaError(
                f"f changes too fast or too slowly near x = {float(self.origin):.6g}: use a formula of another scale"
            )
        return 16.0 ** round(math.log(size, 16))

    @cached_property
    def start(self) -> tuple[float, float]:
        """(f', df'/dd) at the anchor where f' is not 0 there; (0, 0) elsewhere."""
        if not self.finite:
            return 0.0, 0.0
        with precision(BITS, 16):
            f = coefficients(evaluate(self.expression, variable(self.origin, 3), ARB))
            if f[1].contains(0) or abs(f[1]) < 2.0**-60:
                return 0.0, 0.0
            return float(f[1]), self.side * float(2 * f[2] / f[1])

    @cached_property
    def scaffold(self) -> list[Point]:
        """Exact points from the anchor outwards, each at most an octave of d from the next."""
        first = self.point(0.0 if self.last is None else self.last)
        near = self._walk(first, -1)
        far = self._walk(first, 1) if self.last is None else [self.point(self.last + 1e-3)]
        return [*reversed(near), first, *far]

    @cached_property
    def _knots(self) -> list[float]:
        return [point[1] for point in self.scaffold]

    def point(self, u: float) -> Point:
        """The scaffold's point at u; log d is NaN where d is not positive, or out of float64's range."""
        with precision(BITS, 16):
            d, g = self.at(self.x_at(u))
            distance, slope = float(d), float(g)
            if not 0 < distance < math.inf or slope == 0 or not math.isfinite(slope):
                return u, math.nan, math.nan, slope
            h = math.exp(u) if self.finite else self.scale * math.cosh(u)
            return u, math.log(distance), float(d / abs(g)) / h, slope

    def u_of(self, d: float) -> float:
        """The coordinate at distance d, about to CLOSE: Newton's steps, where `_guess` is not that near."""
        u = self._guess(d)
        for _ in range(MOST_CORRECTIONS):
            _, logarithm, rise, _ = self.point(u)
            miss = math.log(d) - logarithm
            if not abs(miss) > CLOSE:
                break
            u += rise * miss
        return u

    def _guess(self, d: float) -> float:
        """Roughly the coordinate at distance d: cubic Hermite interpolation of the scaffold in log d."""
        at = math.log(d)
        i = min(max(bisect(self._knots, at), 1), len(self._knots) - 1)
        (u0, a, s0, _), (u1, b, s1, _) = self.scaffold[i - 1], self.scaffold[i]
        w = b - a
        t = (at - a) / w
        if t < 0:
            return u0 + s0 * (at - a)
        if t > 1:
            return u1 + s1 * (at - b)
        chord = u1 - u0
        return u0 + t * chord + t * (1 - t) * ((1 - t) * (s0 * w - chord) + t * (chord - s1 * w))

    def _walk(self, first: Point, way: int) -> list[Point]:
        points: list[Point] = []
        before, step, settled, enough = first, STEP, 0, math.inf
        while before[1] < enough if way > 0 else settled < SETTLED:
            point = self.point(before[0] + way * step)
            if not abs(point[1] - before[1]) <= OCTAVE:
                if settled and way < 0 and step < STEP / 64:
                    break
                if step < 1e-9 or len(points) > MOST_POINTS:
                    raise FormulaError(
                        f"f changes too fast near x = {float(self.x_at(point[0])):.6g}: use a smoother formula there"
                    )
                step /= 2
                continue
            points.append(point)
            settled = settled + 1 if self._settled(point, way) else 0
            if settled == SETTLED:
                enough = OCTAVE * (math.floor(point[1] / OCTAVE) + 1) + 0.01
            elif not settled:
                enough = math.inf
            before, step = point, min(2 * step, STEP)
            if way < 0 and settled == 2 and self.finite:
                break
            if way > 0 and (point[1] > math.log(LARGEST) or point[0] > self.farthest):
                break
        return points

    @property
    def farthest(self) -> float:
        """The coordinate beyond which no float32 input lies."""
        return math.log(FARTHEST) if self.finite else math.asinh(FARTHEST / self.scale)

    def _settled(self, point: Point, way: int) -> bool:
        _, logarithm, _, slope = point
        if way > 0:
            return not math.isinf(self.limit) and abs(slope - self.limit) <= NEGLIGIBLE * max(1.0, abs(self.limit))
        d, (base, rise) = math.exp(logarithm), self.start
        if self.finite and d < self.reach / 2:
            return True
        return abs(slope - base - rise * d) <= NEGLIGIBLE * max(1.0, abs(base)) / 2
