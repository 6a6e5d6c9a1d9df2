"""The one autograd entry of every layer: y = forward(x), with x forgotten and the gradient decoded from what is kept.

Guarantees that the forward is the one given, bit for bit; that nothing but the returned tensor, the packed side codes
and one element more is kept; that dense tensors of any strides are worked on in memory order; and that torch's
transforms pass: vmap, forward mode and second derivatives, nested in any order. A third derivative is an error, never a
missing term. Must not know activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from invref.errors import InputError, TwiceError
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels import dispatch, sidebits
from invref.kernels.room import LARGE
from invref.kernels.scheme import Plain, Scheme

Forward = Callable[[Tensor], Tensor]
Second = Callable[[Tensor, Tensor | None], Tensor]
"""(outputs (n,), packed side codes) -> f''(x) (n,), in float64 for float64 outputs, else in float32."""

_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
_functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


@dataclass(frozen=True, eq=False)
class Layer:
    """What the gradient of an activation with its arguments is decoded from, and how.

    key: a text from which any process makes the same layer; forward: y of x, out of place; scheme, second: for a dtype
    on a device, and of that dtype: None where f'' is 0 everywhere; `second` raises TwiceError where there is none;
    promoted: the kinds of device on which autocast has the forward turn 16-bit inputs into float32.
    """

    key: str
    forward: Forward
    scheme: Callable[[torch.dtype, torch.device], Scheme]
    second: Callable[[torch.dtype, torch.device], Second | None]
    promoted: tuple[str, ...] = ()

    @cached_property
    def plain(self) -> _Plains:
        """What serves plain tensors of a dtype on the CPU; None where nothing does."""
        return _Plains(self.scheme)


class _Plains(dict[torch.dtype, Plain | None]):
    """The `plain` of schemes, looked up once a dtype."""

    def __init__(self, scheme: Callable[[torch.dtype, torch.device], Scheme]) -> None:
        self._scheme = scheme

    def __missing__(self, dtype: torch.dtype) -> Plain | None:
        found = self[dtype] = getattr(self._scheme(dtype, _CPU), "plain", None)
        return found


_CPU = torch.device("cpu")


def checked(name: str, x: Tensor) -> None:
    """InputError unless x is a tensor of one of the formats."""
    if not isinstance(x, Tensor):
        raise InputError(f"{name} takes a tensor, not {type(x).__name__}: wrap it in torch.tensor(...)")
    if x.layout != torch.strided or x.is_nested:
        raise InputError(f"{name} takes dense tensors, not {x.layout}: convert with x.to_dense() or to_padded_tensor()")
    if x.dtype not in BY_DTYPE:
        raise InputError(f"{name} takes {', '.join(FORMATS)}, not {x.dtype}: convert with x.float() first")


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, may be looking on."""
    return _functorch_active() or forward_ad._current_level >= 0


def wants_gradient(x: Tensor) -> bool:
    """Whether something may be differentiated by x; torch.func's transforms hide that inside."""
    return torch.is_grad_enabled() and (x.requires_grad or _functorch_active())


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
        return x.copy_(_apply(x, layer.forward, layer, False)[0])  # type: ignore[no-untyped-call]
    y = _apply(x, forward, layer, inplace)[0]  # type: ignore[no-untyped-call]
    return y


