"""Side codes of one to four bits an element, packed.

Elements are numbered in the order of the flat tensor. A block of 512 elements takes 64 bytes a bit; bit k of byte j
holds element 64 k + j of the block, so that 64 neighbours sit in 64 neighbouring bytes and vector code needs no
shuffles. Codes of several bits take one such plane for each bit, the lowest first, one plane after another. A plane of
n elements takes 64 * ceil(n / 512) bytes: less than 64 more than n / 8. Must not know what the codes mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64
BITS = 8
BLOCK = LANES * BITS


def size(n: int) -> int:
    """How many bytes one plane of n elements takes."""
    return -(-n // BLOCK) * LANES


def pack(codes: Tensor, bits: int = 1) -> Tensor:
    """uint8 tensor of shape (bits * size(n),) of a bool or uint8 tensor of shape (n,) with values below 2**bits."""
    if bits == 1:
        return _plane(codes)
    return torch.cat([_plane(codes >> bit & 1) for bit in range(bits)])


def unpack(packed: Tensor, n: int, bits: int = 1) -> Tensor:
    """The codes that `pack` was given, as a uint8 tensor of shape (n,)."""
    planes = packed.reshape(bits, -1)
    codes = _unpacked(planes[0], n)
    for bit in range(1, bits):
        codes = codes | _unpacked(planes[bit], n) << bit
    return codes


def _plane(side: Tensor) -> Tensor:
    n = side.numel()
    planes = torch.nn.functional.pad(side, (0, size(n) * BITS - n)).view(-1, BITS, LANES)
    return (planes.to(torch.uint8) << _shifts(side)).sum(dim=1, dtype=torch.uint8).view(-1)


def _unpacked(plane: Tensor, n: int) -> Tensor:
    bits = (plane.view(-1, 1, LANES) >> _shifts(plane)) & 1
    return bits.reshape(-1)[:n]


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=like.device).view(BITS, 1)
