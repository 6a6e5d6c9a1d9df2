"""The fast kernels of the CPU: packing by a threshold, decoding on cells (float32) and by table (16 bit).

Compiled by Numba around steps of 16 lanes (`vectors`), with no temporaries but blocks of 512 elements, in as many runs
as torch has threads (`runs`); they release the interpreter lock. Elements are those of the flat tensor in the given
order of axes, whatever the strides: blocks of strided tensors, and the last one, pass through a buffer. The result of
an element depends on nothing but its own inputs. Must not know autograd or formulas.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, config, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from invref.decoders import CELLS_LEFT, CELLS_RIGHT, DEGREE, Decoder
from invref.kernels.codes import Lowest
from invref.kernels.compiled import compiled
from invref.kernels.runs import SERIAL_LIGHT, in_runs
from invref.kernels.sidebits import BITS, BLOCK, LANES, size
from invref.kernels.vectors import BYTE, DOUBLE, FLOAT, HALF, INT, WORD, Row, Vector, size_of, spread, tables
from invref.kernels.vectors import LANES as STEP

QUIET, HIGHEST = 0x7FC0, 0x7F800000
"""bfloat16's NaN, and float32's infinity."""

_KINDS = {
    torch.float32: np.zeros(0, np.float32), torch.float64: np.zeros(0, np.float64),
    torch.bfloat16: np.zeros(0, np.uint16), torch.float16: np.zeros(0, np.int16),
}  # fmt: skip
"""What tells kernels a tensor's dtype: bfloat16 are unsigned words to them, float16 signed ones, for a difference."""


def disabled() -> bool:
    """Whether Numba is told not to compile, as by NUMBA_DISABLE_JIT."""
    return bool(config.DISABLE_JIT)


@cache
def converts_halves() -> bool:
    """Whether float16 is converted by the processor: x86 without F16C would need a library that is not there."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return not triple.startswith(("x86", "i686")) or "+f16c" in features.split(",")


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing: Any, address: Any) -> Any:
    """A tensor's address as a pointer: handing it over so costs a tenth of making an array of it first."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


# Steps of 16 elements


def _loaded(row: Row, index: Any) -> Vector:
    """16 numbers; those of the 16-bit formats as float32."""
    value = row.load(index)
    if row.element is HALF:
        return value.widened(FLOAT)
    return (value.widened(INT) << 16).reinterpreted(FLOAT) if row.element is WORD else value


def _stored(row: Row, index: Any, value: Vector) -> None:
    """Rounds to nearest even and stores; any NaN becomes the quiet one in bfloat16."""
    if row.element is HALF:
        value = value.narrowed(HALF)
    elif row.element is WORD:
        bits = value.reinterpreted(INT)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = (bits & 0x7FFFFFFF).above(HIGHEST).choose(QUIET, rounded).narrowed(WORD)
    row.store(index, value)


_ELEMENTS = {types.float32: FLOAT, types.float64: DOUBLE, types.uint16: WORD, types.int16: HALF, types.uint8: BYTE}


def _rows(context: Any, builder: Any, signature: Any, values: Any, count: int) -> list[Row]:
    kinds = signature.args[:count]
    return [Row(context, builder, k, v, _ELEMENTS[k.dtype]) for k, v in zip(kinds, values[:count], strict=True)]


