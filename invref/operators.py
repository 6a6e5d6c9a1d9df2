"""The layers as operators that torch.compile and torch.export carry in their graphs.

torch.compile keeps both the input and the output of an activation that it traces through. An operator it leaves alone:
what such a graph keeps for backward is the output and the packed side codes. Operators name their layer by its key,
which another process can read. Must not know activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.utils._python_dispatch import _disable_current_modes

from invref import layers
from invref.decoding import Forward, Layer, decode, side_bytes
from invref.errors import TwiceError
from invref.kernels.scheme import Scheme
from invref.order import flat

NARROW = (torch.float16, torch.bfloat16)


def inverted(
    x: Tensor, forward: Forward | None, name: str, arguments: tuple[float, ...] = (), inplace: bool = False
) -> Tensor:
    """forward(x) in a graph, differentiable by a layer with its arguments; with `inplace`, `forward` overwrites x.

    Without a gradient to compute, `forward` itself is traced, if it is given.
    """
    if forward is not None and not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x)
    kind = x.device.type
    if x.dtype in NARROW and kind in layers.PROMOTED.get(name, ()) and torch.is_autocast_enabled(kind):
        x = x.float()
    # Not one text: a graph for varying numbers has no texts of them.
    y: Tensor = torch.ops.invref.forward(x, name, [float(a) for a in arguments], graph_order(x))[0]
    return x.copy_(y) if inplace else y


def graph_order(x: Tensor) -> list[int]:
    """The order of axes in which a graph packs: one that its tensors keep however they are laid out when it runs."""
    for axes, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == axes and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return [0, *range(2, axes), 1]
    return list(range(x.dim()))


def _layer(name: str, arguments: list[float]) -> Layer:
    return layers.get(layers.key_of(name, tuple(arguments)))


def _scheme(x: Tensor, name: str, arguments: list[float]) -> Scheme:
    """The scheme, with real tables also where a graph is being traced with tensors that have none."""
    with _disable_current_modes():
        return _layer(name, arguments).scheme(x.dtype, x.device)


_LIBRARY = library.Library("invref", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("forward(Tensor x, str name, float[] arguments, int[] order) -> (Tensor y, Tensor packed)", tags=_TAGS)
_LIBRARY.define(
    "backward(Tensor dy, Tensor? y, Tensor packed, str name, float[] arguments, int[] order) -> Tensor", tags=_TAGS
)


@library.impl(_LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, name: str, arguments: list[float], order: list[int]) -> tuple[Tensor, Tensor]:
    layer = _layer(name, arguments)
    packed = layer.scheme(x.dtype, x.device).pack(flat(x, order))
    y = layer.forward(x)
    # A graph relies on the layout of x; a few of torch's forwards have another.
    if y.stride() != torch.empty_like(x, device="meta").stride():
        y = torch.empty_like(x).copy_(y)
    return y, x.new_empty(0, dtype=torch.uint8) if packed is None else packed


def _forward_shapes(x: Tensor, name: str, arguments: list[float], order: list[int]) -> tuple[Tensor, Tensor]:
    size = side_bytes(_scheme(x, name, arguments), x)
    return torch.empty_like(x), x.new_empty(max(size, 0), dtype=torch.uint8)


@library.impl(_LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward(
    dy: Tensor, y: Tensor | None, packed: Tensor, name: str, arguments: list[float], order: list[int]
) -> Tensor:
    scheme_of = _layer(name, arguments).scheme
    return decode(dy, y, packed if scheme_of(dy.dtype, dy.device).bits else None, scheme_of, order)


def _backward_shapes(
    dy: Tensor, y: Tensor | None, packed: Tensor, name: str, arguments: list[float], order: list[int]
) -> Tensor:
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return dy.new_empty([dy.shape[axis] for axis in order]).permute(inverse)


library.register_fake("invref::forward", _forward_shapes, lib=_LIBRARY)
library.register_fake("invref::backward", _backward_shapes, lib=_LIBRARY)


@library.impl(_LIBRARY, "forward", "Autograd")
def _forward_tracked(x: Tensor, name: str, arguments: list[float], order: list[int]) -> tuple[Tensor, Tensor]:
    # Written out, and not by register_autograd, under which forward mode loses its tangents in silence.
    _no_tangent(x)
    both: tuple[Tensor, Tensor]
    if torch.is_grad_enabled() and x.requires_grad:
        both = _Tracked.apply(x, name, arguments, order)  # type: ignore[no-untyped-call]
    else:
        both = _untracked(torch.ops.invref.forward, x, name, arguments, order)
    return both


@library.impl(_LIBRARY, "backward", "Autograd")
def _backward_tracked(
    dy: Tensor, y: Tensor | None, packed: Tensor, name: str, arguments: list[float], order: list[int]
) -> Tensor:
    _no_tangent(dy, y)
    args = (dy, y, packed, name, arguments, order)
    dx: Tensor
    if torch.is_grad_enabled() and (dy.requires_grad or (y is not None and y.requires_grad)):
        dx = _TrackedOnce.apply(*args)  # type: ignore[no-untyped-call]
    else:
        dx = _untracked(torch.ops.invref.backward, *args)
    return dx


class _Tracked(Function):
    """The operator below autograd; keeps the output, where it is needed, and the side codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, packed = _untracked(torch.ops.invref.forward, x, *rest)
        ctx.save_for_backward(y if _scheme(x, *rest[:2]).keeps_output else None, packed)
        ctx.rest = rest
        ctx.mark_non_differentiable(packed)
        return y, packed

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        y, packed = ctx.saved_tensors
        return torch.ops.invref.backward(dy, y, packed, *ctx.rest), None, None, None


class _TrackedOnce(Function):
    """The gradient's operator below autograd, which is where graphs end."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        dx: Tensor = _untracked(torch.ops.invref.backward, *args)
        return dx

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise TwiceError("a compiled or exported graph does not decode second derivatives: take them in eager mode")


def _untracked(operator: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _no_tangent(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise TwiceError("an exported graph does not decode forward mode: differentiate the model it came from")
