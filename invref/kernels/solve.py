"""Inverses in float64 without a closed form: a bracketed Newton iteration in plain torch operations.

Guarantees that the iterate never leaves its bracket, so that it converges wherever f is monotone there. Must not know
which functions it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

STEPS = 60
"""Halving alone would need as many for the float64 significand; Newton needs six to ten, and stops the loop."""


def inverse(y: Tensor, f: Function, slope: Function, lower: Tensor, upper: Tensor, increasing: bool = True) -> Tensor:
    """x with f(x) = y, all float64 (n,); f is monotone between `lower` and `upper`, finite bounds of every element."""
    sign = 1.0 if increasing else -1.0
    x = (lower + upper) / 2
    for _ in range(STEPS):
        residual = (f(x) - y) * sign
        lower = torch.where(residual <= 0, x, lower)
        upper = torch.where(residual >= 0, x, upper)
        step = x - residual / (slope(x) * sign)
        inside = (step > lower) & (step < upper)
        moved = torch.where(inside, step, (lower + upper) / 2)
        settled = (moved - x).abs() <= 2e-16 * x.abs()
        x = moved
        if bool(settled.logical_or(y.isnan()).all()):
            break
    return torch.where(y.isnan(), y, x)


def bracketed(y: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """The knots of an increasing table ys = f(xs) around each y: where the solution lies, if the table spans y."""
    above = torch.searchsorted(ys, y).clamp(1, len(ys) - 1)
    a, b = xs[above - 1], xs[above]
    return torch.minimum(a, b), torch.maximum(a, b)
