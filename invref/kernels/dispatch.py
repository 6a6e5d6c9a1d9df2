"""Which kernel serves a tensor: Newton for float64, the compiled one for float32 on the CPU, the naive one elsewhere.

Takes and returns flat tensors; this is the only place that knows there are several kernels.
"""

from __future__ import annotations

from torch import Tensor, float32, float64

from invref.decoders import Decoder
from invref.formats import BY_DTYPE
from invref.kernels import naive, sidebits


def _compiled(x: Tensor) -> bool:
    return x.dtype == float32 and x.device.type == "cpu"


def pack(decoder: Decoder, x: Tensor) -> Tensor:
    """Packed side bits of the flat inputs x."""
    if _compiled(x):
        from invref.kernels import cpu

        return cpu.pack(decoder, x)
    if x.dtype == float64:
        from invref.kernels import newton

        return sidebits.pack(newton.side_of(decoder, x))
    return sidebits.pack(naive.side_of(decoder, x))


def backward(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
    """dy * g(y, s) for flat tensors dy and y of one dtype and the bytes that `pack` gave."""
    if _compiled(y):
        from invref.kernels import cpu

        return cpu.backward(decoder, dy, y, packed)
    side = sidebits.unpack(packed, y.numel())
    if y.dtype == float64:
        from invref.kernels import newton

        return newton.backward(decoder, dy, y, side)
    return naive.backward(decoder, dy, y, side, BY_DTYPE[y.dtype].name)
