"""Activations with parameters that are learnt: the parameters' gradients come from the output, too.

The input that they need is recovered from the output and the side code. Guarantees and errors are those of
`invref.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from invref.autograd import checked, flat, memory_order
from invref.errors import InputError, TwiceError
from invref.kernels import sidebits
from invref.kernels.scheme import parts
from invref.kernels.xielu import BITS, Parameters, compute, contributions, form


def prelu(input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002
    """PReLU, x above 0 and weight * x below; weight: one number, or one for each channel (axis 1), learnt.

    Keeps the output where all weights are above 0, and a bit an element more where one is below 0. Where a weight is 0,
    or so near it that the output has lost x, this call keeps its input as torch does. Source: K. He, X. Zhang, S. Ren
    and J. Sun, arXiv 1502.01852.
    """
    checked("prelu", input)
    if not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)):
        return functional.prelu(input, weight)
    y: Tensor = _PReLU.apply(input, weight)  # type: ignore[no-untyped-call]
    return y


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = functional.prelu(x, weight)
        order = memory_order(y)
        lost, mixed = _lost(weight, x.dtype), bool((weight < 0).any())
        packed = sidebits.pack(flat(x, order) > 0) if mixed and not lost else None
        ctx.save_for_backward(x if lost else y, packed, weight)
        ctx.order, ctx.lost = order, lost
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = _PReLUDecode.apply(dy, *ctx.saved_tensors, ctx.order, ctx.lost)  # type: ignore[no-untyped-call]
        return dx, dw


def _lost(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether weight * x underflows too soon to tell x to a relative precision at 1."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    return not bool((weight.double().abs() * info.eps >= smallest).all())


class _PReLUDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, kept: Tensor, packed: Tensor | None, weight: Tensor, order: list[int], lost: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        channels = [1, -1, *[1] * (kept.dim() - 2)] if weight.numel() > 1 else [1] * kept.dim()
        w, g, v = weight.to(wide).view(channels), dy.to(wide), kept.to(wide)
        positive = v > 0 if packed is None else _shaped(sidebits.unpack(packed, v.numel()).bool(), v, order)
        x = v
        if not lost:
            # A finite input whose product has overflowed counts as the largest.
            largest = torch.finfo(dy.dtype).max
            x = torch.where(v.isinf() & (w.abs() > 1), torch.sign(v) * largest, v) / w
        dw = torch.where(positive, 0.0, g * x).sum_to_size(w.shape)
        return torch.where(positive, g, w * g).to(dy.dtype), dw.view(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise TwiceError("second derivatives are not decoded: use torch's own layer where you need them")


def _shaped(values: Tensor, like: Tensor, order: list[int]) -> Tensor:
    """Flat values in memory order back in the shape of `like`."""
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    return values.view([like.shape[axis] for axis in order]).permute(inverse)


def xielu(
    input: Tensor,  # noqa: A002
    alpha_p: Tensor,
    alpha_n: Tensor,
    beta: float | Tensor = 0.5,
    eps: float | Tensor = -1e-6,
) -> Tensor:
    """xIELU from its raw parameters: slopes softplus(alpha_p) and beta + softplus(alpha_n), learnt, one number each.

    Keeps the output and two bits an element; where the parameters have changed, backward first makes its tables anew,
    in some 30 ms for a 16-bit format and 10 ms for float32.
    Source: A. Huang and I. Schlag, arXiv 2411.13010.
    """
    checked("xielu", input)
    for alpha in (alpha_p, alpha_n):
        if alpha.numel() != 1:
            raise InputError(f"xielu takes one number as alpha, not {tuple(alpha.shape)}: use a layer for each")
    held = [torch.as_tensor(value, dtype=alpha_p.dtype, device=alpha_p.device) for value in (beta, eps)]
    positive = functional.softplus(alpha_p)
    negative = held[0] + functional.softplus(alpha_n)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (input, positive, negative)):
        return compute(input, positive, negative, *held)
    y: Tensor = _XIELU.apply(input, positive, negative, *held)  # type: ignore[no-untyped-call]
    return y


class _XIELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, negative: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
        p, n, b, e = (float(t) for t in (positive, negative, beta, eps))
        parameters = Parameters(p, n, b, e, positive.dtype, positive.dim() == 0)
        y = compute(x, positive, negative, beta, eps)
        order = memory_order(y)
        ctx.save_for_backward(y, form(parameters).scheme(y.dtype).pack(flat(x, order)))
        ctx.parameters, ctx.order, ctx.shapes = parameters, order, (positive.shape, negative.shape)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = any(ctx.needs_input_grad[1:3])
        dx, dp, dn = _XIELUDecode.apply(  # type: ignore[no-untyped-call]
            dy, *ctx.saved_tensors, ctx.parameters, ctx.order, wanted
        )
        p, n = (d.view(shape).to(ctx.parameters.dtype) for d, shape in zip((dp, dn), ctx.shapes, strict=True))
        return dx.to(ctx.dtype), p if wanted else None, n if wanted else None, None, None


class _XIELUDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, y: Tensor, packed: Tensor, parameters: Parameters, order: list[int], wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, out = flat(dy, order), flat(y, order)
        sums = torch.zeros(2, dtype=torch.float64, device=y.device)
        if wanted:
            dx = torch.empty_like(grad)
            for part, side in parts(grad.numel(), packed, BITS, grad.device):
                assert side is not None
                slope, *shares = contributions(parameters, out[part], side)
                dx[part] = (grad[part].to(slope.dtype) * slope).to(grad.dtype)
                sums += torch.stack([(grad[part].double() * share.double()).sum() for share in shares])
        else:
            dx = form(parameters).scheme(y.dtype).backward(grad, out, packed)
        dx = _shaped(dx, y, order)
        return dx, sums[0], sums[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise TwiceError("second derivatives are not decoded: use torch's own layer where you need them")
