"""Balls and power series in Arb: enclosures that stay tight on wide balls and in the far tails.

A monotone function of a ball is taken from the two ends, so nothing is lost by width or overflow. The Taylor
coefficients of a function over a ball follow from its differential equation, with no difference of nearly equal
terms. A series whose constant term is a ball encloses, coefficient by coefficient, the series at each of its points.
This module must not know expressions or activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import comb
from typing import Any

import mpmath
import sympy
from flint import arb, arb_series, ctx, fmpq


@contextmanager
def precision(bits: int, terms: int = 10) -> Iterator[None]:
    """Arb's working precision, and the longest power series it keeps, inside a `with` block."""
    before = ctx.prec, ctx.cap
    ctx.prec, ctx.cap = bits, max(terms, ctx.cap)
    try:
        yield
    finally:
        ctx.prec, ctx.cap = before


def to_arb(number: Any) -> arb:
    """An exact arb from an int, float or mpf; decimal text and rationals become balls; an arb is returned as it is."""
    if isinstance(number, sympy.Rational):
        return arb(fmpq(int(number.p), int(number.q)))
    if isinstance(number, mpmath.mpf) and mpmath.isinf(number):
        return arb.pos_inf() if number > 0 else arb.neg_inf()
    return number if isinstance(number, arb) else arb(number)


def to_mpf(number: arb) -> mpmath.mpf:
    """The midpoint of a ball as an mpf, exactly, whatever mpmath's precision."""
    return mpmath.mp.make_mpf(number.mid()._mpf_)


def hull(function: Callable[[arb], arb], z: arb) -> arb:
    """Enclosure of a monotone function over a ball, from its two ends."""
    if z.is_exact():
        return function(z)
    return function(z.lower()).union(function(z.upper()))


def even_hull(function: Callable[[arb], arb], z: arb) -> arb:
    """Enclosure of an even function that is monotone in |z|."""
    if z.is_exact():
        return function(z)
    return function(z.abs_lower()).union(function(z.abs_upper()))


def sigmoid(z: arb) -> arb:
    """1 / (1 + exp(-z))."""

    def point(t: arb) -> arb:
        if t >= 0:
            return 1 / (1 + (-t).exp())
        tail = t.exp()
        return tail / (1 + tail)

    return hull(point, z)


def exp(z: arb) -> arb:
    """Exponential."""
    return hull(arb.exp, z)


def log(z: arb) -> arb:
    """Natural logarithm; not a finite ball where z may be ≤ 0."""
    return hull(arb.log, z)


def erfc(z: arb) -> arb:
    """Complementary error function."""
    return hull(arb.erfc, z)


def erf(z: arb) -> arb:
    """Error function."""
    return hull(arb.erf, z)


def tanh(z: arb) -> arb:
    """Hyperbolic tangent."""
    return hull(arb.tanh, z)


def softplus(z: arb) -> arb:
    """log(1 + exp(z))."""
    return hull(lambda t: t + (-t).exp().log1p() if t >= 0 else t.exp().log1p(), z)


def expm1(z: arb) -> arb:
    """exp(z) - 1."""
    return hull(arb.expm1, z)


def log1p(z: arb) -> arb:
    """log(1 + z); not a finite ball where z may be ≤ -1."""
    return hull(arb.log1p, z)


def atan(z: arb) -> arb:
    """Arc tangent."""
    return hull(arb.atan, z)


def atanc(z: arb) -> arb:
    """pi/2 - atan(z)."""
    return hull(lambda t: arb.atan2(arb(1), t), z)


def gauss(z: arb) -> arb:
    """2/sqrt(pi) exp(-z²)."""
    return even_hull(lambda t: (-t * t).exp(), z) * 2 / arb.pi().sqrt()


def erfcx(z: arb) -> arb:
    """exp(z²) erfc(z), decreasing."""

    def point(t: arb) -> arb:
        if t < 100:
            return (t * t).exp() * t.erfc()
        # The first two terms of the alternating asymptotic series enclose the function (DLMF 7.12.1).
        leading = 1 / (t * arb.pi().sqrt())
        return leading.union(leading * (1 - 1 / (2 * t * t)))

    return hull(point, z)


def power(base: arb, exponent: sympy.Rational) -> arb:
    """A ball to a rational power; not finite where that is not real."""
    if exponent.q == 2:
        base = base.sqrt()
    elif exponent.q > 1:
        return base ** to_arb(exponent)
    n = int(exponent.p)
    if n < 0:
        return 1 / power(base, sympy.Integer(-n))
    return (even_hull if n % 2 == 0 else hull)(lambda t: t**n, base)


def variable(x: Any, terms: int) -> arb_series:
    """The series x + h of `terms` coefficients; `x` may be a wide ball."""
    return arb_series([to_arb(x), 1], prec=terms)