class _Inverted(Function):
    """x -> y, and y once more.

    The second output is what is kept: y's own memory, but to autograd it is x, so that what a second derivative owes to
    x reaches it whole. By way of y that would be f''/f' times f', which is 0/0 at a turning point.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, layer: Layer, inplace: bool) -> tuple[Tensor, Tensor]:
        if inplace:
            # Moves no data, and raises what autograd has against writing into x before anything is written.
            with torch.enable_grad():
                x.copy_(x)
            order = memory_order(x)
            scheme = layer.scheme(x.dtype, x.device)
            packed = scheme.pack(ordered(x, order))
            y = forward(x)
            ctx.mark_dirty(x)
            keeps = scheme.keeps_output
        else:
            y, packed, order, keeps = _computed(x, forward, layer)
        kept = y.detach()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept if keeps else None, packed)
        ctx.rest = layer, order
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, dy, through), None, None, None


def _computed(x: Tensor, forward: Forward, layer: Layer) -> tuple[Tensor, Tensor | None, list[int], bool]:
    """The output, the packed side codes, their order of axes, and whether backward needs the output."""
    if x.is_cuda and not _promoted(x, layer) and (both := _fused(x, layer)) is not None:
        return *both, memory_order(x), layer.scheme(x.dtype, x.device).keeps_output
    y = forward(x) if x.nbytes < LARGE else _large(x, forward, layer)
    # Written out, as below in `_served`: each call of a function takes longer than what it asks here.
    plain = x.is_cpu and type(x) in dispatch.PLAIN and x.is_contiguous() and not x.is_neg()
    if plain and y.dtype is x.dtype and y.is_contiguous() and (kernels := layer.plain[y.dtype]):
        return y, kernels.pack(x), _PLAIN[: x.dim()], True
    scheme = layer.scheme(y.dtype, y.device)
    # Under autocast the forward may return another dtype than it was given.
    source = x if y.dtype == x.dtype else x.to(y.dtype)
    if source.is_contiguous() and y.is_contiguous() and not source.is_neg():
        return y, scheme.pack(source), _PLAIN[: y.dim()], scheme.keeps_output
    order = memory_order(y)
    return y, scheme.pack(ordered(source, order)), order, scheme.keeps_output


def _large(x: Tensor, forward: Forward, layer: Layer) -> Tensor:
    into_room = getattr(layer.scheme(x.dtype, x.device), "into_room", None)
    # In the layout it has, as torch's kernels differ by layout in the last bit.
    y = into_room(x) if into_room and x.is_contiguous() and not _promoted(x, layer) else None
    return forward(x) if y is None else y


def _gradient(ctx: Any, dy: Tensor | None, through: Tensor | None) -> Tensor | None:
    """What x owes to the output and to what is kept."""
    if dy is None:
        return through
    kept, packed = ctx.saved_tensors
    layer, order = ctx.rest
    dx: Tensor
    if torch.is_grad_enabled() or transformed():
        dx = _Decode.apply(dy, kept, packed, layer, order)  # type: ignore[no-untyped-call]
    else:
        dx = decode(dy, kept, packed, layer, order)
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
        if not _functorch_active():
            order = memory_order(kept)
            if not layer.scheme(kept.dtype, kept.device).keeps_output:
                kept = None
        _keep(ctx, (kept, packed), (layer, order))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, dy, through), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        dy: Tensor = _Decode.apply(tangent, *ctx.saved_tensors, *ctx.rest)  # type: ignore[no-untyped-call]
        return dy, None, tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
        # Pointwise: the batched tensor is one tensor, and its side codes are packed all together.
        at = in_dims[0]
        return _Transformed.apply(*args), (at, None, at)  # type: ignore[no-untyped-call]


_apply = super(Function, _Inverted).apply
"""Without torch.func's transforms there are no default arguments to bind, which costs as much as all the rest."""


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
        return decode(dy, kept, packed, layer, order)

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
        if second is None or _without_numbers(kept):
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


def decode(dy: Tensor, kept: Tensor | None, packed: Tensor | None, layer: Layer, order: list[int] | None) -> Tensor:
    """dx of dy, from the output (None where it is not kept) and the side codes in an order of axes, or in memory's."""
    if kept is not None and (plain := _served(dy, kept, packed, layer, order)):
        return plain.decode(dy, kept, packed)
    if _batched_gradient(dy):
        # Under is_grads_batched; linear in dy, whose batch is out of reach of the kernels.
        ones = torch.ones(dy.shape, dtype=dy.dtype, device=dy.device)
        return dy * decode(ones, kept, packed, layer, order)
    if dy._is_zerotensor():
        dy = torch.zeros(dy.shape, dtype=dy.dtype, device=dy.device)
    like = dy if kept is None else kept
    if (like.is_meta or type(like) is not Tensor) and _without_numbers(like) and _without_numbers(dy):
        order = memory_order(like) if order is None else order
        return shaped(dy.new_empty(dy.numel()), dy.shape, order)
    scheme = layer.scheme(like.dtype, like.device)
    _check_what_came_back(dy, like, packed, scheme)
    order = memory_order(like) if order is None else order
    packed = packed if packed is None or packed.is_contiguous() else packed.contiguous()
    decoded = scheme.backward(ordered(dy, order), flat(like, order) if scheme.keeps_output else None, packed)
    return decoded if dy.dim() == 1 else shaped(decoded, dy.shape, order)


