"""Whether a fused forward gives the framework's bits on this device: found out there, before it is used.

Every input of the format goes through both, all 2^16 or 2^32 bit patterns, and every output must have the same bits
(a NaN counts as any other). Must not know kernels or activations: it is given functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from invref.formats import BY_DTYPE

CHUNK = 1 << 22
"""Inputs at a time: 16 MiB of float32, and 2^10 chunks of them."""

Own = Callable[[Tensor], Tensor]
Fused = Callable[[Tensor, bool], Tensor]
"""(inputs (n,), whether the compiler may fuse products with sums) -> outputs (n,)."""

FOUND: dict[tuple[str, torch.dtype, torch.device], bool | None] = {}
"""By activation, dtype and device: the setting that gives the framework's bits; None where none does."""


def choice(name: str, dtype: torch.dtype, device: torch.device, own: Own, fused: Fused) -> bool | None:
    """The setting for `fused` with which it equals `own` on every input of the dtype, or None.

    Looked up in FOUND, and found out at the first call. That call waits for the device, which a graph that is being
    captured forbids: in a capture, what is not known yet is None, for that capture only.
    """
    key = (name, dtype, device)
    if key not in FOUND:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        FOUND[key] = next((s for s in (False, True) if agree(own, fused, s, inputs(dtype, device))), None)
    return FOUND[key]


@torch.no_grad()
def agree(own: Own, fused: Fused, setting: bool, parts: Iterator[Tensor]) -> bool:
    """Whether the two give the same bits, or both NaN, on every part (n,) of the inputs."""
    return all(bool(_same(own(x), fused(x, setting)).all()) for x in parts)


def inputs(dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Every bit pattern of the dtype, in parts (n,)."""
    fmt = BY_DTYPE[dtype]
    low, high = -(1 << fmt.bits - 1), 1 << fmt.bits - 1
    for first in range(low, high, CHUNK):
        words = torch.arange(first, min(first + CHUNK, high), dtype=torch.int64, device=device)
        yield words.to(fmt.integer).view(dtype)


def _same(a: Tensor, b: Tensor) -> Tensor:
    integer = BY_DTYPE[a.dtype].integer
    return (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
