"""The layers as functions, with torch.nn.functional's names and arguments.

Forward is the framework's own, bit for bit. For backward only the very tensor returned is kept, whose storage the next
layer keeps anyway, and one packed bit per element; the gradient is decoded from them. Must not know formulas.

At x = +inf, -inf and NaN the gradient is NaN, as that of torch's own layers is. Differentiating twice raises torch's
error for once-differentiable functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from invref.decoders import Decoder, load
from invref.errors import FormulaError, InputError
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels import dispatch


class _Inverted(torch.autograd.Function):
    """y = forward(x), with x forgotten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decoder: Decoder, forward: Callable[[Tensor], Tensor], inplace: bool) -> Tensor:
        if inplace:
            order = _memory_order(x)
            packed = dispatch.pack(decoder, _flat(x, order))
            y = forward(x)
            ctx.mark_dirty(x)
        else:
            y = forward(x)
            order = _memory_order(y)
            packed = dispatch.pack(decoder, _flat(x, order))
        ctx.save_for_backward(y, packed)
        ctx.decoder, ctx.order = decoder, order
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, packed = ctx.saved_tensors
        flat = dispatch.backward(ctx.decoder, _flat(dy, ctx.order), _flat(y, ctx.order), packed)
        ordered = flat.view([y.shape[axis] for axis in ctx.order])
        inverse = sorted(range(y.dim()), key=ctx.order.__getitem__)
        return ordered.permute(inverse), None, None, None


def _memory_order(x: Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory: in this order a dense tensor is contiguous."""
    return sorted(range(x.dim()), key=lambda axis: -x.stride(axis))


def _flat(x: Tensor, order: list[int]) -> Tensor:
    return x.permute(order).reshape(-1)


def _apply(name: str, x: Tensor, forward: Callable[[Tensor], Tensor], inplace: bool = False) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} takes a tensor, not {type(x).__name__}: wrap it in torch.tensor(...)")
    if x.dtype not in BY_DTYPE:
        raise InputError(f"{name} takes {', '.join(FORMATS)}, not {x.dtype}: convert with x.float() first")
    if not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x)
    y: Tensor = _Inverted.apply(x, load(name), forward, inplace)
    return y


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU, x * Phi(x) ("none") or its tanh form ("tanh"); any shape, strides preserved as torch preserves them.

    Raises InputError for tensors that are not bfloat16, float16, float32 or float64, FormulaError for another
    `approximate`. Source: D. Hendrycks and K. Gimpel, arXiv 1606.08415.
    """
    if approximate == "none":
        return _apply("gelu", x, _gelu)
    if approximate == "tanh":
        return _apply("gelu_tanh", x, _gelu_tanh)
    raise FormulaError(f"approximate={approximate!r} is unknown: use 'none' or 'tanh'")


def _silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def _silu_inplace(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x, inplace=True)


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """SiLU, x * sigmoid(x); any shape, strides preserved as torch preserves them; `inplace` overwrites x.

    Raises InputError for tensors that are not bfloat16, float16, float32 or float64.
    Source: S. Elfwing, E. Uchibe and K. Doya, arXiv 1702.03118.
    """
    return _apply("silu", x, _silu_inplace if inplace else _silu, inplace)
