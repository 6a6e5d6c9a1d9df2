"""The one autograd entry of every layer: y = forward(x), with x forgotten and the gradient decoded from what is kept.

Guarantees that the forward is the one given, bit for bit, that nothing but the returned tensor and the packed side
codes is kept, that dense tensors of any strides are worked on in memory order, and that a second derivative is an error
and never a missing term. Must not know activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invref.errors import InputError, TwiceError
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels.scheme import Scheme

Forward = Callable[[Tensor], Tensor]


def checked(name: str, x: Tensor) -> None:
    """InputError unless x is a tensor of one of the formats."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} takes a tensor, not {type(x).__name__}: wrap it in torch.tensor(...)")
    if x.dtype not in BY_DTYPE:
        raise InputError(f"{name} takes {', '.join(FORMATS)}, not {x.dtype}: convert with x.float() first")


def inverted(x: Tensor, forward: Forward, scheme: Scheme, inplace: bool = False) -> Tensor:
    """forward(x), differentiable by `scheme`; with `inplace`, `forward` overwrites x.

    Shape: any. Without a gradient to compute it is the bare forward.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x)
    y: Tensor = _Inverted.apply(x, forward, scheme, inplace)  # type: ignore[no-untyped-call]
    return y


class _Inverted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, scheme: Scheme, inplace: bool) -> Tensor:
        if inplace:
            # Moves no data, and raises what autograd has against writing into x before anything is written.
            with torch.enable_grad():
                x.copy_(x)
            order = memory_order(x)
            packed = scheme.pack(flat(x, order))
            y = forward(x)
            ctx.mark_dirty(x)
        else:
            y = forward(x)
            order = memory_order(y)
            packed = scheme.pack(flat(x, order))
        ctx.save_for_backward(y if scheme.keeps_output else None, packed)
        ctx.scheme, ctx.order = scheme, order
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, packed = ctx.saved_tensors
        dx: Tensor = _Decode.apply(dy, y, packed, ctx.scheme, ctx.order)  # type: ignore[no-untyped-call]
        return dx, None, None, None


class _Decode(torch.autograd.Function):
    """dx = dy * g. A node of its own, so that differentiating it again is an error and never a missing term."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, y: Tensor | None, packed: Tensor | None, scheme: Scheme, order: list[int]
    ) -> Tensor:
        decoded = scheme.backward(flat(dy, order), None if y is None else flat(y, order), packed)
        inverse = sorted(range(dy.dim()), key=order.__getitem__)
        return decoded.view([dy.shape[axis] for axis in order]).permute(inverse)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise TwiceError("second derivatives are not decoded: use torch's own layer where you need them")


def memory_order(x: Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory: in this order a dense tensor is contiguous."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: -strides[axis])


def flat(x: Tensor, order: list[int]) -> Tensor:
    """x as a contiguous tensor of shape (n,), its axes in the given order."""
    return x.resolve_neg().permute(order).reshape(-1)
