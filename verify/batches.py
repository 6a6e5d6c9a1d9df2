"""Run a layer forward and backward, through the vector body or through the scalar tail of its kernels.

Guarantees which of the two paths computed each element. Must not know what the results are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from verify.targets import Layer

VECTOR = 64
"""A multiple of the number of elements that the framework's widest vector instruction takes, in any format."""

SLICE = 7
"""Shorter than any vector, and odd, so that slices start at every alignment."""

SHORT = 1000
"""A slice on a GPU, whose kernels treat what is left of a block, of 1,024 elements in this library, in another way."""


def slice_on(device: str) -> int:
    """How long slices are on a kind of device."""
    return SLICE if device == "cpu" else SHORT


@contextmanager
def one_thread() -> Iterator[int]:
    """Torch on one thread, so that its own partition cannot add scalar tails; yields the number it had before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def together(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and the gradient of sum(y), x of shape (n,) as one tensor; `VECTOR` should divide n."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), dx


def in_slices(layer: Layer, x: Tensor, length: int = SLICE) -> tuple[Tensor, Tensor]:
    """As `together`, but `length` neighbours at a time, so that every element takes the scalar tail."""
    parts = [together(layer, part) for part in x.split(length)]
    return torch.cat([y for y, _ in parts]), torch.cat([dx for _, dx in parts])
