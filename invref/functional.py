"""The layers as functions, with torch.nn.functional's names and arguments.

Forward is the framework's own, bit for bit. For backward only the very tensor returned is kept, whose storage the next
layer keeps anyway, and one packed bit per element; the gradient is decoded from them. Must not know formulas.

At x = +inf, -inf and NaN the gradient is NaN, as that of torch's own layers is.
Differentiating twice raises TwiceError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invref.decoders import Decoder, load
from invref.errors import FormulaError, InputError, TwiceError
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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, packed = ctx.saved_tensors
        dx: Tensor = _Decode.apply(dy, y, packed, ctx.decoder, ctx.order)  # type: ignore[no-untyped-call]
        return dx, None, None, None


class _Decode(torch.autograd.Function):
    """dx = dy * g(y, s). A node of its own, so that differentiating it again is an error and never a missing term."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, y: Tensor, packed: Tensor, decoder: Decoder, order: list[int]) -> Tensor:
        flat = dispatch.backward(decoder, _flat(dy, order), _flat(y, order), packed)
        inverse = sorted(range(y.dim()), key=order.__getitem__)
        return flat.view([y.shape[axis] for axis in order]).permute(inverse)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise TwiceError("second derivatives are not decoded: use torch's own layer where you need them")


def _memory_order(x: Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory: in this order a dense tensor is contiguous."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: -strides[axis])


def _flat(x: Tensor, order: list[int]) -> Tensor:
    return x.resolve_neg().permute(order).reshape(-1)


def _apply(name: str, x: Tensor, forward: Callable[[Tensor], Tensor], inplace: bool = False) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} takes a tensor, not {type(x).__name__}: wrap it in torch.tensor(...)")
    if x.dtype not in BY_DTYPE:
        raise InputError(f"{name} takes {', '.join(FORMATS)}, not {x.dtype}: convert with x.float() first")
    if not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x)
    y: Tensor = _Inverted.apply(x, load(name), forward, inplace)  # type: ignore[no-untyped-call]
    return y


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def gelu(input: Tensor, approximate: str = "none") -> Tensor:  # noqa: A002
    """GELU, x * Phi(x) ("none") or its tanh form ("tanh"); any shape, strides preserved as torch preserves them.

    Raises InputError for tensors that are not bfloat16, float16, float32 or float64, FormulaError for another
    `approximate`. Source: D. Hendrycks and K. Gimpel, arXiv 1606.08415.
    """
    if approximate == "none":
        return _apply("gelu", input, _gelu)
    if approximate == "tanh":
        return _apply("gelu_tanh", input, _gelu_tanh)
    raise FormulaError(f"approximate={approximate!r} is unknown: use 'none' or 'tanh'")


def _silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x)


def _silu_inplace(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x, inplace=True)


def silu(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """SiLU, x * sigmoid(x); any shape, strides preserved as torch preserves them; `inplace` overwrites the input.

    Raises InputError for tensors that are not bfloat16, float16, float32 or float64.
    Source: S. Elfwing, E. Uchibe and K. Doya, arXiv 1702.03118.
    """
    return _apply("silu", input, _silu_inplace if inplace else _silu, inplace)