@intrinsic  # type: ignore[untyped-decorator]
def _pack_step(typing: Any, x: Any, packed: Any, start: Any, byte: Any, threshold: Any) -> Any:
    """16 bytes of a block: bit k of byte j says whether element 64 k + j lies above the threshold, below infinity."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        inputs, out = _rows(context, builder, signature, values, 2)
        limit = spread(builder, values[4] if inputs.element is DOUBLE else builder.fptrunc(values[4], FLOAT))
        total: Vector | None = None
        for k in range(BITS):
            v = _loaded(inputs, builder.add(values[2], values[2].type(LANES * k)))
            inside = (v > limit) & (v < float("inf"))
            bit = out.load(values[3])
            bit = inside.choose(bit.filled(1 << k), bit.filled(0))
            total = bit if total is None else total | bit
        assert total is not None
        out.store(values[3], total)
        return context.get_dummy_value()

    return types.void(x, packed, start, byte, threshold), generate


@intrinsic  # type: ignore[untyped-decorator]
def _cells_step(typing: Any, dy: Any, y: Any, packed: Any, cells: Any, dx: Any, start: Any, byte: Any, bit: Any) -> Any:
    """dx = dy * g(y, s), with g on the cells of a decoder; the algorithm of `decoders.Cells`, step by step."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        dys, ys, bits, table, out = _rows(context, builder, signature, values, 5)
        at, byte_at, mask = values[5], values[6], spread(builder, builder.trunc(values[7], BYTE))
        numbers = (table.spread(SIZE + i) for i in range(SCALARS))
        high, low, cut, base, slope, split, end, right_scale, left_scale, tail_scale = numbers
        v = ys.load(at)
        right = (bits.load(byte_at) & mask).above(0)
        d = (v - high) - low
        d = (d < cut).choose(base + slope * (d > 0.0).choose(d, 0.0), d)
        tail = ~right & (v > split)
        u = tail.choose(-v, d).sqrt()
        u = (u > end).choose(end, u)
        scale = right.choose(right_scale, tail.choose(tail_scale, left_scale))
        from_side = tail.choose(u.filled(_FROM_TAIL), _FROM_LEFT)
        place = u.times_plus(scale, right.choose(0.0, from_side))
        cell = place.truncated()
        z = place - cell.as_float()
        *coefficients, g = table.look_up(DEGREE + 1, cell)
        for coefficient in reversed(coefficients):
            g = g.times_plus(z, coefficient)
        out.store(at, dys.load(at) * (g * tail.choose(v, 1.0)))
        return context.get_dummy_value()

    return types.void(dy, y, packed, cells, dx, start, byte, bit), generate


_FROM_LEFT, _FROM_TAIL = CELLS_RIGHT + 1, CELLS_RIGHT + 1 + CELLS_LEFT
SIZE = size_of(DEGREE + 1)
"""Numbers in the table of coefficients."""
SCALARS = 10
"""Numbers that follow the table of coefficients: y* in two parts, the clamp, the split, `end_t` and the scales."""


