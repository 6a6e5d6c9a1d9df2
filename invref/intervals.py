"""Intervals with two exact ends, for signs over boxes that reach far out: an end may be infinite, and 0 stays an end.

A ball of midpoint and radius loses the sign of a number that ranges over many octaves, and overflows where exp does.
Here each end is rounded outward on its own. Every operation encloses; what is undefined somewhere on the interval gives
the whole line. This module must not know expressions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flint import arb, fmpq

NEGATIVE, POSITIVE = arb.neg_inf(), arb.pos_inf()
LARGEST_EXPONENT = arb(2) ** 60
"""Beyond this argument exp is known to be above exp(LARGEST_EXPONENT), and no more."""
SATURATED = arb(2) ** 20
"""Beyond this argument erf and tanh are within 2^-2^20 of their limits."""


@dataclass(frozen=True, eq=False)
class Interval:
    """The numbers from low to high, both exact; an infinite end is not one of them."""

    low: arb
    high: arb

    def __add__(self, other: Interval) -> Interval:
        return Interval((self.low + other.low).lower(), (self.high + other.high).upper())

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __mul__(self, other: Interval) -> Interval:
        if self is other:
            return power(self, 2)
        ends = [_times(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return Interval(_least([e.lower() for e in ends]), -_least([-e.upper() for e in ends]))

    def meet(self, other: Interval) -> Interval:
        """What two intervals that overlap have in common."""
        return Interval(_larger(self.low, other.low), -_larger(-self.high, -other.high))

    @property
    def sign(self) -> int:
        """1 or -1 where all numbers have that sign, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def is_finite(self) -> bool:
        """Whether both ends are numbers."""
        return bool(self.low.is_finite() and self.high.is_finite())


WHOLE = Interval(NEGATIVE, POSITIVE)


def around(ball: arb) -> Interval:
    """The interval of a ball; the whole line for one that is not a number."""
    if ball.is_nan():
        return WHOLE
    return Interval(ball.lower(), ball.upper())


def increasing(
    function: Callable[[arb], arb], first: Any = NEGATIVE, last: Any = POSITIVE
) -> Callable[[Interval], Interval]:
    """An increasing function of intervals, from one of exact numbers and its limits at -infinity and +infinity."""

    def over(z: Interval) -> Interval:
        low = arb(first) if z.low == NEGATIVE else function(z.low)
        high = arb(last) if z.high == POSITIVE else function(z.high)
        if low.is_nan() or high.is_nan():
            return WHOLE
        return Interval(_larger(low.lower(), arb(first)), -_larger((-high).lower(), -arb(last)))

    return over


def decreasing(function: Callable[[arb], arb], first: Any, last: Any) -> Callable[[Interval], Interval]:
    """A decreasing function of intervals, as `increasing`."""
    return lambda z: -increasing(lambda t: -function(t), -arb(first), -arb(last))(z)


def power(base: Interval, exponent: int) -> Interval:
    """An integer power."""
    if exponent == 0:
        return Interval(arb(1), arb(1))
    if exponent < 0:
        return reciprocal(power(base, -exponent))
    if exponent % 2 == 0:
        base = magnitude(base)
    return increasing(lambda t: t**exponent)(base)


def root(base: Interval, exponent: fmpq) -> Interval:
    """A power with a fractional exponent, of numbers that are not negative."""
    if not base.low >= 0:
        return WHOLE
    if exponent < 0:
        return reciprocal(root(base, -exponent))

    def point(t: arb) -> arb:
        if t == 0:
            return t
        return t.sqrt() ** int(exponent.p) if exponent.q == 2 else t ** arb(exponent)

    return increasing(point, 0)(base)


def reciprocal(z: Interval) -> Interval:
    """1 / z, out to infinity where z has 0 as an end."""
    if z.low > 0 or z.high < 0:
        return Interval(_inverse(z.high).lower(), _inverse(z.low).upper())
    if z.low == 0 and z.high > 0:
        return Interval(_inverse(z.high).lower(), POSITIVE)
    if z.high == 0 and z.low < 0:
        return Interval(NEGATIVE, _inverse(z.low).upper())
    return WHOLE


def magnitude(z: Interval) -> Interval:
    """|z|."""
    if z.low >= 0:
        return z
    if z.high <= 0:
        return -z
    return Interval(arb(0), _larger(z.high, -z.low))


