"""xIELU for any values of its parameters: its side codes, its derivative and its input from the output.

xIELU is p x^2 + b x for x > 0 and n (expm1(min(x, e)) - x) + b x elsewhere, with e just below 0 and n > b. On the left
it falls without bound, so that outputs above 0 occur on both sides; between e and 0 it falls again. Side code 0: left
of the turning point; 1: between that and e, and right of 0, told apart by the output's sign; 2: between e and 0;
3: +inf. Must not know autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invref.errors import FormulaError
from invref.formats import BY_DTYPE
from invref.kernels import closed, codes, slopes
from invref.kernels.closed import Form, keep

BITS = 2
LEFT, MIDDLE, CLAMPED, INFINITE = range(4)


@dataclass(frozen=True)
class Parameters:
    """The effective parameters, and how the forward holds them: their dtype, and whether as tensors without axes."""

    positive: float
    negative: float
    beta: float
    eps: float
    dtype: torch.dtype = torch.float64
    scalar: bool = True

    @property
    def turning(self) -> float:
        """x* in float64; -inf where there is none."""
        ratio = self.beta / self.negative
        return math.log1p(-ratio) if ratio < 1 else -math.inf

    def tensors(self, device: torch.device) -> tuple[Tensor, ...]:
        """positive, negative, beta and eps as the forward takes them."""
        values = torch.tensor([self.positive, self.negative, self.beta, self.eps], dtype=torch.float64, device="cpu")
        held = values.to(self.dtype).to(device)
        return (*(held[:2] if self.scalar else held[:2].split(1)), held[2], held[3])


def compute(x: Tensor, positive: Tensor, negative: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
    """The forward from effective parameters, operation by operation as transformers has it."""
    left = (torch.expm1(torch.min(x, eps)) - x) * negative + beta * x
    return torch.where(x > 0, positive * x * x + beta * x, left)


@keep
def form(p: Parameters) -> Form:
    """The scheme's source; FormulaError for parameters that xIELU cannot have."""
    if not (p.positive >= 0 and p.negative >= p.beta > 0 and p.eps <= 0):
        raise FormulaError(
            f"xielu needs beta > 0, eps <= 0 and positive slopes, not beta={p.beta}, eps={p.eps}: change them"
        )
    turning = p.turning

    def code_of(x: Tensor) -> Tensor:
        # In float64: the nearest float32 to eps may lie on its other side.
        wide = x.double()
        left = torch.where(wide > p.eps, CLAMPED, torch.where(wide < turning, LEFT, MIDDLE))
        right = torch.where(wide == math.inf, INFINITE, MIDDLE)
        return torch.where(wide <= 0, left, right).to(torch.uint8)

    def gradient(y: Tensor, side: Tensor | None) -> Tensor:
        assert side is not None
        return decoded(p, y, side)[0]

    return Form(
        lambda x: compute(x, *p.tensors(x.device)),
        lambda x: slopes.xielu(x, p.positive, p.negative, p.beta, p.eps),
        gradient,
        BITS,
        code_of,
        breaks=(p.eps, 0.0),
        turning=(turning, float(_value(p, torch.tensor(turning, device="cpu")))) if math.isfinite(turning) else None,
        kind="Halley's method",
        slices=False,
        shares=(lambda x: _shares(p, x)[0], lambda x: _shares(p, x)[1]),
    )


def _value(p: Parameters, x: Tensor) -> Tensor:
    """xIELU of x <= eps."""
    return p.negative * (torch.expm1(x) - x) + p.beta * x


def decoded(p: Parameters, y: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """f' in the dtype of y and the input in float64, from float32 or float64 outputs and side codes (n,).

    An infinite output of finite inputs stands for half the largest number; at x = -inf the output may be NaN.
    """
    kind, y = y.dtype, y.double()
    largest = torch.finfo(kind).max
    root = torch.sqrt(p.beta**2 + 4 * p.positive * y.clamp(min=0))
    x = torch.where(y == math.inf, largest / 2, 2 * y / (p.beta + root))
    slope = torch.where(y == math.inf, 2 * p.positive * x + p.beta, root)
    fall = p.negative - p.beta
    below = ((side == LEFT) | ((side == MIDDLE) & (y < 0))) & y.isfinite()
    solved = below.nonzero().squeeze(1)
    if solved.numel():
        x[solved], slope[solved] = _solved(p, y[solved], side[solved] == MIDDLE)
    clamped, left = side == CLAMPED, (side == LEFT) & ~below
    x = torch.where(clamped, (p.negative * math.expm1(p.eps) - y) / fall if fall else p.eps, x)
    slope = torch.where(clamped | left, -fall, slope).clamp(max=largest)
    x = torch.where(left, -math.inf, torch.where(side == INFINITE, math.inf, x))
    return torch.where(y.isnan(), y, torch.where(side == INFINITE, math.inf, slope)).to(kind), x


def _solved(p: Parameters, y: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """x and f'(x) for x <= eps on both sides of x*.

    With u = x - x* and c = n - b it is y - y* = c (expm1(u) - u), in which no parameter is left, and f' = c expm1(u).
    """
    fall = p.negative - p.beta
    if fall == 0:
        return torch.log1p((y / p.negative).clamp(min=-1)).clamp(min=-800), (p.beta + y).clamp(min=0)
    lowest = _value(p, torch.tensor(p.turning, dtype=torch.float64, device=y.device))
    u = _offset(((y - lowest) / fall).clamp(0, HUGE), middle)
    return p.turning + u, fall * torch.expm1(u)


HUGE = 1e300


def _offset(w: Tensor, right: Tensor) -> Tensor:
    """u with expm1(u) - u = w >= 0, above 0 where `right`, else below, to an absolute error of a few 1e-16.

    Two steps of Halley's method, cubic, from a series at 0 and the asymptotes of both sides, which err by up to 0.03.
    """
    s = torch.where(right, 1.0, -1.0) * torch.sqrt(2 * w)
    near = s * (1 + s * (s * (1 / 36 - s / 270) - 1 / 6))
    far = torch.where(right, torch.log1p(w + torch.log1p(w + torch.log1p(w))), torch.exp(-1 - w) - (1 + w))
    u = torch.where(w < 2, near, far)
    for _ in range(2):
        slope = torch.expm1(u)
        residual = slope - u - w
        u = u - 2 * residual * slope / (2 * slope * slope - residual * (slope + 1))
    # There the residual cancels, and the next term of the series is below 1e-18.
    return torch.where(s.abs() < 1e-3, near, u)


def contributions(p: Parameters, y: Tensor, side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f', df/dp and df/dn of every element, in float32 or wider: x^2 on the right, expm1(min(x, e)) - x on the left."""
    this = form(p)
    if BY_DTYPE[y.dtype].bits == 16:
        slope, first, second = (codes.look_up(t, y, side) for t in closed.tables(this, y.dtype, y.device))
        return slope, first, second
    slope, x = decoded(p, y, side)
    if y.dtype == torch.float32 and this.turning is not None:
        slope = closed.lowest(this, y.device).replace(slope, y, side)
    x = torch.where((side == MIDDLE) & (y < 0), x.clamp(max=0), x)
    return slope, *_shares(p, x)


def _shares(p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, x * x, 0.0), torch.where(x > 0, 0.0, torch.expm1(x.clamp(max=p.eps)) - x)
