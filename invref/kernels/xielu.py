"""xIELU for any values of its parameters: its side codes, its derivative and its input from the output.

xIELU is p x^2 + b x for x > 0 and n (expm1(min(x, e)) - x) + b x elsewhere, with e just below 0 and n > b. On the left
it falls without bound, so that outputs above 0 occur on both sides; between e and 0 it falls again. Side code 0: left
of the turning point; 1: between that and e, and right of 0, told apart by the output's sign; 2: between e and 0;
3: +inf. Must not know autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from invref.errors import FormulaError
from invref.kernels import closed, codes, slopes, solve
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
        values = torch.tensor([self.positive, self.negative, self.beta, self.eps], dtype=torch.float64)
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
        x = recovered(p, y, side)
        left = torch.where(side == CLAMPED, p.beta - p.negative, p.beta + p.negative * torch.expm1(x))
        slope = torch.where((side == MIDDLE) & ~(y < 0), 2 * p.positive * x + p.beta, left)
        slope = slope.clamp(max=torch.finfo(y.dtype).max)
        return torch.where(y.isnan(), y, torch.where(side == INFINITE, math.inf, slope)).to(y.dtype)

    return Form(
        lambda x: compute(x, *p.tensors(x.device)),
        lambda x: slopes.xielu(x, p.positive, p.negative, p.beta, p.eps),
        gradient,
        BITS,
        code_of,
        breaks=(p.eps, 0.0),
        turning=(turning, float(_value(p, torch.tensor(turning)))) if math.isfinite(turning) else None,
        kind="Newton's method",
    )


def _value(p: Parameters, x: Tensor) -> Tensor:
    """xIELU of x <= eps."""
    return p.negative * (torch.expm1(x) - x) + p.beta * x


def recovered(p: Parameters, y: Tensor, side: Tensor) -> Tensor:
    """The input in float64, from outputs and side codes (n,); at -inf, where the output may be NaN, -inf."""
    kind, y, fall = y.dtype, y.double(), p.negative - p.beta
    # Finite inputs whose output has overflowed count as half the largest.
    overflowed, largest = y == math.inf, torch.finfo(kind).max
    right = torch.where(
        overflowed, largest / 2, 2 * y / (p.beta + torch.sqrt(p.beta**2 + 4 * p.positive * y.clamp(min=0)))
    )
    clamped = (p.negative * math.expm1(p.eps) - y) / fall if fall else torch.full_like(y, p.eps)
    x = torch.where(side == CLAMPED, clamped, right)
    for code in (LEFT, MIDDLE):
        solved = ((side == code) & ((code == LEFT) | (y < 0)) & y.isfinite()).nonzero().squeeze(1)
        x[solved] = _solved(p, y[solved], code)
    return torch.where((side == LEFT) & ~y.isfinite(), -math.inf, x)


def _solved(p: Parameters, y: Tensor, code: int) -> Tensor:
    turning = max(p.turning, -800.0)
    if code == LEFT:
        lower, upper = -(y + p.negative) / (p.negative - p.beta), torch.full_like(y, turning)
        lower = lower.minimum(upper)
    else:
        lower, upper = torch.full_like(y, turning), torch.zeros_like(y)
    slope = lambda x: p.beta + p.negative * torch.expm1(x)  # noqa: E731
    return solve.inverse(y, lambda x: _value(p, x), slope, lower, upper, increasing=code == MIDDLE)


def contributions(p: Parameters, dtype: torch.dtype, y: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """df/dp and df/dn of every element, in float32 or wider: x^2 on the right, expm1(min(x, e)) - x on the left."""
    if dtype in (torch.bfloat16, torch.float16):
        first, second = (codes.look_up(_table(p, dtype, y.device, which), y, side) for which in range(2))
        return first, second
    x = recovered(p, y, side)
    x = torch.where(side == CLAMPED, x, torch.where((side == MIDDLE) & (y < 0), x.clamp(max=0), x))
    both = _shares(p, torch.where(side == INFINITE, math.inf, x))
    return both[0], both[1]


def _shares(p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, x * x, 0.0), torch.where(x > 0, 0.0, torch.expm1(x.clamp(max=p.eps)) - x)


@lru_cache(maxsize=closed.TABLES)
def _table(p: Parameters, dtype: torch.dtype, device: torch.device, which: int) -> Tensor:
    this = form(p)
    return codes.table(this.forward, lambda x: _shares(p, x)[which], this.code_of, 1 << BITS, dtype, device)
