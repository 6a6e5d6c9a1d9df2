"""The fast kernels of the CPU: packing by a threshold, decoding on cells (float32) and by table (16 bit).

They take what `cpu_kernels` writes and `machine` compiles, with no temporaries but blocks of 512 elements, in as many
runs as torch has threads (`runs`). Elements are those of the flat tensor in the given order of axes, whatever the
strides. The result of an element depends on nothing but its own inputs. Must not know autograd or formulas.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, empty_like

from invref.decoders import Decoder
from invref.formats import BY_DTYPE
from invref.kernels import cpu_kernels
from invref.kernels.codes import Lowest
from invref.kernels.machine import Code, converts_halves, made
from invref.kernels.room import LARGE, nowhere, room, with_numbers
from invref.kernels.runs import run
from invref.kernels.sidebits import BLOCK, LANES
from invref.kernels.vectors import tables

__all__ = ["converts_halves", "on_cells", "on_codes", "packer"]


@cache
def _bits(number: float) -> int:
    """A double's bits as an integer."""
    pattern: int = struct.unpack("q", struct.pack("d", number))[0]
    return pattern


ROOMY = LARGE // 8
"""Up to so many elements no tensor is large."""
Pack = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(dy, y, packed) -> dx; dy: any strides, y: dense, both in the order of `packed`."""


@cache
def packer(threshold: float, dtype: torch.dtype) -> Pack:
    """Packs whether threshold < x < inf, of tensors of a dtype in row-major order of their axes; any strides.

    threshold: a float32, of float64 tensors any float64.
    """
    code, bits = made(cpu_kernels.pack, BY_DTYPE[dtype].name), _bits(threshold)

    def pack(x: Tensor) -> Tensor:
        # Short of calls of functions here and below: each takes longer than what it does.
        n = x.numel()
        packed = x.new_empty(-(-n // BLOCK) * LANES, dtype=torch.uint8)
        if type(packed) is not Tensor:
            with_numbers(packed)
        if n:
            run(code, x, n, (packed,), x.data_ptr() or nowhere(x), packed.data_ptr(), bits)
        return packed

    return pack


@cache
def _constants(decoder: Decoder) -> tuple[int, Any]:
    """Where the numbers of the kernel are, and what holds them."""
    clamp, (high, low), cells = decoder.clamps["float32"], decoder.turning_value(np.float32), decoder.cells
    scalars = (high, low, clamp.cut, clamp.base, clamp.slope, cells.split, decoder.end_t, *cells.scales)
    numbers = np.concatenate([tables(np.array(cells.rows, dtype=np.float32).T), np.array(scalars, dtype=np.float32)])
    return numbers.ctypes.data, numbers


def _limit(decoder: Decoder, lowest: Lowest | None) -> int:
    """The bits of the least float32 above all outputs that the clamp or `lowest` are about."""
    high, low = decoder.turning_value(np.float32)
    limit, cut = high, np.float32(decoder.clamps["float32"].cut)
    while (limit - high) - low < cut:
        limit = np.nextafter(limit, np.float32(0))
    bits = int(limit.view(np.int32))
    if lowest is None:
        return bits
    # Negative floats count down as their bits count up.
    return min(bits, (lowest.first + lowest.values.shape[1]) ^ cpu_kernels.MIRROR)


@cache
def on_cells(decoder: Decoder, lowest: Lowest | None = None) -> Decode:
    """Decodes float32: dy * g(y, s)."""
    address, numbers = _constants(decoder)
    near = (0, 0, 0) if lowest is None else (lowest.values.data_ptr(), lowest.values.shape[1], lowest.first)
    own = (address, _limit(decoder, lowest), *near)
    return _decoder(made(cpu_kernels.cells, lowest is not None), own, (numbers, lowest))


@cache
def _on_codes(dtype: torch.dtype, bits: int) -> Code:
    return made(cpu_kernels.table, BY_DTYPE[dtype].name, bits)


def on_codes(table: Tensor, dtype: torch.dtype, bits: int) -> Decode:
    """Decodes 16 bit: dy times the derivative that a table (sides, 65536) of float32 holds for each code."""
    return _decoder(_on_codes(dtype, bits), (table.data_ptr(),), table)


def _decoder(code: Code, own: tuple[int, ...], needed: object) -> Decode:
    """Calls a kernel whose last arguments are `own`; needed: what they are the addresses of."""

    def decode(dy: Tensor, y: Tensor, packed: Tensor | None) -> Tensor:
        n = y.numel()
        dx = empty_like(y) if n <= ROOMY else room(y)
        if type(dx) is not Tensor:
            with_numbers(dx)
        if n:
            sides = 0 if packed is None else packed.data_ptr() or nowhere(packed)
            held, at = (y, packed, dx, needed), dy.data_ptr() or nowhere(dy)
            run(code, dy, n, held, at, y.data_ptr() or nowhere(y), dx.data_ptr(), sides, *own)
        return dx

    return decode
