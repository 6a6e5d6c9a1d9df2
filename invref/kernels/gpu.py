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
from invref.kernels.codes import Lowest

ROWS, BITS = 128, 8
BLOCK = ROWS * BITS
"""Elements that one program works on, and the bytes that hold their side bits."""

WIDTHS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}
"""Elements in a load of 16 bytes."""

OLDEST, OLDEST_TO_SM_90 = (3, 7), (3, 6)
"""Triton's oldest version to be used, and that for NVIDIA's compute capabilities 8 and 9. 3.6 fuses products with sums
on sm_100 and gfx942 although told not to, and the bits would not be those of `naive`; on sm_80 and sm_90 it does not,
nor do 3.7.0, 3.8.0 and 3.9.0 anywhere."""

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
    return device.type == "cuda" and dtype in WIDTHS and _able(device) and _importable(_oldest(device))


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


def backward(decoder: Decoder, dy: Tensor, y: Tensor, packed: Tensor, lowest: Lowest | None = None) -> Tensor:
    """dy * g(y, s) for flat dy and y (n,) of one dtype and the bytes that `pack` or `forward` gave.

    lowest: what float32 outputs next to the turning value decode to instead.
    """
    from invref.kernels import gpu_kernels

    dx = torch.empty_like(y)
    tensors = (_words(dy), _words(y), packed, _words(dx))
    # Without lowest codes their pointer is one that nothing is read from.
    table, start, count = (packed, 0, 0) if lowest is None else (lowest.values, lowest.first, lowest.values.shape[1])
    values = (*constants(decoder, BY_DTYPE[y.dtype].name), table, start)
    named = {"DIRECT": _nvidia(y), "LOWEST": count}
    _launch(gpu_kernels.backward, y, tensors, values, named, fusion=False)
    return dx


def by_table(table: Tensor, dy: Tensor, y: Tensor, packed: Tensor | None) -> Tensor:
    """dy * table[s, y] for flat dy and y (n,) of one 16-bit dtype, and the bytes of `pack` for a table of two sides.

    table: float32 (1 or 2, 65536), by the output's bit pattern; one side takes no bytes.
    """
    from invref.kernels import gpu_kernels

    dx = torch.empty_like(y)
    words = y.view(torch.int16)
    tensors = (_words(dy), words, words if packed is None else packed, _words(dx), table)
    _launch(gpu_kernels.by_table, y, tensors, (), {"SIDES": 1 if packed is None else 2}, fusion=False)
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
    """Runs a kernel over the blocks of x, and its masked variant over what is left.

    Triton's own way to a compiled kernel costs more than the kernel takes for most tensors: it looks at each argument
    for what to compile. What it would find is the same for all aligned tensors of a dtype on a device, so the compiled
    kernel is remembered.
    """
    n = x.numel()
    blocks, rest = divmod(n, BLOCK)
    with _on(x.device):
        for first, count, masked in ((0, blocks, False), (blocks, int(rest > 0), True)):
            if not count:
                continue
            arguments = (*tensors, first, n, *values)
            key = (kernel, x.dtype, x.device, *named.values(), fusion, masked)
            # Triton types an integer by its size, and makes wide loads for aligned tensors only.
            usual = n <= _MOST_INT and x.device.type == "cuda" and not any(t.data_ptr() & 15 for t in tensors)
            if usual and key in _COMPILED:
                compiled, constants = _COMPILED[key]
                compiled[(count, 1, 1)](*arguments, *constants)
                continue
            chosen = {"WIDTH": WIDTHS[x.dtype], "MASKED": masked, **named}
            compiled = kernel[(count,)](*arguments, **chosen, **_options(x.device, fusion))
            if usual:
                _COMPILED[key] = compiled, tuple(chosen[name] for name in kernel.arg_names if name in chosen)


_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""By kernel, dtype, device and constants: the compiled kernel for aligned tensors, and its constants in their order."""

_MOST_INT = 2**31 - 1


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes `device` the current one: Triton launches there, whatever device its tensors are on."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else nullcontext()


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
def _oldest(device: torch.device) -> tuple[int, int]:
    """Triton's oldest version to be used on a device."""
    early = torch.version.hip is None and torch.cuda.get_device_capability(device) < (10, 0)
    return OLDEST_TO_SM_90 if early else OLDEST


@cache
def _importable(oldest: tuple[int, int]) -> bool:
    found = _triton()
    if found is not None and tuple(map(int, found.split(".")[:2])) >= oldest:
        return True
    wanted = f"triton>={oldest[0]}.{oldest[1]}"
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