@intrinsic  # type: ignore[untyped-decorator]
def _table_step(typing: Any, dy: Any, y: Any, table: Any, dx: Any, codes: Any, start: Any, code: Any) -> Any:
    """dx = dy times the table's entry for the pattern of y and its side code."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        dys, _, entries, out, sides = _rows(context, builder, signature, values, 5)
        patterns = Row(context, builder, signature.args[1], values[1], WORD)
        index = patterns.load(values[5]).widened(INT) | (sides.load(values[6]).widened(INT) << 16)
        _stored(out, values[5], _loaded(dys, values[5]) * entries.gather(index))
        return context.get_dummy_value()

    return types.void(dy, y, table, dx, codes, start, code), generate


# Loops over blocks


@compiled(error_model="numpy")
def _take(x: Any, shape: Any, strides: Any, start: int, out: Any) -> None:
    """out[i] = element start + i of a strided array, of which x is the storage; out may be shorter."""
    axes = shape.size
    place = np.empty(axes, np.int64)
    rest, at = start, 0
    for axis in range(axes - 1, -1, -1):
        place[axis] = rest % shape[axis]
        rest //= shape[axis]
        at += place[axis] * strides[axis]
    done = 0
    while done < out.size:
        count = min(out.size - done, shape[axes - 1] - place[axes - 1])
        for i in range(count):
            out[done + i] = x[at + i * strides[axes - 1]]
        done += count
        place[axes - 1] += count
        at += count * strides[axes - 1]
        for axis in range(axes - 1, 0, -1):
            if place[axis] == shape[axis]:
                at += strides[axis - 1] - place[axis] * strides[axis]
                place[axis] = 0
                place[axis - 1] += 1


@compiled(error_model="numpy")
def _copy(x: Any, start: int, count: int, out: Any, at: int) -> None:
    """out[at + i] = x[start + i]. To assign slices takes Numba seconds to compile, for the words of its error."""
    for i in range(count):
        out[at + i] = x[start + i]


@compiled(error_model="numpy")
def _gather(x: Any, shape: Any, strides: Any, start: int, count: int, out: Any) -> None:
    """out[i] = element start + i of a flat array, with no shape and no strides, or of a strided one."""
    if shape is None:
        _copy(x, start, count, out, 0)
    else:
        _take(x, shape, strides, start, out[:count])


@compiled(error_model="numpy")
def _pack(
    kind: Any, x_: int, shape: Any, strides: Any, n: int, threshold: float, packed_: int, first: int, stop: int
) -> None:
    x, packed = carray(_pointer(x_), n, kind.dtype), carray(_pointer(packed_), n, np.uint8)
    buffer = np.zeros(BLOCK, kind.dtype)
    for block in range(first, stop):
        start, count = block * BLOCK, min(BLOCK, n - block * BLOCK)
        if shape is None and count == BLOCK:
            for group in range(LANES // STEP):
                _pack_step(x, packed, start + group * STEP, block * LANES + group * STEP, threshold)
        else:
            _gather(x, shape, strides, start, count, buffer)
            for group in range(LANES // STEP):
                _pack_step(buffer, packed, group * STEP, block * LANES + group * STEP, threshold)
            if count < BLOCK:
                # What lay in the rest of the buffer must not show.
                for j in range(LANES):
                    full, part = count // LANES, count % LANES
                    packed[block * LANES + j] &= np.uint8((1 << (full + (1 if j < part else 0))) - 1)


@compiled(error_model="numpy")
def _cells(
    dy_at: int, shape: Any, strides: Any, y_at: int, packed_at: int, cells: Any, lowest: Any, first_ordinal: int,
    dx_at: int, n: int, first: int, stop: int,
) -> None:  # fmt: skip
    dy, y = carray(_pointer(dy_at), n, np.float32), carray(_pointer(y_at), n, np.float32)
    dx, packed = carray(_pointer(dx_at), n, np.float32), carray(_pointer(packed_at), n, np.uint8)
    dy_, y_, dx_ = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    for block in range(first, stop):
        start, count = block * BLOCK, min(BLOCK, y.size - block * BLOCK)
        if shape is None and count == BLOCK:
            for group in range(BLOCK // STEP):
                byte, bit = block * LANES + group % (LANES // STEP) * STEP, group // (LANES // STEP)
                _cells_step(dy, y, packed, cells, dx, start + group * STEP, byte, 1 << bit)
            if lowest is not None:
                _patch(dy[start : start + count], y, start, packed, block, lowest, first_ordinal, dx)
        else:
            _gather(dy, shape, strides, start, count, dy_)
            _copy(y, start, count, y_, 0)
            for group in range(BLOCK // STEP):
                byte, bit = block * LANES + group % (LANES // STEP) * STEP, group // (LANES // STEP)
                _cells_step(dy_, y_, packed, cells, dx_, group * STEP, byte, 1 << bit)
            _copy(dx_, 0, count, dx, start)
            if lowest is not None:
                _patch(dy_[:count], y, start, packed, block, lowest, first_ordinal, dx)


@compiled(error_model="numpy")
def _patch(dy: Any, y: Any, start: int, packed: Any, block: int, lowest: Any, first_ordinal: int, dx: Any) -> None:
    """Outputs next to the turning value decode to lowest[side, ordinal - first_ordinal] instead."""
    width = lowest.shape[1]
    patterns = y[start : start + dy.size].view(np.int32)
    near: Any = 0
    for i in range(dy.size):
        ordinal = patterns[i] ^ ((patterns[i] >> 31) & 0x7FFFFFFF)
        near += np.uint32(ordinal - first_ordinal) < np.uint32(width)
    if near == 0:
        return
    for i in range(dy.size):
        ordinal = patterns[i] ^ ((patterns[i] >> 31) & 0x7FFFFFFF)
        index = np.int64(ordinal) - np.int64(first_ordinal)
        if 0 <= index < width:
            side = (packed[block * LANES + i % LANES] >> (i // LANES)) & 1
            dx[start + i] = dy[i] * lowest[side, index]


@compiled(error_model="numpy")
def _by_table(
    kind: Any, dy_at: int, shape: Any, strides: Any, y_at: int, packed_at: int, bits: int, table: Any, dx_at: int,
    n: int, first: int, stop: int,
) -> None:  # fmt: skip
    dy, y = carray(_pointer(dy_at), n, kind.dtype), carray(_pointer(y_at), n, kind.dtype)
    dx, planes = (
        carray(_pointer(dx_at), n, kind.dtype),
        carray(_pointer(packed_at), (bits, -(-n // BLOCK) * LANES), np.uint8),
    )
    dy_, y_, dx_ = np.zeros(BLOCK, kind.dtype), np.zeros(BLOCK, kind.dtype), np.zeros(BLOCK, kind.dtype)
    codes = np.zeros(BLOCK, np.uint8)
    for block in range(first, stop):
        for bit in range(bits):
            plane = planes[bit, block * LANES : block * LANES + LANES]
            for k in range(BITS):
                lane = codes[k * LANES : k * LANES + LANES]
                for j in range(LANES):
                    side = ((plane[j] >> np.uint8(k)) & np.uint8(1)) << np.uint8(bit)
                    lane[j] = side | lane[j] if bit else side
        start, count = block * BLOCK, min(BLOCK, y.size - block * BLOCK)
        if shape is None and count == BLOCK:
            for group in range(BLOCK // STEP):
                _table_step(dy, y, table, dx, codes, start + group * STEP, group * STEP)
        else:
            _gather(dy, shape, strides, start, count, dy_)
            _copy(y, start, count, y_, 0)
            for group in range(BLOCK // STEP):
                _table_step(dy_, y_, table, dx_, codes, group * STEP, group * STEP)
            _copy(dx_, 0, count, dx, start)


# What the other rooms call


def _strided(x: Tensor) -> tuple[int, Any, Any]:
    """A tensor's address, its shape and its strides; a contiguous one is flat, with neither."""
    if x.is_contiguous():
        return x.data_ptr(), None, None
    return x.data_ptr(), np.array(x.shape, np.int64), np.array(x.stride(), np.int64)