def _served(dy: Tensor, y: Tensor, packed: Tensor | None, layer: Layer, order: list[int] | None) -> Plain | None:
    """The kernels that read a gradient, an output and side codes where they lie in memory, if they belong together."""
    if (
        type(dy) in dispatch.PLAIN
        and type(y) is Tensor
        and type(packed) is Tensor
        and dy.is_cpu
        and y.is_cpu
        and packed.is_cpu
        and dy.dtype is y.dtype
        and packed.dtype is torch.uint8
        and dy.shape == y.shape
        and y.is_contiguous()
        and (order is None or order == _PLAIN[: y.dim()])
        and packed.is_contiguous()
        and not (dy.is_neg() or y.is_neg() or dy._is_zerotensor() or _batched_gradient(dy))
        and (plain := layer.plain[y.dtype])
        and packed.numel() == plain.bits * sidebits.size(y.numel())
    ):
        return plain
    return None


def _check_what_came_back(dy: Tensor, like: Tensor, packed: Tensor | None, scheme: Scheme) -> None:
    """InputError where what was kept is not what comes back, as hooks may have it."""
    count = -1 if packed is None else packed.numel()
    if dy.shape != like.shape or dy.dtype is not like.dtype or count != side_bytes(scheme, like):
        raise InputError(
            f"backward got {dy.dtype} {tuple(dy.shape)}, an output {like.dtype} {tuple(like.shape)}, {count} bytes of "
            "side codes, which do not belong together: hooks on saved tensors must return what they were given"
        )
    if dy.device != like.device or (packed is not None and packed.device != like.device):
        codes = "" if packed is None else f", side codes on {packed.device}"
        raise InputError(
            f"backward got a gradient on {dy.device}, an output on {like.device}{codes}: hooks on saved tensors must "
            "return them on the device where they were"
        )
    if packed is not None and packed.dtype is not torch.uint8:
        raise InputError(f"side codes came back as {packed.dtype}: hooks on saved tensors must leave uint8 as it is")


def side_bytes(scheme: Scheme, like: Tensor) -> int:
    """How many bytes the side codes of an output take, -1 without any."""
    if not scheme.bits:
        return -1
    n = like.numel()
    if like.is_cpu:
        return scheme.bits * sidebits.size(n)
    # A gate's one bit has the layout of the device's kernels, all other codes that of `sidebits`.
    own = getattr(scheme, "size", None)
    return own(n, like.device) if own else scheme.bits * sidebits.size(n)


def _without_numbers(x: Tensor) -> bool:
    """Tensors that stand for their shape alone: on the meta device, and torch's fake ones."""
    return x.is_meta or (type(x) is not Tensor and isinstance(x, FakeTensor))


def memory_order(x: Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory: in this order a dense tensor is contiguous."""
    if x.dim() < 2:
        return list(range(x.dim()))
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: -strides[axis])


def flat(x: Tensor, order: list[int]) -> Tensor:
    """x as a contiguous tensor of shape (n,), its axes in the given order."""
    whole = ordered(x, order)
    return whole if whole.dim() == 1 and whole.is_contiguous() else whole.reshape(-1).contiguous()


def ordered(x: Tensor, order: list[int]) -> Tensor:
    """x with its axes in the given order, of shape (n,) where contiguous then: a copy of a lazy minus only."""
    if x.is_neg():
        x = x.resolve_neg()
    if order != _PLAIN[: len(order)]:
        x = x.permute(order)
    return x.view(-1) if len(order) != 1 and x.is_contiguous() else x


def shaped(values: Tensor, shape: Sequence[int], order: list[int]) -> Tensor:
    """Flat values in the given order of axes as a tensor of that shape."""
    if order == _PLAIN[: len(order)]:
        return values if len(order) == 1 else values.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return values.view([shape[axis] for axis in order]).permute(inverse)


_PLAIN = list(range(64))
"""The axes in their own order; torch has tensors of at most 64."""
