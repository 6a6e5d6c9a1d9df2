"""Second derivatives from what a layer keeps: f''(x) from the stored output and its side code.

16-bit outputs are decoded by a table, the middle of f'' over all inputs with that stored code, so that the error floor
is met; float32 and float64 outputs in float64, by f'' of the input that the exact inverse gives. Near a turning point
f'' is as well determined as the input is: to f''' times the width of what shares a code. Must not know autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from invref.formats import BY_DTYPE
from invref.kernels import codes, solve
from invref.kernels.codes import Forward, Slope
from invref.kernels.scheme import CodeOf, Gradient, parts

TABLES = 16
"""How many 16-bit tables are remembered, of a quarter MiB for each side code."""
NEAREST, FARTHEST, PER_OCTAVE = -60, 1000, 4
"""Exponents of the smallest and largest distances from a turning point between which inverses are bracketed."""


@dataclass(frozen=True, eq=False)
class Second:
    """f'' of one activation in one format.

    forward: in that format; curve: f'' of float64 inputs, None where 16-bit outputs need no table; decode: f'' of
    float64 outputs (n,) and their side codes; code_of, bits: as the scheme packs them; breaks: inputs that count only
    where no other gives the same code.
    """

    forward: Forward
    curve: Slope | None
    decode: Gradient
    bits: int = 0
    code_of: CodeOf | None = None
    breaks: tuple[float, ...] = ()
    slices: bool = True

    def __call__(self, y: Tensor, packed: Tensor | None) -> Tensor:
        """f'' (n,) in float64 for float64 outputs y (n,), else in float32; packed: what the scheme packed."""
        by_table = self.curve is not None and BY_DTYPE[y.dtype].bits == 16
        second = torch.empty_like(y, dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)
        for part, side in parts(y.numel(), packed, self.bits, y.device):
            if by_table:
                second[part] = codes.look_up(_table(self, y.dtype, y.device), y[part], side)
            else:
                second[part] = self.decode(y[part].double(), side)
        return second


@lru_cache(maxsize=TABLES)
def _table(of: Second, dtype: torch.dtype, device: torch.device) -> Tensor:
    assert of.curve is not None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return codes.table(of.forward, of.curve, of.code_of, 1 << of.bits, dtype, device, of.breaks, of.slices)


@dataclass(frozen=True, eq=False)
class Dip:
    """f'' of a smooth function with one minimum, in float64: x by bracketed Newton steps on its side, then the curve.

    value, slope, curve: f, f' and f'' of float64 inputs; on the left f tends to 0.
    """

    value: Slope
    slope: Slope
    curve: Slope
    turning: float

    def __call__(self, y: Tensor, side: Tensor | None) -> Tensor:
        """f'' of outputs (n,), float64, with their side codes; NaN for NaN only."""
        assert side is not None
        second = torch.empty_like(y)
        for right in (False, True):
            here = side.bool() == right
            second[here] = solve.steadily(lambda part, right=right: self._on(right, part), y[here])
        return second

    def _on(self, right: bool, y: Tensor) -> Tensor:
        xs, ys = (knots.to(y.device) for knots in _knots(self, right))
        # Outputs that rounding took below the least, and those of the tail that underflowed, stand for the ends.
        held = y.clamp(float(ys[0]), float(ys[-1]))
        lower, upper = solve.bracketed(held, xs, ys)
        x = solve.inverse(held, self.value, self.slope, lower, upper, right)
        return torch.where(y.isnan(), y, self.curve(x))


@cache
def _knots(dip: Dip, right: bool) -> tuple[Tensor, Tensor]:
    """Inputs on one side from the turning point outwards, and their outputs in ascending order."""
    steps = torch.arange(NEAREST * PER_OCTAVE, FARTHEST * PER_OCTAVE, dtype=torch.float64) / PER_OCTAVE
    x = dip.turning + torch.cat([steps.new_zeros(1), torch.exp2(steps)]) * (1 if right else -1)
    y = dip.value(x)
    if not right:
        # The first input whose output has underflowed ends the tail.
        count = min(int((y != 0).sum()) + 1, len(x))
        x, y = x[:count], y[:count]
    known = y.isfinite()
    return x[known], torch.cummax(y[known], 0).values


def gelu_value(x: Tensor) -> Tensor:
    """x * Phi(x) without cancellation."""
    return x * torch.erfc(-x / math.sqrt(2)) / 2


def gelu_tanh_value(x: Tensor, scale: float = math.sqrt(2 / math.pi)) -> Tensor:
    """x * sigmoid(2 u) with u = scale * (x + 0.044715 x^3)."""
    return x * torch.sigmoid(2 * scale * x * (1 + 0.044715 * x * x))


def silu_value(x: Tensor, scale: float = 1.0) -> Tensor:
    """x * sigmoid(scale * x)."""
    return x * torch.sigmoid(scale * x)


def mish_value(x: Tensor) -> Tensor:
    """x * tanh(softplus(x))."""
    return x * torch.tanh(torch.nn.functional.softplus(x))
