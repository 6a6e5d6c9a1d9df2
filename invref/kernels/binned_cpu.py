"""The binned decoder for float32 on the CPU: one pass, no temporaries, same bits as `binned`.

It takes what `binned_kernels` writes, as `cpu` does. Must not know autograd or formulas.
"""

from __future__ import annotations

from array import array
from functools import cache

import torch
from torch import Tensor

from invref.kernels import binned_kernels
from invref.kernels.binned import Tables
from invref.kernels.machine import Code, made
from invref.kernels.room import nowhere, room, with_numbers
from invref.kernels.runs import run
from invref.kernels.sidebits import size


@cache
def _pack(bits: int) -> Code:
    return made(binned_kernels.pack, bits)


@cache
def _backward(bits: int, slots: int) -> Code:
    return made(binned_kernels.backward, bits, slots)


def pack(edges: tuple[float, ...], bits: int, x: Tensor) -> Tensor:
    """Packed side codes of a float32 tensor in row-major order of its axes; any strides."""
    n = x.numel()
    packed = with_numbers(x.new_empty(bits * size(n), dtype=torch.uint8))
    if n:
        borders = array("f", edges)
        places = (x.data_ptr() or nowhere(x), packed.data_ptr(), borders.buffer_info()[0], len(edges))
        run(_pack(bits), x, n, (packed, borders), *places)
    return packed


def backward(tables: Tables, dy: Tensor, y: Tensor, packed: Tensor | None, bits: int) -> Tensor:
    """dy * f' of float32 tensors; dy: any strides, y: flat and contiguous, both in the order of `packed`."""
    dx = room(y)
    if n := y.numel():
        sides, bits = (0, 0) if packed is None else (packed.data_ptr() or nowhere(packed), bits)
        columns = (
            tables.start, tables.high, tables.low, tables.side, tables.octaves, tables.rows,
            tables.lowest_first, tables.lowest_count, tables.lowest_at, tables.lowest,
        )  # fmt: skip
        at = dy.data_ptr() or nowhere(dy), y.data_ptr() or nowhere(y)
        places = (*at, dx.data_ptr(), sides, *(column.data_ptr() for column in columns))
        run(_backward(bits, tables.slots), dy, n, (tables, y, dx, packed), *places)
    return dx
