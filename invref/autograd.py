"""The one autograd entry of every layer: y = forward(x), with x forgotten and the gradient decoded from what is kept.

Guarantees that the forward is the one given, bit for bit; that nothing but the returned tensor, the packed side codes
and one element more is kept; that dense tensors of any strides are worked on in memory order; and that torch's
transforms pass: vmap, forward mode and second derivatives, nested in any order. A third derivative is an error, never a
missing term. Must not know activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.autograd.function import Function

from invref.decoding import Forward, Layer, decode, fit, with_memory, without_numbers
from invref.errors import TwiceError
from invref.kernels.dispatch import PLAIN
from invref.kernels.room import LARGE
from invref.order import AXES, flat, memory_order, ordered, shaped

functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a transform of torch.func is looking on."""


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, may be looking on."""
    return functorch_active() or forward_ad._current_level >= 0


def wants_gradient(x: Tensor) -> bool:
    """Whether something may be differentiated by x; torch.func's transforms hide that inside."""
    return is_grad_enabled() and (x.requires_grad or functorch_active())


def inverted(x: Tensor, forward: Forward, layer: Layer, inplace: bool = False) -> Tensor:
    """forward(x), differentiable by the layer's scheme; with `inplace`, `forward` overwrites x.

    Shape: any. Without a gradient to compute it is the bare forward.
    """
    return tracked(x, forward, layer, inplace) if wants_gradient(x) else forward(x)


def tracked(x: Tensor, forward: Forward, layer: Layer, inplace: bool = False) -> Tensor:
    """`inverted` of an x that wants its gradient."""
    y: Tensor
    if transformed():
        # Autograd has no function that writes under a transform.
        y = _Transformed.apply(x, layer.forward, layer)[0]  # type: ignore[no-untyped-call]
        return x.copy_(y) if inplace else y
    if inplace and x._is_view():
        # Autograd has no function of several outputs that writes into a view.
        return x.copy_(recorded(x, layer.forward, layer, False)[0])
    y = recorded(x, forward, layer, inplace)[0]
    return y


