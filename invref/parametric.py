"""Activations with parameters that are learnt: the parameters' gradients come from the output, too.

The input that they need is recovered from the output and the side code. Guarantees and errors are those of
`invref.functional`, except that under torch.compile, torch.func's transforms and forward mode these layers are torch's
own, and keep what those keep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional
from torch.overrides import handle_torch_function

from invref.autograd import transformed
from invref.decoding import came_back, decode
from invref.errors import InputError, TwiceError
from invref.inputs import checked, into_graph, recording
from invref.kernels import sidebits
from invref.kernels.scheme import parts
from invref.kernels.xielu import BITS, Parameters, compute, contributions, decoded, form
from invref.order import flat, memory_order, shaped
from invref.placements import is_split, locally


def prelu(input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002
    """PReLU, x above 0 and weight * x below; weight: one number, or one for each channel (axis 1), learnt.

    Keeps the output where all weights are above 0, and a bit an element more where one is below 0. Where a weight is 0,
    or so near it that the output has lost x, this call keeps its input as torch does. Source: K. He, X. Zhang, S. Ren
    and J. Sun, arXiv 1502.01852.
    """
    if recording(input, weight):
        recorded: Tensor = handle_torch_function(prelu, (input, weight), input, weight)
        return recorded
    checked("prelu", input)
    if is_split(input) or is_split(weight):
        return locally("prelu", prelu, input, weight, channels=weight.numel() > 1)
    if into_graph():
        return functional.prelu(input, weight)
    if transformed():
        return _composed(input, weight)
    if not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)):
        return functional.prelu(input, weight)
    y: Tensor = _PReLU.apply(input, weight)[0]  # type: ignore[no-untyped-call]
    return y


def _composed(x: Tensor, weight: Tensor) -> Tensor:
    """PReLU by operations that every nest of transforms takes, which torch's own does not; the same values."""
    w = weight.view([1, -1, *[1] * (x.dim() - 2)]) if weight.numel() > 1 else weight.view([1] * x.dim())
    return torch.where(x > 0, x, w * torch.where(x > 0, 0.0, x))


class _PReLU(Function):
    """x and weight -> y, and what is kept of it: to autograd that is x, as in `invref.autograd`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = functional.prelu(x, weight)
        order = memory_order(y)
        lost, mixed = _lost(weight, y.dtype), bool((weight < 0).any())
        packed = sidebits.pack(flat(x, order) > 0) if mixed and not lost else None
        kept = x.detach() if lost else y.detach()
        ctx.save_for_backward(kept, packed, weight)
        ctx.order, ctx.lost = order, lost
        ctx.set_materialize_grads(False)
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return through, None
        dx, dw = _PReLUDecode.apply(dy, *ctx.saved_tensors, ctx.order, ctx.lost)  # type: ignore[no-untyped-call]
        return dx if through is None else dx + through, dw


def _lost(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether weight * x underflows too soon to tell x to a relative precision at 1."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    return not bool((weight.double().abs() * info.eps >= smallest).all())


class _PReLUDecode(Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, kept: Tensor, packed: Tensor | None, weight: Tensor, order: list[int], lost: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dy, kept, packed, weight)
        ctx.order, ctx.lost = order, lost
        ctx.set_materialize_grads(False)
        positive, x, w = _recovered(kept, packed, weight, order, lost)
        g = dy.to(x.dtype)
        dw = torch.where(positive, 0.0, g * x).sum_to_size(w.shape)
        return torch.where(positive, g, w * g).to(dy.dtype), dw.view(weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, kept, packed, weight = ctx.saved_tensors

        def second(dy: Tensor, kept: Tensor, weight: Tensor, *seconds: Tensor | None) -> tuple[Tensor, ...]:
            _, x, _ = _recovered(kept, packed, weight, ctx.order, ctx.lost)
            return _twice(functional.prelu, dy, seconds, x.to(kept.dtype), weight)

        d_dy, d_x, d_w = _Last.apply(second, dy, kept, weight, *seconds)  # type: ignore[no-untyped-call]
        return d_dy, d_x, None, d_w, None, None


def _recovered(
    kept: Tensor, packed: Tensor | None, weight: Tensor, order: list[int], lost: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether x is above 0, x, and the weight in the shape of its axis, from what PReLU keeps; in float32 or wider."""
    wide = torch.float64 if kept.dtype == torch.float64 else torch.float32
    channels = [1, -1, *[1] * (kept.dim() - 2)] if weight.numel() > 1 else [1] * kept.dim()
    w, v = weight.to(wide).view(channels), kept.to(wide)
    positive = v > 0
    if packed is not None:
        positive = shaped(sidebits.unpack(packed, v.numel()).bool(), v.shape, order)
    if lost:
        return positive, v, w
    # A finite input whose product has overflowed counts as the largest.
    largest = torch.finfo(kept.dtype).max
    scaled = torch.where(v.isinf() & (w.abs() > 1), torch.sign(v) * largest, v) / w
    return positive, torch.where(positive, v, scaled), w


