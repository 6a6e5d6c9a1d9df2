"""The decoder in float64: the signed root and its clamp as in `naive`, then the inverse refined by Newton steps.

Near the turning point g is the Taylor polynomial in the signed root; elsewhere x is solved from f(x) = y inside a
bracket taken from a grid of exact values, and g = f'(x). On the left piece, where f decays to 0, the step is taken in
log|f|, which is nearly straight there. Plain torch operations: any device, slower than the float32 kernels.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import sympy
import torch
from torch import Tensor

from invref import formulas
from invref.decoders import Decoder
from invref.engines import TORCH, evaluate
from invref.formulas import Formula

STEPS = 6
"""Newton steps: the bracket leaves a relative error of 1e-2, which squares at each step; the rest is reserve."""
RATIO = 1.02
"""Ratio of neighbouring distances |x - x*| in the grid of brackets."""
FARTHEST = 2.0**64
"""The last distance in the grid: f' has reached its limits long before, and powers of x do not overflow yet."""


def side_of(decoder: Decoder, x: Tensor) -> Tensor:
    """Side bits of float64 inputs: True on the right piece, False on the left, for NaN and for +inf (see `naive`)."""
    return (x > float(decoder.threshold(np.float64))) & (x < float("inf"))


def derivative(decoder: Decoder, y: Tensor, side: Tensor) -> Tensor:
    """g(y, s) in float64, shape of y; y: float64, side: bool, same shape. y = NaN or +inf gives NaN."""
    clamp = decoder.clamps["float64"]
    high, low = decoder.turning_value(np.float64)
    d = (y - float(high)) - float(low)
    d = torch.where(d < clamp.cut, clamp.base + clamp.slope * d.clamp(min=0), d)
    t = torch.where(side, torch.sqrt(d), -torch.sqrt(d))
    near = t.abs() <= decoder.series_radius
    g = torch.empty_like(y)
    g[near] = _polynomial(decoder, t[near])
    for right in (False, True):
        rest = ~near & (side == right)
        g[rest] = _solved(decoder, y[rest], right)
    return torch.where(~side & ~(y <= 0), torch.nan, g)


def backward(decoder: Decoder, dy: Tensor, y: Tensor, side: Tensor) -> Tensor:
    """dy * g(y, s) in float64."""
    return dy * derivative(decoder, y, side)


def _polynomial(decoder: Decoder, t: Tensor) -> Tensor:
    value = torch.zeros_like(t)
    for coefficient in reversed(decoder.series):
        value = value * t + coefficient
    return value


def _solved(decoder: Decoder, y: Tensor, right: bool) -> Tensor:
    formula = formulas.get(decoder.activation)
    derivative = _derivative(formula)
    xs, ys = (knots.to(y.device) for knots in _grid(decoder, right))
    above = torch.searchsorted(ys, y).clamp(1, len(ys) - 1)
    lower, upper = xs[above - 1], xs[above]
    x = (lower + upper) / 2
    for _ in range(STEPS):
        f, slope = formula.evaluate(x, TORCH), evaluate(derivative, x, TORCH)
        step = (f - y) / slope if right else torch.log(f / y) * (f / slope)
        x = torch.where(torch.isfinite(step), x - step, x)
        x = torch.minimum(torch.maximum(x, torch.minimum(lower, upper)), torch.maximum(lower, upper))
    g: Tensor = evaluate(derivative, x, TORCH)
    # Where y has underflowed to zero on the left nothing is left to solve: the limit of f' is 0 there.
    return g if right else torch.where(y == 0, y, g)


@cache
def _derivative(formula: Formula) -> sympy.Expr:
    """f' with its outermost product multiplied out: near 1 a large term plus a small one, rounded once less."""
    return sympy.expand_mul(formula.derivative(1), deep=False)


@cache
def _grid(decoder: Decoder, right: bool) -> tuple[Tensor, Tensor]:
    """Knots x on one piece and their values y, sorted by y; the values are made monotone where rounding broke it."""
    turning = float(decoder.turning_x)
    first = decoder.series_radius / 16
    count = int(np.log(FARTHEST / first) / np.log(RATIO))
    distance = torch.tensor(np.geomspace(first, FARTHEST, count), dtype=torch.float64)
    x = turning + distance if right else turning - distance
    y = formulas.get(decoder.activation).evaluate(x, TORCH)
    if not right:
        x, y = x[y != 0], y[y != 0]
        # One knot past the last non-zero value: the smallest outputs have their bracket too.
        x = torch.cat([x, x[-1:] * RATIO * RATIO])
        y = torch.cat([y, torch.zeros(1, dtype=torch.float64)])
    return x, torch.cummax(y, 0).values
