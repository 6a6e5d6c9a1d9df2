"""The binned decoder for float32 on the CPU, compiled by Numba: one pass, no temporaries, same bits as `binned`.

Works on flat contiguous arrays in blocks of side codes, as `cpu` does. Must not know autograd or formulas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from invref.bins import TERMS
from invref.kernels.binned import EXPONENTS, MANTISSA, MASK, ONE, SPLIT_BITS, Tables
from invref.kernels.compiled import compiled
from invref.kernels.runs import in_runs
from invref.kernels.sidebits import BITS, BLOCK, LANES, size

Columns = tuple[Any, ...]


@compiled(error_model="numpy")
def _pack(x: Any, edges: Any, packed: Any, first: int, stop: int) -> None:
    codes = np.empty(LANES, np.uint8)
    for block in range(first, stop):
        packed[:, block * LANES : block * LANES + LANES] = 0
        for k in range(BITS):
            start = block * BLOCK + k * LANES
            length = min(LANES, x.size - start)
            if length <= 0:
                break
            lane = x[start : start + length]
            codes[:] = 0
            for edge in edges:
                for j in range(length):
                    codes[j] += np.uint8(lane[j] > edge)
            for bit in range(packed.shape[0]):
                row = packed[bit, block * LANES : block * LANES + LANES]
                for j in range(length):
                    row[j] |= ((codes[j] >> np.uint8(bit)) & np.uint8(1)) << np.uint8(k)


@compiled(error_model="numpy")
def _backward(dy: Any, y: Any, packed: Any, slots: int, t: Columns, dx: Any, first: int, stop: int) -> None:
    # Line by line the algorithm of binned.derivative, for 64 elements at a time.
    begin, high, low, side, octaves, rows, lowest_first, lowest_count, lowest_at, lowest = t
    # Unsigned indices: signed ones would be tested for being negative, element by element.
    cells = np.empty(LANES, np.uint32)
    d = np.empty(LANES, np.float32)
    z = np.empty(LANES, np.float32)
    row_of = np.empty(LANES, np.uint32)
    d_bits, z_bits = d.view(np.uint32), z.view(np.uint32)
    for block in range(first, stop):
        for k in range(BITS):
            start = block * BLOCK + k * LANES
            length = min(LANES, y.size - start)
            if length <= 0:
                break
            y_, dy_, dx_ = y[start : start + length], dy[start : start + length], dx[start : start + length]
            y_bits = y_.view(np.int32)
            cells[:] = 0
            for bit in range(packed.shape[0]):
                plane = packed[bit, block * LANES : block * LANES + LANES]
                for j in range(length):
                    cells[j] += np.uint32((plane[j] >> np.uint8(k)) & np.uint8(1)) << np.uint32(bit)
            for j in range(length):
                home = cells[j] * np.uint32(slots)
                cell = home
                for slot in range(1, slots):
                    cell += np.uint32(y_[j] >= begin[home + np.uint32(slot)])
                cells[j] = cell
                distance = ((y_[j] - high[cell]) - low[cell]) * side[cell]
                d[j] = distance if distance > np.float32(0.0) else np.float32(0.0)
            for j in range(length):
                entry = octaves[cells[j] * np.uint32(EXPONENTS) + (d_bits[j] >> np.uint32(MANTISSA))]
                mantissa, splits = d_bits[j] & np.uint32(MASK), entry & np.uint32((1 << SPLIT_BITS) - 1)
                row_of[j] = (entry >> np.uint32(SPLIT_BITS)) + (mantissa >> (np.uint32(MANTISSA) - splits))
                z_bits[j] = ((mantissa << splits) & np.uint32(MASK)) | np.uint32(ONE)
            for j in range(length):
                # The TERMS = 6 coefficients are written out: a loop over them would not be vectorised.
                place = z[j] - np.float32(1.5)
                row = row_of[j] * np.uint32(TERMS)
                value = rows[row + np.uint32(5)]
                value = value * place + rows[row + np.uint32(4)]
                value = value * place + rows[row + np.uint32(3)]
                value = value * place + rows[row + np.uint32(2)]
                value = value * place + rows[row + np.uint32(1)]
                dx_[j] = value * place + rows[row]
            for j in range(length if lowest.size > 1 else 0):
                cell = cells[j]
                if lowest_count[cell]:
                    pattern = y_bits[j]
                    index = np.int64(pattern ^ 0x7FFFFFFF if pattern < 0 else pattern) - np.int64(lowest_first[cell])
                    if 0 <= index < lowest_count[cell]:
                        dx_[j] = lowest[lowest_at[cell] + index]
            for j in range(length):
                value = dx_[j] if y_[j] == y_[j] else y_[j]
                dx_[j] = dy_[j] * value


def pack(edges: tuple[float, ...], bits: int, x: Tensor) -> Tensor:
    """Packed side codes of a flat contiguous float32 tensor."""
    packed = torch.empty(bits * size(x.numel()), dtype=torch.uint8)
    x_, planes = x.numpy(), packed.numpy().reshape(bits, -1)
    borders = np.array(edges, dtype=np.float32)
    in_runs(_pack, (x_, borders, planes), x.numel())
    return packed


def columns(tables: Tables) -> Columns:
    """The tables as the kernel takes them."""
    return (
        tables.start.numpy(),
        tables.high.numpy(),
        tables.low.numpy(),
        tables.side.numpy(),
        tables.octaves.numpy().view(np.uint32),
        tables.rows.numpy().reshape(-1),
        tables.lowest_first.numpy(),
        tables.lowest_count.numpy(),
        tables.lowest_at.numpy(),
        tables.lowest.numpy(),
    )


def backward(tables: Tables, dy: Tensor, y: Tensor, packed: Tensor | None, bits: int) -> Tensor:
    """dy * f' of flat contiguous float32 tensors."""
    dx = torch.empty_like(y)
    planes = np.zeros((0, size(y.numel())), np.uint8) if packed is None else packed.numpy().reshape(bits, -1)
    dy_, y_, dx_, t = dy.numpy(), y.numpy(), dx.numpy(), columns(tables)
    in_runs(_backward, (dy_, y_, planes, tables.slots, t, dx_), y.numel())
    return dx