def pack(threshold: float, x: Tensor) -> Tensor:
    """Packed side bits, whether threshold < x < inf, of a tensor in row-major order of its axes; any strides.

    threshold: a float32, of float64 tensors any float64.
    """
    n = x.numel()
    packed = torch.empty(size(n), dtype=torch.uint8)
    if n:
        fixed = (_KINDS[x.dtype], *_strided(x), n, threshold, packed.data_ptr())
        in_runs(_pack, fixed, n, (x, packed), SERIAL_LIGHT)
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
        values, first = (None, 0) if lowest is None else (lowest.values.numpy(), lowest.first)
        inputs = (*_strided(dy), y.data_ptr(), packed.data_ptr(), _constants(decoder), values, first)
        in_runs(_cells, (*inputs, dx.data_ptr(), n), n, (dy, y, packed, dx))
    return dx


def by_table(table: Tensor, dy: Tensor, y: Tensor, packed: Tensor | None, bits: int) -> Tensor:
    """dy times the derivative that a table (sides, 65536) of float32 holds for each code; dy, y of one 16-bit dtype."""
    dx = torch.empty_like(y)
    if n := y.numel():
        planes, bits = (0, 0) if packed is None else (packed.data_ptr(), bits)
        entries = table.view(-1).numpy()
        inputs = (_KINDS[y.dtype], *_strided(dy), y.data_ptr(), planes, bits, entries, dx.data_ptr(), n)
        held = (dy, y, dx) if packed is None else (dy, y, dx, packed)
        in_runs(_by_table, inputs, n, held, SERIAL_LIGHT)
    return dx