def coefficients(series: arb_series) -> list[arb]:
    """All coefficients of a series, the trailing zeros included."""
    have: list[arb] = series.coeffs()[: series.prec]
    return have + [arb(0)] * (series.prec - len(have))


def compose(outer: arb_series, inner: list[arb]) -> arb_series:
    """outer(u - u0) for the series u with coefficients `inner`."""
    if all(c.is_zero() for c in inner[1:]):
        return arb_series([coefficients(outer)[0]], prec=outer.prec)
    return outer(arb_series([0, *inner[1:]], prec=outer.prec))


def taylor_exp(z: arb, count: int) -> list[arb]:
    """e^(z+h) = e^z e^h."""
    out = [exp(z)]
    for k in range(1, count):
        out.append(out[-1] / k)
    return out


def taylor_sigmoid(z: arb, count: int) -> list[arb]:
    """From s' = s (1 - s), with 1 - s = sigmoid(-z) kept beside s so that neither tail cancels."""
    s, rest = [sigmoid(z)], [sigmoid(-z)]
    for k in range(1, count):
        s.append(sum((s[i] * rest[k - 1 - i] for i in range(k)), arb(0)) / k)
        rest.append(-s[k])
    return s


def taylor_tanh(z: arb, count: int) -> list[arb]:
    """From t' = 1 - t², the constant 1 - t0² taken as 4 sigmoid(2z) sigmoid(-2z)."""
    t = [tanh(z), 4 * sigmoid(2 * z) * sigmoid(-2 * z)][:count]
    for k in range(2, count):
        t.append(-sum((t[i] * t[k - 1 - i] for i in range(k)), arb(0)) / k)
    return t


def taylor_gauss(z: arb, count: int) -> list[arb]:
    """From g' = -2 z g."""
    g = [gauss(z)]
    for k in range(1, count):
        g.append(-2 * (z * g[k - 1] + (g[k - 2] if k > 1 else 0)) / k)
    return g


def taylor_erf(z: arb, count: int) -> list[arb]:
    """The integral of 2/sqrt(pi) exp(-z²)."""
    return [erf(z), *(g / (k + 1) for k, g in enumerate(taylor_gauss(z, count)[:-1]))]


def taylor_erfc(z: arb, count: int) -> list[arb]:
    """1 - erf."""
    return [erfc(z), *(-c for c in taylor_erf(z, count)[1:])]


def taylor_log(z: arb, count: int) -> list[arb]:
    """log(z + h) = log z - Σ (-h/z)^k / k."""
    return [log(z), *(-power(-z, sympy.Integer(-k)) / k for k in range(1, count))]


def taylor_softplus(z: arb, count: int) -> list[arb]:
    """The integral of sigmoid."""
    return [softplus(z), *(s / (k + 1) for k, s in enumerate(taylor_sigmoid(z, count)[:-1]))]


def taylor_expm1(z: arb, count: int) -> list[arb]:
    """exp - 1."""
    return [expm1(z), *taylor_exp(z, count)[1:]]


def taylor_log1p(z: arb, count: int) -> list[arb]:
    """As that of log, at 1 + z."""
    return [log1p(z), *taylor_log(1 + z, count)[1:]]


def taylor_atan(z: arb, count: int) -> list[arb]:
    """The integral of 1 / (1 + z²), whose coefficients satisfy (1 + z²) g_k = -2 z g_(k-1) - g_(k-2)."""
    whole = 1 + power(z, sympy.Integer(2))
    slopes = [1 / whole]
    for k in range(1, count):
        slopes.append(-(2 * z * slopes[k - 1] + (slopes[k - 2] if k > 1 else 0)) / whole)
    return [atan(z), *(g / (k + 1) for k, g in enumerate(slopes[:-1]))]


def taylor_atanc(z: arb, count: int) -> list[arb]:
    """pi/2 - atan."""
    return [atanc(z), *(-c for c in taylor_atan(z, count)[1:])]


def taylor_power(z: arb, count: int, exponent: sympy.Rational) -> list[arb]:
    """Binomial series; the coefficients past a natural exponent are exact zeros."""
    return [to_arb(b) * power(z, exponent - k) if b else arb(0) for k, b in enumerate(_binomials(exponent, count))]


@lru_cache(maxsize=256)
def _binomials(exponent: sympy.Rational, count: int) -> list[sympy.Rational]:
    return [sympy.binomial(exponent, k) for k in range(count)]


def binomial_shift(terms: list[arb], step: arb, count: int) -> list[arb]:
    """First `count` Taylor coefficients at z + step of a polynomial given by its coefficients at z."""
    powers = [power(step, sympy.Integer(j)) for j in range(len(terms))]
    return [sum((comb(j, k) * terms[j] * powers[j - k] for j in range(k, len(terms))), arb(0)) for k in range(count)]