class _Inverted(Function):
    """x -> y, and y once more.

    The second output is what is kept: y's own memory, but to autograd it is x, so that what a second derivative owes to
    x reaches it whole. By way of y that would be f''/f' times f', which is 0/0 at a turning point.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, layer: Layer, inplace: bool) -> tuple[Tensor, Tensor]:
        # Written out, as is `fit`: a call of a function takes longer than what it asks here.
        if (
            type(x) in PLAIN
            and x.is_cpu
            and x.is_contiguous()
            and not (inplace or x.is_neg() or x._is_zerotensor())
            and (plain := layer.plain[x.dtype])
        ):
            y = forward(x) if x.nbytes < LARGE else _large(x, forward, layer)
            if y.dtype is x.dtype and y.is_contiguous():
                kept = y.detach()
                ctx.set_materialize_grads(False)
                ctx.save_for_backward(kept, plain.pack(x))
                ctx.rest, ctx.plain = (layer, AXES[: x.dim()]), plain
                return y, kept
            packed, order, keeps = _packed(x, y, layer)
        elif inplace:
            y, packed, order, keeps = _overwritten(ctx, x, forward, layer)
        else:
            y, packed, order, keeps = _computed(x, forward, layer)
        kept = y.detach()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept if keeps else None, packed)
        ctx.rest, ctx.plain = (layer, order), None
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return through, None, None, None
        kept, packed = ctx.saved_tensors
        if (
            through is None
            and (plain := ctx.plain)
            and not (is_grad_enabled() or functorch_active() or forward_ad._current_level >= 0)
            and fit(dy, kept, packed, plain)
        ):
            return plain.decode(dy, kept, packed), None, None, None
        return _gradient(dy, through, kept, packed, *ctx.rest), None, None, None


_Packed = tuple[Tensor | None, list[int], bool]
"""The packed side codes, their order of axes, and whether backward needs the output."""


def _overwritten(ctx: Any, x: Tensor, forward: Forward, layer: Layer) -> tuple[Tensor, *_Packed]:
    """The output, which is x, and what is packed."""
    # Moves no data, and raises what autograd has against writing into x before anything is written.
    with torch.enable_grad():
        x.copy_(x)
    order = memory_order(x)
    scheme = layer.scheme(x.dtype, x.device)
    packed = scheme.pack(ordered(with_memory(x), order))
    y = forward(x)
    ctx.mark_dirty(x)
    return y, packed, order, scheme.keeps_output


def _computed(x: Tensor, forward: Forward, layer: Layer) -> tuple[Tensor, *_Packed]:
    """The output and what is packed."""
    if x.is_cuda and not _promoted(x, layer) and (both := _fused(x, layer)) is not None:
        return *both, memory_order(x), layer.scheme(x.dtype, x.device).keeps_output
    y = forward(x) if x.nbytes < LARGE else _large(x, forward, layer)
    return y, *_packed(x, y, layer)


def _packed(x: Tensor, y: Tensor, layer: Layer) -> _Packed:
    scheme = layer.scheme(y.dtype, y.device)
    # Under autocast the forward may return another dtype than it was given.
    source = with_memory(x if y.dtype == x.dtype else x.to(y.dtype))
    if source.is_contiguous() and y.is_contiguous() and not source.is_neg():
        return scheme.pack(source), AXES[: y.dim()], scheme.keeps_output
    order = memory_order(y)
    return scheme.pack(ordered(source, order)), order, scheme.keeps_output


def _large(x: Tensor, forward: Forward, layer: Layer) -> Tensor:
    into_room = getattr(layer.scheme(x.dtype, x.device), "into_room", None)
    # In the layout it has, as torch's kernels differ by layout in the last bit.
    y = into_room(x) if into_room and x.is_contiguous() and not _promoted(x, layer) else None
    return forward(x) if y is None else y


def _gradient(
    dy: Tensor,
    through: Tensor | None,
    kept: Tensor | None,
    packed: Tensor | None,
    layer: Layer,
    order: list[int] | None,
) -> Tensor:
    """What x owes to the output and to what is kept."""
    dx: Tensor
    if is_grad_enabled() or transformed():
        dx = _Decode.apply(dy, kept, packed, layer, order)  # type: ignore[no-untyped-call]
    else:
        dx = decode(dy, kept, packed, layer.scheme, order)
    return dx if through is None else dx + through


class _Transformed(Function):
    """x -> y, the packed side codes, and y once more: `_Inverted` under a transform, which wants to see them all."""

    @staticmethod
    def forward(x: Tensor, forward: Forward, layer: Layer) -> tuple[Tensor, Tensor | None, Tensor]:
        y, packed, *_ = _computed(x, forward, layer)
        return y, packed, y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        layer = inputs[2]
        _, packed, kept = output
        order = None
        if not functorch_active():
            order = memory_order(kept)
            if not layer.scheme(kept.dtype, kept.device).keeps_output:
                kept = None
        _keep(ctx, (kept, packed), (layer, order))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = through if dy is None else _gradient(dy, through, *ctx.saved_tensors, *ctx.rest)
        return dx, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        dy: Tensor = _Decode.apply(tangent, *ctx.saved_tensors, *ctx.rest)  # type: ignore[no-untyped-call]
        return dy, None, tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
        # Pointwise: the batched tensor is one tensor, and its side codes are packed all together.
        at = in_dims[0]
        return _Transformed.apply(*args), (at, None, at)  # type: ignore[no-untyped-call]


recorded: Callable[[Tensor, Forward, Layer, bool], tuple[Tensor, Tensor]] = super(Function, _Inverted).apply
"""(x, forward, layer, inplace) -> y, and what is kept, where no transform looks on.