def exp(z: Interval) -> Interval:
    """Exponential, whose lower end is finite also where it overflows."""
    if z.low > LARGEST_EXPONENT:
        return Interval(LARGEST_EXPONENT.exp().lower(), POSITIVE)
    return increasing(lambda t: t.exp() if t < LARGEST_EXPONENT else POSITIVE, 0)(z)


def log(z: Interval) -> Interval:
    """Natural logarithm of positive numbers."""
    if not z.low >= 0:
        return WHOLE
    return increasing(lambda t: t.log() if t > 0 else NEGATIVE)(z)


def log1p(z: Interval) -> Interval:
    """log(1 + z) of numbers above -1."""
    return increasing(arb.log1p)(z) if z.low > -1 else WHOLE


def _erfc(t: arb) -> arb:
    if t > SATURATED:
        return arb(0).union(arb(2) ** -(2**20))
    return 2 - _erfc(-t) if t < -SATURATED else t.erfc()


def _sigmoid(t: arb) -> arb:
    if t >= 0:
        return 1 / (1 + (-t).exp())
    tail = t.exp()
    return tail / (1 + tail)


def _softplus(t: arb) -> arb:
    return t + (-t).exp().log1p() if t >= 0 else t.exp().log1p()


def _softplusx(t: arb) -> arb:
    return (1 - t.exp() / 2).union(arb(1)) if t < -SATURATED else _softplus(t) * (-t).exp()


def _erfcx(t: arb) -> arb:
    if t < -SATURATED:
        return POSITIVE
    if t < 100:
        return (t * t).exp() * t.erfc()
    # The first two terms of the alternating asymptotic series enclose the function (DLMF 7.12.1).
    leading = 1 / (t * arb.pi().sqrt())
    return leading.union(leading * (1 - 1 / (2 * t * t)))


def _per(function: Callable[[arb], arb], at_zero: arb) -> Callable[[Interval], Interval]:
    """f(z) / z for an odd, concave function that is bounded by its tangent at 0: decreasing in |z|."""
    over = decreasing(lambda t: function(t) / t if t != 0 else at_zero, at_zero, 0)
    return lambda z: over(magnitude(z))


def expm1x(z: Interval) -> Interval:
    """expm1(z) / z."""
    if z.low > LARGEST_EXPONENT:
        z = Interval(LARGEST_EXPONENT, z.high)
    return increasing(lambda t: POSITIVE if t > LARGEST_EXPONENT else t.expm1() / t if t != 0 else arb(1), 0)(z)


def log1px(z: Interval) -> Interval:
    """log1p(z) / z of numbers above -1."""
    return decreasing(lambda t: t.log1p() / t if t != 0 else arb(1), POSITIVE, 0)(z) if z.low > -1 else WHOLE


def _expm1(z: Interval) -> Interval:
    return (
        exp(z) + Interval(arb(-1), arb(-1))
        if z.low > 1
        else increasing(lambda t: t.expm1() if t < LARGEST_EXPONENT else POSITIVE, -1)(z)
    )


FUNCTIONS: dict[str, Callable[[Interval], Interval]] = {
    "exp": exp,
    "expm1": _expm1,
    "log": log,
    "log1p": log1p,
    "erf": increasing(lambda t: 1 - _erfc(t) if abs(t) > 1 else t.erf(), -1, 1),
    "erfc": decreasing(_erfc, 2, 0),
    "tanh": increasing(lambda t: t.tanh() if abs(t) < SATURATED else (1 - _erfc(abs(t))) * t.sgn(), -1, 1),
    "sigmoid": increasing(_sigmoid, 0, 1),
    "softplus": increasing(_softplus, 0),
    "atan": increasing(arb.atan, arb(-2), arb(2)),
    "atanc": decreasing(lambda t: arb.atan2(arb(1), t), 4, 0),
    "erfcx": decreasing(_erfcx, POSITIVE, 0),
    "softplusx": decreasing(_softplusx, 1, 0),
    "tanhx": _per(arb.tanh, arb(1)),
    "erfx": _per(lambda t: 1 - _erfc(t) if t > 1 else t.erf(), 2 / arb.pi().sqrt()),
    "atanx": _per(arb.atan, arb(1)),
    "expm1x": expm1x,
    "log1px": log1px,
}


def _inverse(t: arb) -> arb:
    return 1 / t if t.is_finite() else arb(0)


def _times(a: arb, b: arb) -> arb:
    return arb(0) if a == 0 or b == 0 else a * b


def _larger(a: arb, b: arb) -> arb:
    return b if b > a else a


def _least(ends: list[arb]) -> arb:
    least = ends[0]
    for end in ends[1:]:
        if end < least:
            least = end
    return least
