"""Which kernel serves a tensor, the only place that knows there are several.

On the CPU the compiled kernels of `cpu`, where llvmlite is there; on a GPU those of `gpu`, where Triton is; Newton's
method for float64; elsewhere the naive algorithm and plain table look-ups, on the CPU in cache-sized chunks. Guarantees
that side codes are read in the layout in which the same kind of tensor packed them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, empty_like, float16, float32, float64

from invref.decoders import Decoder
from invref.errors import needing
from invref.formats import BY_DTYPE
from invref.kernels import codes, gpu, naive, sidebits

CHUNK = 128 * sidebits.BLOCK
"""Elements at a time on the CPU: temporaries then stay in the cache, and small beside the tensor."""


@cache
def compiled() -> Any:
    """The module of compiled CPU kernels; None, and once a warning, where llvmlite is missing."""
    try:
        from invref.kernels import cpu
    except ImportError:
        warnings.warn(
            "llvmlite is not importable: invref decodes with plain torch operations, which is several times slower "
            "(pip install llvmlite)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return cpu


Decode = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(dy, y, packed) -> dx."""
PLAIN = (Tensor, torch.nn.Parameter)


def fast(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled CPU kernels serve x: a plain tensor with numbers, of a dtype they can convert.

    others: what else they read beside it, which must be as plain.
    """
    if not x.is_cpu or type(x) not in PLAIN:
        return False
    return all(other is None or type(other) in PLAIN for other in others) and serves(x.dtype)


def serves(dtype: torch.dtype) -> bool:
    """Whether the compiled CPU kernels serve plain tensors of a dtype."""
    cpu = compiled()
    return bool(cpu) and (dtype is not float16 or bool(cpu.converts_halves()))


def packer(decoder: Decoder, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`pack` of tensors of a dtype that the compiled kernels serve."""
    kind = np.float64 if dtype == float64 else np.float32
    made: Callable[[Tensor], Tensor] = compiled().packer(float(decoder.threshold(kind)), dtype)
    return made


def on_cells(decoder: Decoder, lowest: codes.Lowest | None) -> Decode:
    """`backward` of float32 tensors that the compiled kernels serve."""
    made: Decode = compiled().on_cells(decoder, lowest)
    return made


def on_codes(table: Tensor, dtype: torch.dtype, bits: int) -> Decode:
    """`by_table` of tensors of a 16-bit dtype that the compiled kernels serve."""
    made: Decode = compiled().on_codes(table, dtype, bits)
    return made


def size(n: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many bytes the side bits of n elements of a decoder take."""
    return gpu.size(n, dtype) if gpu.serves(dtype, device) else sidebits.size(n)


def pack(decoder: Decoder, x: Tensor) -> Tensor:
    """Packed side bits of the inputs x in row-major order, any shape and strides."""
    if fast(x):
        return packer(decoder, x.dtype)(x)
    x = x.reshape(-1).contiguous()
    if gpu.available(x):
        return gpu.pack(decoder, x)
    if x.dtype == float64:
        with needing("a layer in float64"):
            from invref.kernels.newton import side_of
    else:
        from invref.kernels.naive import side_of
    parts = [sidebits.pack(side_of(decoder, part)) for part in _chunks(x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: Tensor, y: Tensor) -> Tensor:
    """The side bits that `pack` gave for the inputs of the outputs y (n,): uint8 (n,)."""
    if gpu.available(y):
        return gpu.unpack(packed, y.numel(), y.dtype)
    return sidebits.unpack(packed, y.numel())


def backward(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor, lowest: codes.Lowest | None = None) -> Tensor:
    """dy * g(y, s) for dy in row-major order, y (n,) of one dtype and the bytes that `pack` gave.

    lowest: what float32 outputs next to the turning value decode to instead.
    """
    if y.dtype == float32 and fast(y, dy, packed):
        return on_cells(decoder, lowest)(dy, y, packed)
    dy = dy.reshape(-1).contiguous()
    if gpu.available(y):
        return gpu.backward(decoder, dy, y, packed, lowest)
    dx = empty_like(y)
    bits = packed.split(CHUNK // sidebits.BITS) if y.device.type == "cpu" else (packed,)
    for part, dy_part, y_part, bits_part in zip(_chunks(dx), _chunks(dy), _chunks(y), bits, strict=True):
        part.copy_(_decode(decoder, dy_part, y_part, bits_part))
    if lowest is not None:
        inside, values = lowest.find(y, unpack(packed, y))
        dx = torch.where(inside, dy * values, dx)
    return dx


def by_table(table: Tensor, dy: Tensor, y: Tensor, packed: Tensor | None, bits: int) -> Tensor:
    """dy times what a table (sides, 65536) holds for each output y (n,); dy in row-major order, of the same dtype."""
    if fast(y, dy, packed):
        return on_codes(table, y.dtype, bits)(dy, y, packed)
    dy = dy.reshape(-1).contiguous()
    if not bits and gpu.available(y):
        return gpu.by_table(table, dy, y, None)
    dx = empty_like(y)
    planes = None if packed is None else packed.view(bits, -1)
    start = 0
    for part, dy_part, y_part in zip(_chunks(dx), _chunks(dy), _chunks(y), strict=True):
        n, first = part.numel(), start // sidebits.BITS
        sides = None
        if planes is not None:
            sides = sidebits.unpack(planes[:, first : first + sidebits.size(n)].reshape(-1), n, bits)
        part.copy_(codes.decode(table, dy_part, y_part, sides))
        start += n
    return dx


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CHUNK) if x.device.type == "cpu" and x.numel() > CHUNK else (x,)


def _decode(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
    side = sidebits.unpack(packed, y.numel()).bool()
    if y.dtype == float64:
        with needing("a layer in float64"):
            from invref.kernels import newton
        return newton.backward(decoder, dy, y, side)
    return naive.backward(decoder, dy, y, side, BY_DTYPE[y.dtype].name)
