"""What is proved of a decoder: the sup-norm of each segment, and the Taylor polynomial at the turning point.

Bounds hold for exact arithmetic on the float32 coefficients, over whole segments and out to the ends of float64; what
evaluation in float32 adds is measured by the verifier over all inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flint import arb, arb_series

from invref import enclosure
from invref.curve import DIGITS, Curve
from invref.decoders import Decoder, Segment
from invref.engines import ARB, coefficients, precision, variable
from invref.errors import ProofError

BITS = 256
FAR = 1e-12
"""The tail is fitted down to this |y|; below it any bounded factor of y will do."""
SATURATED = 2.0**-25
"""Half an ulp below 1: from where |1 - f'| is smaller, the gradient rounds to 1 in float32."""
WIDENING = 1.25
SERIES_TERMS = 20
SERIES_SHARE = 1 / 8
"""The Taylor polynomial serves up to this share of the largest |t| on the left, where g is singular."""


def _ratio(segment: Segment, u: arb_series) -> arb_series:
    z = u - segment.centre
    numerator, denominator = arb_series([0]), arb_series([0])
    for value in reversed(segment.numerator):
        numerator = numerator * z + value
    for value in reversed((1.0, *segment.denominator)):
        denominator = denominator * z + value
    if denominator[0].contains(0):
        # No enclosure over this box: an indeterminate ball tells the sup-norm to halve it.
        return arb_series([arb("nan")], prec=u.prec)
    return numerator / denominator


def beyond(curve: Curve, limit: int, start: float) -> float:
    """An upper bound of |limit - f'| from `start` outwards to the end of float64, in boxes that products survive."""
    bound, x = 0.0, start
    while abs(x) < 2.0**1023:
        box = arb(x).union(arb(WIDENING * x))
        bound = larger(bound, float(abs(enclosure.derivative(curve.formula, box, DIGITS) - limit).upper()))
        x *= WIDENING
    return bound


def larger(a: float, b: float) -> float:
    """The larger of two bounds; ProofError where one is not a number, which Python's max may drop."""
    if not (np.isfinite(a) and np.isfinite(b)):
        raise ProofError(f"a bound is {a if not np.isfinite(a) else b}: use smaller boxes")
    return max(a, b)


def certified(curve: Curve, decoder: Decoder) -> Decoder:
    """The decoder with each segment's certified sup-norm; they overlap by 2^-20, so that rounding may choose either."""
    formula, slack = curve.formula, 2.0**-20
    y = float(decoder.turning_y)
    split = float(np.sqrt(decoder.tail_y - y))
    x = {
        t: float(curve.x_of(t))
        for t in (-split - slack, -split + slack, decoder.head_t - slack, decoder.head_t + slack, decoder.end_t)
    }
    x_tail_from, x_tail_to, x_head_from, x_head_to, x_end = x.values()
    far = float(enclosure.inverse(formula, arb(-FAR), 0, DIGITS))

    def slope(v: arb_series) -> arb_series:
        return formula.evaluate(v, ARB, order=1)

    def root(v: arb_series) -> arb_series:
        return enclosure.signed_root(formula, 0, v)

    def turn(v: arb_series) -> arb_series:
        t = root(v)
        return t * _ratio(decoder.turn, t) - slope(v)

    def head(v: arb_series) -> arb_series:
        t = root(v)
        return 1 + (decoder.end_t - t) * _ratio(decoder.head, t) - slope(v)

    def tail(v: arb_series) -> arb_series:
        f = formula.evaluate(v, ARB)
        return f * _ratio(decoder.tail, (-f).sqrt()) - slope(v)

    def norm(error: Callable[[arb_series], arb_series], a: float, b: float) -> float:
        return enclosure.sup_norm(error, np.nextafter(a, -np.inf), np.nextafter(b, np.inf))[1]

    saturated = larger(norm(lambda v: 1 - slope(v), x_end, 4 * x_end), beyond(curve, 1, 4 * x_end))
    if not saturated <= 2 * SATURATED:
        raise ProofError(f"{formula.name}: |1 - f'| reaches {saturated:.3g} beyond t = {decoder.end_t}")
    vanished = beyond(curve, 0, far) + FAR * _factor_bound(decoder.tail)
    return replace(
        decoder,
        turn=replace(decoder.turn, bound=norm(turn, x_tail_from, x_head_to)),
        head=replace(decoder.head, bound=larger(norm(head, x_head_from, x_end), saturated)),
        tail=replace(decoder.tail, bound=larger(norm(tail, far, x_tail_to), vanished)),
    )


def _factor_bound(tail: Segment) -> float:
    """An upper bound of the tail's P/Q for outputs between -FAR and 0."""
    u = arb(0).union(arb(FAR).sqrt())
    ball = _ratio(tail, arb_series([u], prec=1))
    return float(abs(coefficients(ball)[0]).upper())


def with_series(curve: Curve, decoder: Decoder) -> Decoder:
    """The decoder with the Taylor polynomial of g in t at the turning point, certified on its radius."""
    formula, (x, _) = curve.formula, curve.turning
    with precision(4 * BITS, SERIES_TERMS + 4):
        f = coefficients(formula.evaluate(variable(x, SERIES_TERMS + 3), ARB))
        q = arb_series(f[2:], prec=SERIES_TERMS + 1)
        t = arb_series([0, 1], prec=SERIES_TERMS + 1) * q.sqrt()
        slope = arb_series([0, *(k * c for k, c in enumerate(f[2:], start=2))], prec=SERIES_TERMS + 1)
        g = slope(t.reversion())
        series = tuple(float(c) for c in coefficients(g)[:SERIES_TERMS])
    radius = float(np.sqrt(-float(decoder.turning_y))) * SERIES_SHARE
    ends = [float(curve.x_of(side * radius)) for side in (-1, 1)]

    def error(v: arb_series) -> arb_series:
        t = enclosure.signed_root(formula, 0, v)
        value = arb_series([0])
        for c in reversed(series):
            value = value * t + c
        return value - formula.evaluate(v, ARB, order=1)

    bound = enclosure.sup_norm(error, *ends)[1]
    return replace(decoder, series=series, series_radius=radius, series_bound=bound)
