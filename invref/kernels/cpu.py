"""The naive decoder for float32 on the CPU, compiled by Numba: one pass, no temporaries, same bits as `naive`.

Works on flat contiguous arrays in blocks of side bits; large arrays are cut into as many runs of blocks as torch has
threads. The kernels release the interpreter lock. Must not know autograd or formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from invref.decoders import Decoder
from invref.kernels.compiled import compiled
from invref.kernels.sidebits import BITS, BLOCK, LANES, size

SERIAL = 1 << 15
"""Arrays up to this length run in the calling thread: handing work out costs more than it saves."""


@compiled(error_model="numpy")
def _pack(x: Any, threshold: Any, packed: Any, first: int, stop: int) -> None:
    for block in range(first, stop):
        start = block * BLOCK
        row = packed[block * LANES : block * LANES + LANES]
        row[:] = 0
        if start + BLOCK <= x.size:
            for k in range(BITS):
                lane = x[start + k * LANES : start + k * LANES + LANES]
                for j in range(LANES):
                    row[j] |= np.uint8((lane[j] > threshold) & (lane[j] < np.inf)) << np.uint8(k)
        else:
            for i in range(x.size - start):
                row[i % LANES] |= np.uint8((x[start + i] > threshold) & (x[start + i] < np.inf)) << np.uint8(i // LANES)


@numba.njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _pick(c: Any, k: int, tail: Any, head: Any) -> Any:
    return c[k] if tail else (c[k + 24] if head else c[k + 12])


@numba.njit(nogil=True, error_model="numpy", inline="always")  # type: ignore[untyped-decorator]
def _derivative(y: Any, right: Any, s: Any, c: Any) -> Any:
    # Line by line the algorithm of naive.derivative, for one element; s: the scalars, c: the three segments in a row.
    zero, one = np.float32(0.0), np.float32(1.0)
    high, low, cut, base, slope, tail_y, head_t, end_t = s
    d = (y - high) - low
    d = base + slope * (d if d > zero else zero) if d < cut else d
    tail = (not right) & (y > tail_y)
    root = np.sqrt(-y if tail else d)
    u = root if tail | right else -root
    u = end_t if u > end_t else u
    head = u > head_t
    m = y if tail else (end_t - u if head else u)
    z = u - _pick(c, 0, tail, head)
    p = _pick(c, 7, tail, head)
    p = p * z + _pick(c, 6, tail, head)
    p = p * z + _pick(c, 5, tail, head)
    p = p * z + _pick(c, 4, tail, head)
    p = p * z + _pick(c, 3, tail, head)
    p = p * z + _pick(c, 2, tail, head)
    p = p * z + _pick(c, 1, tail, head)
    q = _pick(c, 11, tail, head)
    q = q * z + _pick(c, 10, tail, head)
    q = q * z + _pick(c, 9, tail, head)
    q = q * z + _pick(c, 8, tail, head)
    q = q * z + one
    return (one if head else zero) + m * (p / q)


@compiled(error_model="numpy")
def _backward(dy: Any, y: Any, packed: Any, scalars: Any, coefficients: Any, dx: Any, first: int, stop: int) -> None:
    bits = np.empty(LANES, np.uint8)
    for block in range(first, stop):
        row = packed[block * LANES : block * LANES + LANES]
        for k in range(BITS):
            start = block * BLOCK + k * LANES
            mask = np.uint8(1 << k)
            # A loop of its own: shifts inside the next one would be done on 64-bit integers, at twice the time.
            for j in range(LANES):
                bits[j] = row[j] & mask
            if start + LANES <= y.size:
                y_, dy_, dx_ = y[start : start + LANES], dy[start : start + LANES], dx[start : start + LANES]
                for j in range(LANES):
                    dx_[j] = dy_[j] * _derivative(y_[j], bits[j] != 0, scalars, coefficients)
            else:
                for j in range(y.size - start):
                    dx[start + j] = dy[start + j] * _derivative(y[start + j], bits[j] != 0, scalars, coefficients)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="invref")


def _in_runs(kernel: Callable[[int, int], None], n: int) -> None:
    blocks = -(-n // BLOCK)
    threads = min(torch.get_num_threads(), blocks)
    if n <= SERIAL or threads == 1:
        kernel(0, blocks)
        return
    cuts = [blocks * i // threads for i in range(threads + 1)]
    futures = [_pool(threads).submit(kernel, a, b) for a, b in pairwise(cuts[1:])]
    kernel(cuts[0], cuts[1])
    wait(futures)
    for future in futures:
        future.result()


@cache
def _constants(decoder: Decoder, fmt: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    clamp, (high, low) = decoder.clamps[fmt], decoder.turning_value(np.float32)
    scalars = (high, low, clamp.cut, clamp.base, clamp.slope, decoder.tail_y, decoder.head_t, decoder.end_t)
    segments = (decoder.tail, decoder.turn, decoder.head)
    coefficients = (v for s in segments for v in (s.centre, *s.numerator, *s.denominator))
    return tuple(map(np.float32, scalars)), tuple(map(np.float32, coefficients))


def pack(decoder: Decoder, x: Tensor) -> Tensor:
    """Packed side bits of a flat contiguous float32 tensor."""
    packed = torch.empty(size(x.numel()), dtype=torch.uint8)
    x_, packed_ = x.numpy(), packed.numpy()
    threshold = decoder.threshold(np.float32)
    _in_runs(lambda a, b: _pack(x_, threshold, packed_, a, b), x.numel())
    return packed


def backward(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
    """dy * g(y, s) of flat contiguous float32 tensors."""
    dx = torch.empty_like(y)
    scalars, coefficients = _constants(decoder, "float32")
    dy_, y_, packed_, dx_ = dy.numpy(), y.numpy(), packed.numpy(), dx.numpy()
    _in_runs(lambda a, b: _backward(dy_, y_, packed_, scalars, coefficients, dx_, a, b), y.numel())
    return dx