Without torch.func's transforms there are no default arguments to bind, which costs as much as all the rest.
"""


def _promoted(x: Tensor, layer: Layer) -> bool:
    kind = x.device.type
    return kind in layer.promoted and torch.is_autocast_enabled(kind)


def _fused(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor] | None:
    """The output and the side codes in one pass over a dense tensor, where the scheme has a kernel for that."""
    fused, order = getattr(layer.scheme(x.dtype, x.device), "fused", None), memory_order(x)
    whole = ordered(x, order)
    if fused is None or not whole.is_contiguous() or whole.dim() > 1:
        return None
    both = fused(whole)
    return None if both is None else (shaped(both[0], x.shape, order), both[1])


class _Decode(Function):
    """dx = dy * f'(x): linear in dy, and in x by `kept`."""

    @staticmethod
    def forward(
        dy: Tensor, kept: Tensor | None, packed: Tensor | None, layer: Layer, order: list[int] | None
    ) -> Tensor:
        return decode(dy, kept, packed, layer.scheme, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs[:3], inputs[3:])

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, *kept = ctx.saved_tensors
        ddy = through = None
        if ddx is not None and ctx.needs_input_grad[0]:
            ddy = _Decode.apply(ddx, *kept, *ctx.rest)  # type: ignore[no-untyped-call]
        if ddx is not None and ctx.needs_input_grad[1]:
            through = _Bend.apply(ddx, dy, *kept, *ctx.rest)  # type: ignore[no-untyped-call]
        return ddy, through, None, None, None

    @staticmethod
    def jvp(ctx: Any, dy_tangent: Tensor | None, x_tangent: Tensor | None, *_: None) -> Tensor | None:
        dy, *kept = ctx.saved_tensors
        terms: list[Tensor] = []
        if dy_tangent is not None:
            terms.append(_Decode.apply(dy_tangent, *kept, *ctx.rest))  # type: ignore[no-untyped-call]
        if x_tangent is not None:
            terms.append(_Bend.apply(x_tangent, dy, *kept, *ctx.rest))  # type: ignore[no-untyped-call]
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _batched(_Decode, info.batch_size, in_dims, args, gradients=1)


class _Bend(Function):
    """a * b * f''(x). A third derivative of the layer would be its own by x, and is an error."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, kept: Tensor, packed: Tensor | None, layer: Layer, order: list[int] | None
    ) -> Tensor:
        second = layer.second(kept.dtype, kept.device)
        if second is None or without_numbers(kept):
            return torch.zeros_like(a)
        order = memory_order(kept) if order is None else order
        curve = second(flat(kept, order), packed)
        return shaped((flat(a, order).to(curve.dtype) * flat(b, order) * curve).to(a.dtype), kept.shape, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise TwiceError("third derivatives are not decoded: use torch's own layer where you need them")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise TwiceError("third derivatives are not decoded: use torch's own layer where you need them")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _batched(_Bend, info.batch_size, in_dims, args, gradients=2)


def _keep(ctx: Any, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.rest = rest


def _batched(
    function: type[Function], count: int, in_dims: Sequence[int | None], args: Sequence[Any], gradients: int
) -> tuple[Tensor, int]:
    """A decoding under vmap: the gradients, which come first, batched or not, and what is kept of a call likewise."""
    given, rest = args[:gradients], args[gradients:]
    kept, at = rest[0], in_dims[gradients]
    if at is not None:
        # The side codes are those of the whole batch: the gradients are brought to its axes.
        whole = [
            g.unsqueeze(at).expand(kept.shape) if d is None else g.movedim(d, at)
            for g, d in zip(given, in_dims, strict=False)
        ]
        return function.apply(*whole, *rest), at
    rows = [
        function.apply(*(g if d is None else g.select(d, i) for g, d in zip(given, in_dims, strict=False)), *rest)
        for i in range(count)
    ]
    return torch.stack(rows) if rows else given[0].new_empty((0, *kept.shape)), 0
