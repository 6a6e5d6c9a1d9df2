"""What the gradient of a layer is decoded from, and decoding it: dx of dy, the output and the packed side codes.

Guarantees that nothing is decoded from tensors that do not belong together, and that dense tensors of any strides are
worked on in memory order. Must not know autograd's rules or activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, uint8
from torch._subclasses.fake_tensor import FakeTensor

from invref.errors import InputError
from invref.kernels import sidebits
from invref.kernels.dispatch import PLAIN
from invref.kernels.scheme import Plain, Scheme
from invref.kernels.sidebits import BLOCK, LANES
from invref.order import flat, memory_order, ordered, shaped

Forward = Callable[[Tensor], Tensor]
SchemeOf = Callable[[torch.dtype, torch.device], Scheme]
"""What is stored for a dtype on a device, and how it is decoded."""
Second = Callable[[Tensor, Tensor | None], Tensor]
"""(outputs (n,), packed side codes) -> f''(x) (n,), in float64 for float64 outputs, else in float32."""

_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


@dataclass(frozen=True, eq=False)
class Layer:
    """What the gradient of an activation with its arguments is decoded from, and how.

    key: a text from which any process makes the same layer; forward: y of x, out of place; scheme, second: for a dtype
    on a device, and of that dtype: None where f'' is 0 everywhere; `second` raises TwiceError where there is none;
    promoted: the kinds of device on which autocast has the forward turn 16-bit inputs into float32.
    """

    key: str
    forward: Forward
    scheme: SchemeOf
    second: Callable[[torch.dtype, torch.device], Second | None]
    promoted: tuple[str, ...] = ()

    @cached_property
    def plain(self) -> _Plains:
        """What serves plain tensors of a dtype on the CPU; None where nothing does."""
        return _Plains(self.scheme)


class _Plains(dict[torch.dtype, Plain | None]):
    """The `plain` of schemes, looked up once a dtype."""

    def __init__(self, scheme: SchemeOf) -> None:
        self._scheme = scheme

    def __missing__(self, dtype: torch.dtype) -> Plain | None:
        found = self[dtype] = getattr(self._scheme(dtype, _CPU), "plain", None)
        return found


_CPU = torch.device("cpu")


def decode(
    dy: Tensor, kept: Tensor | None, packed: Tensor | None, scheme_of: SchemeOf, order: list[int] | None
) -> Tensor:
    """dx of dy, from the output (None where it is not kept) and the side codes in an order of axes, or in memory's."""
    if _batched_gradient(dy):
        # Under is_grads_batched; linear in dy, whose batch is out of reach of the kernels.
        ones = torch.ones(dy.shape, dtype=dy.dtype, device=dy.device)
        return dy * decode(ones, kept, packed, scheme_of, order)
    like = dy if kept is None else kept
    if (like.is_meta or type(like) is not Tensor) and without_numbers(like) and without_numbers(dy):
        order = memory_order(like) if order is None else order
        return shaped(dy.new_empty(dy.numel()), dy.shape, order)
    scheme = scheme_of(like.dtype, like.device)
    dy, packed = came_back(dy, like, packed, scheme)
    order = memory_order(like) if order is None else order
    decoded = scheme.backward(ordered(dy, order), flat(like, order) if scheme.keeps_output else None, packed)
    return decoded if dy.dim() == 1 else shaped(decoded, dy.shape, order)


def fit(dy: Tensor, y: Tensor | None, packed: Tensor | None, plain: Plain) -> bool:
    """Whether kernels can read a gradient, an output and side codes where they lie in memory, and all is theirs."""
    return (
        type(dy) in PLAIN
        and type(y) is Tensor
        and type(packed) is Tensor
        and dy.is_cpu
        and y.is_cpu
        and packed.is_cpu
        and dy.dtype is plain.dtype
        and y.dtype is plain.dtype
        and packed.dtype is uint8
        and dy.shape == y.shape
        and y.is_contiguous()
        and packed.is_contiguous()
        and packed.numel() == plain.bits * (-(-y.numel() // BLOCK) * LANES)
        and not (dy.is_neg() or y.is_neg() or dy._is_zerotensor() or _batched_gradient(dy))
    )


def came_back(dy: Tensor, like: Tensor, packed: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """A gradient and side codes that can be read where they lie; like: the output, or the gradient where none is kept.

    InputError where what was kept is not what comes back, as hooks may have it.
    """
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
    return with_memory(dy), packed if packed is None else packed.contiguous()


def with_memory(x: Tensor) -> Tensor:
    """x, or zeros where it is one of torch's zero tensors, which have no memory."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x


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


def without_numbers(x: Tensor) -> bool:
    """Tensors that stand for their shape alone: on the meta device, and torch's fake ones."""
    return x.is_meta or (type(x) is not Tensor and isinstance(x, FakeTensor))