class _Last(Function):
    """A second derivative, of which there is no third: function(*tensors)."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise TwiceError("third derivatives are not decoded: use torch's own layer where you need them")


def _twice(
    layer: Callable[..., Tensor], dy: Tensor, seconds: tuple[Tensor | None, ...], *inputs: Tensor
) -> tuple[Tensor, ...]:
    """What second derivatives owe to dy and to the inputs of a layer, by autograd's rules at these inputs, widened.

    seconds: the gradients of the loss by those of the layer, None where they do not count.
    """
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        leaves = [t.detach().to(wide).requires_grad_() for t in (dy, *inputs)]
        first = torch.autograd.grad(layer(*leaves[1:]), leaves[1:], leaves[0], create_graph=True)
        counted = [(d, dd.to(wide)) for d, dd in zip(first, seconds, strict=True) if dd is not None]
        found = torch.autograd.grad(
            [d for d, _ in counted], leaves, [dd for _, dd in counted], allow_unused=True, materialize_grads=True
        )
    return tuple(d.to(t.dtype) for d, t in zip(found, (dy, *inputs), strict=True))


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
    if recording(*(inputs := (input, alpha_p, alpha_n, beta, eps))):
        recorded: Tensor = handle_torch_function(xielu, inputs, *inputs)
        return recorded
    checked("xielu", input)
    for alpha in (alpha_p, alpha_n):
        if alpha.numel() != 1:
            raise InputError(f"xielu takes one number as alpha, not {tuple(alpha.shape)}: use a layer for each")
    held = [torch.as_tensor(value, dtype=alpha_p.dtype, device=alpha_p.device) for value in (beta, eps)]
    if any(value.requires_grad for value in held):
        raise InputError("xielu takes a fixed beta and eps, for which it has no gradient: use beta.detach()")
    if is_split(input) or is_split(alpha_p) or is_split(alpha_n):
        return locally("xielu", partial(xielu, beta=float(beta), eps=float(eps)), input, alpha_p, alpha_n)
    positive = functional.softplus(alpha_p)
    negative = held[0] + functional.softplus(alpha_n)
    if into_graph() or transformed():
        return compute(input, positive, negative, *held)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (input, positive, negative)):
        return compute(input, positive, negative, *held)
    y: Tensor = _XIELU.apply(input, positive, negative, *held)[0]  # type: ignore[no-untyped-call]
    return y


class _XIELU(Function):
    """x and both slopes -> y, and y once more as what is kept: to autograd that is x, as in `invref.autograd`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, positive: Tensor, negative: Tensor, beta: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        p, n, b, e = (float(t) for t in (positive, negative, beta, eps))
        parameters = Parameters(p, n, b, e, positive.dtype, positive.dim() == 0)
        y = compute(x, positive, negative, beta, eps)
        order = memory_order(y)
        kept = y.detach()
        ctx.save_for_backward(kept, form(parameters).scheme(y.dtype).pack(flat(x, order)), positive, negative)
        ctx.parameters, ctx.order, ctx.dtype = parameters, order, x.dtype
        ctx.set_materialize_grads(False)
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return through, None, None, None, None
        wanted = any(ctx.needs_input_grad[1:3])
        dx, dp, dn = _XIELUDecode.apply(  # type: ignore[no-untyped-call]
            dy, *ctx.saved_tensors, ctx.parameters, ctx.order, wanted
        )
        dx = dx.to(ctx.dtype)
        dx = dx if through is None else dx + through
        return dx, dp if wanted else None, dn if wanted else None, None, None


class _XIELUDecode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        y: Tensor,
        packed: Tensor,
        positive: Tensor,
        negative: Tensor,
        parameters: Parameters,
        order: list[int],
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(dy, y, packed, positive, negative)
        ctx.parameters, ctx.order = parameters, order
        ctx.set_materialize_grads(False)
        scheme = form(parameters).scheme(y.dtype)
        sums = torch.zeros(2, dtype=torch.float64, device=y.device)
        if wanted:
            given, codes = came_back(dy, y, packed, scheme)
            grad, out = flat(given, order), flat(y, order)
            dx = torch.empty_like(grad)
            for part, side in parts(grad.numel(), codes, BITS, grad.device):
                assert side is not None
                slope, *shares = contributions(parameters, out[part], side)
                dx[part] = (grad[part].to(slope.dtype) * slope).to(grad.dtype)
                sums = sums + torch.stack([(grad[part].double() * share.double()).sum() for share in shares])
            dx = shaped(dx, y.shape, order)
        else:
            dx = decode(dy, y, packed, lambda *_: scheme, order)
        dp, dn = (d.view(t.shape).to(t.dtype) for d, t in zip(sums, (positive, negative), strict=True))
        return dx, dp, dn

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, y, packed, positive, negative = ctx.saved_tensors
        beta, eps = ctx.parameters.beta, ctx.parameters.eps

        def second(dy: Tensor, y: Tensor, p: Tensor, n: Tensor, *seconds: Tensor | None) -> tuple[Tensor, ...]:
            out = flat(y, ctx.order)
            wide = out if out.dtype in (torch.float32, torch.float64) else out.float()
            x = decoded(ctx.parameters, wide, sidebits.unpack(packed, out.numel(), BITS))[1]
            return _twice(
                lambda x, p, n: compute(x, p, n, x.new_tensor(beta), x.new_tensor(eps)),
                dy,
                seconds,
                shaped(x.to(y.dtype), y.shape, ctx.order),
                p,
                n,
            )

        d_dy, d_x, d_p, d_n = _Last.apply(second, dy, y, positive, negative, *seconds)  # type: ignore[no-untyped-call]
        return d_dy, d_x, None, d_p, d_n, None, None, None
