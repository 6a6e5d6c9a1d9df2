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

WIDTH = 128
"""A multiple of two threads' shares of any vector register's elements."""


def inverse(y: Tensor, f: Function, slope: Function, lower: Tensor, upper: Tensor, increasing: bool = True) -> Tensor:
    """x with f(x) = y, all float64 (n,); f is monotone between `lower` and `upper`, finite bounds of every element."""
    sign = 1.0 if increasing else -1.0
    x = (lower + upper) / 2
    done = y.isnan()
    for _ in range(STEPS):
        residual = (f(x) - y) * sign
        lower = torch.where(residual <= 0, x, lower)
        upper = torch.where(residual >= 0, x, upper)
        step = x - residual / (slope(x) * sign)
        inside = (step > lower) & (step < upper)
        moved = torch.where(inside, step, (lower + upper) / 2)
        settled = (moved - x).abs() <= 2e-16 * x.abs()
        # An element stops where it has settled, whatever the others do: what it gives depends on itself alone.
        x = torch.where(done, x, moved)
        done = done | settled
        if bool(done.all()):
            break
    return torch.where(y.isnan(), y, x)


def steadily(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), all of shape (n,), with every element in torch's vector code, not in its scalar tail.

    That rounds otherwise. For at most 2^16 elements, which no number of threads cuts inside a vector.
    """
    n = tensors[0].numel()
    extra = -n % WIDTH if tensors[0].device.type == "cpu" and n else 0
    if not extra:
        return function(*tensors)
    index = torch.arange(n + extra).clamp(max=n - 1)
    return function(*(t.index_select(0, index) for t in tensors))[:n]


def bracketed(y: Tensor, xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """The knots of an increasing table ys = f(xs) around each y: where the solution lies, if the table spans y."""
    above = torch.searchsorted(ys, y).clamp(1, len(ys) - 1)
    a, b = xs[above - 1], xs[above]
    return torch.minimum(a, b), torch.maximum(a, b)
