"""Side bits: one bit per element, packed eight to a byte.

Elements are numbered in the order of the flat tensor. A block of 512 elements takes 64 bytes; bit k of byte j holds
element 64 k + j of the block, so that 64 neighbours sit in 64 neighbouring bytes and vector code needs no shuffles.
n elements take 64 * ceil(n / 512) bytes: less than 64 more than n / 8. Must not know what the bits mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64
BITS = 8
BLOCK = LANES * BITS


def size(n: int) -> int:
    """How many bytes n bits take."""
    return -(-n // BLOCK) * LANES


def pack(side: Tensor) -> Tensor:
    """uint8 tensor of shape (size(n),) of a bool tensor of shape (n,)."""
    n = side.numel()
    planes = torch.nn.functional.pad(side, (0, size(n) * BITS - n)).view(-1, BITS, LANES)
    return (planes.to(torch.uint8) << _shifts(side)).sum(dim=1, dtype=torch.uint8).view(-1)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The bool tensor of shape (n,) that `pack` was given."""
    bits = (packed.view(-1, 1, LANES) >> _shifts(packed)) & 1
    return bits.reshape(-1)[:n].bool()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=like.device).view(BITS, 1)
