"""In which order a tensor's elements lie in memory, and tensors as flat ones in that order.

Orders are lists of axes, from the slowest to the fastest. Must not know what elements mean.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

AXES = list(range(64))
"""The axes in their own order; torch has tensors of at most 64."""


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
    if order != AXES[: len(order)]:
        x = x.permute(order)
    return x.view(-1) if len(order) != 1 and x.is_contiguous() else x


def shaped(values: Tensor, shape: Sequence[int], order: list[int]) -> Tensor:
    """Flat values in the given order of axes as a tensor of that shape."""
    if order == AXES[: len(order)]:
        return values if len(order) == 1 else values.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return values.view([shape[axis] for axis in order]).permute(inverse)
