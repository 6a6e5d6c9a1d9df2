"""The fast kernels of the CPU: packing by a threshold, decoding on cells (float32) and by table (16 bit).

They take what `cpu_kernels` writes and `machine` compiles, with no temporaries but blocks of 512 elements, in as many
runs as torch has threads (`runs`). Elements are those of the flat tensor in the given order of axes, whatever the
strides. The result of an element depends on nothing but its own inputs. Must not know autograd or formulas.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invref.decoders import Decoder
from invref.formats import BY_DTYPE
from invref.kernels import cpu_kernels
from invref.kernels.blocks import laid_out
from invref.kernels.codes import Lowest
from invref.kernels.machine import Code, converts_halves, made
from invref.kernels.runs import run
from invref.kernels.sidebits import size
from invref.kernels.vectors import tables

__all__ = ["by_cells", "by_table", "converts_halves", "pack"]


@cache
def _pack(dtype: torch.dtype) -> Code:
    return made(cpu_kernels.pack, BY_DTYPE[dtype].name)


@cache
def _cells(near: bool) -> Code:
    return made(cpu_kernels.cells, near)


@cache
def _table(dtype: torch.dtype, bits: int) -> Code:
    return made(cpu_kernels.table, BY_DTYPE[dtype].name, bits)


@cache
def _bits(number: float) -> int:
    """A double's bits as an integer."""
    pattern: int = struct.unpack("q", struct.pack("d", number))[0]
    return pattern


def pack(threshold: float, x: Tensor) -> Tensor:
    """Packed side bits, whether threshold < x < inf, of a tensor in row-major order of its axes; any strides.

    threshold: a float32, of float64 tensors any float64.
    """
    n = x.numel()
    packed = torch.empty(size(n), dtype=torch.uint8)
    if n:
        layout, held = laid_out(x)
        run(_pack(x.dtype), (*layout, x.data_ptr(), packed.data_ptr(), _bits(threshold)), n, (x, packed, held))
    return packed


@cache
def _constants(decoder: Decoder) -> Any:
    clamp, (high, low), cells = decoder.clamps["float32"], decoder.turning_value(np.float32), decoder.cells
    scalars = (high, low, clamp.cut, clamp.base, clamp.slope, cells.split, decoder.end_t, *cells.scales)
    return np.concatenate([tables(np.array(cells.rows, dtype=np.float32).T), np.array(scalars, dtype=np.float32)])


def by_cells(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor, lowest: Lowest | None = None) -> Tensor:
    """dy * g(y, s) in float32; dy: any strides, y: flat and contiguous, both in the order of `packed`."""
    dx = torch.empty_like(y)
    if n := y.numel():
        layout, held = laid_out(dy)
        constants = _constants(decoder)
        near = (0, 0, 0) if lowest is None else (lowest.values.data_ptr(), lowest.values.shape[1], lowest.first)
        places = (dy.data_ptr(), y.data_ptr(), dx.data_ptr(), packed.data_ptr(), constants.ctypes.data)
        run(_cells(lowest is not None), (*layout, *places, *near), n, (dy, y, packed, dx, lowest, held))
    return dx


def by_table(table: Tensor, dy: Tensor, y: Tensor, packed: Tensor | None, bits: int) -> Tensor:
    """dy times the derivative that a table (sides, 65536) of float32 holds for each code; dy, y of one 16-bit dtype."""
    dx = torch.empty_like(y)
    if n := y.numel():
        layout, held = laid_out(dy)
        sides, bits = (0, 0) if packed is None else (packed.data_ptr(), bits)
        places = (dy.data_ptr(), y.data_ptr(), dx.data_ptr(), sides, table.data_ptr())
        run(_table(y.dtype, bits), (*layout, *places), n, (table, dy, y, dx, packed, held))
    return dx
