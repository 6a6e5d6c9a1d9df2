"""Which kernel serves a tensor: Newton for float64, the compiled one for float32 on the CPU, the naive one elsewhere.

Takes and returns flat tensors; this is the only place that knows there are several kernels.
"""

from __future__ import annotations

from torch import Tensor, cat, empty_like, float32, float64

from invref.decoders import Decoder
from invref.formats import BY_DTYPE
from invref.kernels import naive, sidebits

CHUNK = 128 * sidebits.BLOCK
"""Elements at a time on the CPU: temporaries then stay in the cache, and small beside the tensor."""


def _compiled(x: Tensor) -> bool:
    return x.dtype == float32 and x.device.type == "cpu"


def pack(decoder: Decoder, x: Tensor) -> Tensor:
    """Packed side bits of the flat inputs x."""
    if _compiled(x):
        from invref.kernels import cpu

        return cpu.pack(decoder, x)
    if x.dtype == float64:
        from invref.kernels.newton import side_of
    else:
        from invref.kernels.naive import side_of
    parts = [sidebits.pack(side_of(decoder, part)) for part in _chunks(x)]
    return parts[0] if len(parts) == 1 else cat(parts)


def backward(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
    """dy * g(y, s) for flat tensors dy and y of one dtype and the bytes that `pack` gave."""
    if _compiled(y):
        from invref.kernels import cpu

        return cpu.backward(decoder, dy, y, packed)
    parts = _chunks(y)
    if len(parts) == 1:
        return _decode(decoder, dy, y, packed)
    dx = empty_like(y)
    bits = packed.split(CHUNK // sidebits.BITS)
    for part, dy_part, y_part, bits_part in zip(_chunks(dx), _chunks(dy), parts, bits, strict=True):
        part.copy_(_decode(decoder, dy_part, y_part, bits_part))
    return dx


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(CHUNK) if x.device.type == "cpu" and x.numel() > CHUNK else (x,)


def _decode(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
    side = sidebits.unpack(packed, y.numel()).bool()
    if y.dtype == float64:
        from invref.kernels import newton

        return newton.backward(decoder, dy, y, side)
    return naive.backward(decoder, dy, y, side, BY_DTYPE[y.dtype].name)
