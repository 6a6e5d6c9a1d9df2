"""The naive decoder for the 16- and 32-bit formats on a GPU, compiled by Triton: one pass, same bits as `naive`.

Works on flat contiguous tensors of any alignment, on the tensor's own device and its current stream, and past 2^31
elements. Side bits have a layout of their own here (`gpu_kernels`, `size`): they never leave the device. Fused are the
backward of every rational decoder, and the forward with its side bits of the activations in OWN, where that gives
torch's bits; closed forms, tables and binned decoders are plain torch operations. Imports without Triton. Must not know
autograd or formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from invref import native
from invref.decoders import Decoder, load
from invref.formats import BY_DTYPE
from invref.kernels import gpu_check

ROWS, BITS = 128, 8
BLOCK = ROWS * BITS
"""Elements that one program works on, and the bytes that hold their side bits."""

WIDTHS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}
"""Elements in a load of 16 bytes."""

OLDEST = (3, 7)
"""Triton's oldest version to be used. 3.6 fuses products with sums on sm_100 and gfx942 although told not to, and the
bits would not be those of `naive`; 3.7.0, 3.8.0 and 3.9.0 do not."""

OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": native.gelu_tanh,
    "silu": functional.silu,
    "mish": functional.mish,
    "quick_gelu": native.quick_gelu,
}
"""The framework's forward of each activation that has a fused one."""


def available(x: Tensor) -> bool:
    """Whether these kernels serve x; where only Triton is missing, or too old, a warning says so once."""
    return serves(x.dtype, x.device)


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels serve tensors of a dtype on a device, as `available` has it."""
    return device.type == "cuda" and dtype in WIDTHS and _able(device) and _importable()


def size(n: int, dtype: torch.dtype) -> int:
    """How many bytes the side bits of n elements take: at most 64 more than n / 8, rounded up."""
    blocks, rest = divmod(n, BLOCK)
    return blocks * ROWS + min(ROWS, -(-rest // WIDTHS[dtype]))


def pack(decoder: Decoder, x: Tensor) -> Tensor:
    """The side bits of the flat inputs x (n,): uint8 (size(n),)."""
    from invref.kernels import gpu_kernels

    bits = torch.empty(size(x.numel(), x.dtype), dtype=torch.uint8, device=x.device)
    _launch(gpu_kernels.pack, x, (_words(x), bits), (float(decoder.threshold(np.float32)),), {}, fusion=False)
    return bits


def unpack(packed: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The side bits of n elements from the bytes that `pack` or `forward` gave, by plain torch: uint8 (n,)."""
    width = WIDTHS[dtype]
    rows = torch.nn.functional.pad(packed, (0, -(-n // BLOCK) * ROWS - packed.numel())).view(-1, 1, ROWS, 1)
    places = torch.arange(BITS, dtype=torch.uint8, device=packed.device).view(BITS // width, 1, width)
    return (rows >> places & 1).view(-1)[:n]


def backward(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
    """dy * g(y, s) for flat dy and y (n,) of one dtype and the bytes that `pack` or `forward` gave."""
    from invref.kernels import gpu_kernels

    dx = torch.empty_like(y)
    tensors = (_words(dy), _words(y), packed, _words(dx))
    values = constants(decoder, BY_DTYPE[y.dtype].name)
    _launch(gpu_kernels.backward, y, tensors, values, {"DIRECT": _nvidia(y)}, fusion=False)
    return dx


def forward(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x), bit for bit the framework's, and the side bits, for flat x (n,) and a name in OWN.

    In one pass where the device's check found that to give the framework's bits, else in two.
    """
    fusion = gpu_check.choice(name, x.dtype, x.device, OWN[name], lambda v, fused: fused_forward(name, v, fused)[0])
    if fusion is not None:
        return fused_forward(name, x, fusion)
    return OWN[name](x), pack(load(name), x)


def fused_forward(name: str, x: Tensor, fusion: bool) -> tuple[Tensor, Tensor]:
    """f(x) and the side bits in one pass; with `fusion` the compiler may fuse products with sums."""
    from invref.kernels import gpu_kernels

    y = torch.empty_like(x)
    bits = torch.empty(size(x.numel(), x.dtype), dtype=torch.uint8, device=x.device)
    threshold = float(load(name).threshold(np.float32))
    _launch(gpu_kernels.forward, x, (_words(x), _words(y), bits), (threshold,), {"NAME": name}, fusion)
    return y, bits


@cache
def constants(decoder: Decoder, fmt: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What `gpu_kernels.backward` takes: nine scalars, and centre, P and Q of the three segments in a row."""
    clamp, (high, low) = decoder.clamps[fmt], decoder.turning_value(np.float32)
    end_d = np.float32(decoder.end_t) * np.float32(decoder.end_t)
    assert np.sqrt(end_d) == np.float32(decoder.end_t), "the square of end_t, rounded, has another root"
    scalars = (high, low, clamp.cut, clamp.base, clamp.slope, decoder.tail_y, decoder.head_t, decoder.end_t, end_d)
    segments = (decoder.tail, decoder.turn, decoder.head)
    coefficients = (v for s in segments for v in (s.centre, *s.numerator, *s.denominator))
    return tuple(map(float, scalars)), tuple(map(float, coefficients))


def options(backend: str, warp: int, fusion: bool) -> dict[str, Any]:
    """How a kernel is compiled for "cuda" or "hip" and warps of `warp` threads: a thread for each byte of side bits.

    With `fusion` the compiler may fuse products with sums. Subnormals are kept, by the math library, too.
    """
    subnormals = {"cuda": "enable_reflect_ftz", "hip": "allow_flush_denorm"}[backend]
    return {"num_warps": ROWS // warp, "enable_fp_fusion": fusion, subnormals: False}


def _launch(
    kernel: Any,
    x: Tensor,
    tensors: tuple[Tensor, ...],
    values: tuple[Any, ...],
    named: dict[str, Any],
    fusion: bool,
) -> None:
    blocks, rest = divmod(x.numel(), BLOCK)
    common = {"WIDTH": WIDTHS[x.dtype], **named, **_options(x.device, fusion)}
    with _on(x.device):
        if blocks:
            kernel[(blocks,)](*tensors, 0, x.numel(), *values, MASKED=False, **common)
        if rest:
            kernel[(1,)](*tensors, blocks, x.numel(), *values, MASKED=True, **common)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one: Triton launches there, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _options(device: torch.device, fusion: bool) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    backend = "hip" if torch.version.hip else "cuda"
    return options(backend, torch.cuda.get_device_properties(device).warp_size, fusion)


def _words(x: Tensor) -> Tensor:
    """bfloat16 as 16-bit words where the kernels want it so: on the CPU, under Triton's interpreter."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x


def _nvidia(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


@cache
def _able(device: torch.device) -> bool:
    """AMD's, and NVIDIA's from compute capability 8.0 on: older ones do not convert to bfloat16."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _importable() -> bool:
    found = _triton()
    if found is not None and tuple(map(int, found.split(".")[:2])) >= OLDEST:
        return True
    wanted = f"triton>={OLDEST[0]}.{OLDEST[1]}"
    has = "no triton" if found is None else f"triton {found}"
    warnings.warn(
        f"invref runs its plain torch code on this GPU, which is much slower: there is {has} here, `pip install "
        f"'{wanted}'` or a torch that brings it",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def _triton() -> str | None:
    """The version of Triton, None without it."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
