"""Run by test_gpu_interpreter.py in a process of its own, with TRITON_INTERPRET=1: `gpu_interpreted.py NAME CASE`.

Prints one line of JSON: what was compared, and how many elements differ. The flag must be there before the kernels are
imported, and interpreted kernels cannot be compiled in the same process. The interpreter takes its time for each
program and not for each element, so programs get blocks of 2^14 elements here, but where lengths are what is tried.
"""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from invref.decoders import load
from invref.formats import FORMATS, Format
from invref.kernels import codes as codes_
from invref.kernels import gpu, gpu_kernels, naive
from invref.kernels.codes import Lowest

WINDOW = 1024
LENGTHS = (0, 1, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 1536, 1537, 2049)


def blocks_of(rows: int) -> None:
    """Gives every program blocks of 8 * rows elements."""
    gpu.ROWS, gpu.BLOCK = rows, rows * gpu.BITS
    gpu_kernels.ROWS, gpu_kernels.BLOCK = tl.constexpr(gpu.ROWS), tl.constexpr(gpu.BLOCK)


def places(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Byte and bit of each of n elements, by the words of the layout's description."""
    width = gpu.WIDTHS[dtype]
    element = torch.arange(n)
    block, inside = element // gpu.BLOCK, element % gpu.BLOCK
    part, inside = inside // (gpu.ROWS * width), inside % (gpu.ROWS * width)
    return block * gpu.ROWS + inside // width, part * width + inside % width


def packed(side: Tensor, dtype: torch.dtype) -> Tensor:
    """Side bits by that description, bit for bit."""
    byte, bit = places(side.numel(), dtype)
    bits = torch.zeros(gpu.size(side.numel(), dtype), dtype=torch.int32)
    return bits.index_add(0, byte, side.int() << bit.int()).to(torch.uint8)


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements differ in any bit; all NaN are alike."""
    words = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return int(((a.view(words) != b.view(words)) & ~(a.isnan() & b.isnan())).sum())


def compared(name: str, fmt: Format, y: Tensor, side: Tensor, seed: int = 1) -> int:
    """Differences between the kernel and the readable decoder for outputs y and side bits (n,)."""
    dy = torch.randn(y.numel(), generator=torch.Generator().manual_seed(seed)).to(fmt.dtype)
    decoder = load(name)
    kernel = gpu.backward(decoder, dy, y, packed(side, fmt.dtype))
    return differing(kernel, naive.backward(decoder, dy, y, side, fmt.name))


def every(fmt: Format) -> Tensor:
    """Every bit pattern of a 16-bit format."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(fmt.dtype)


def windows(name: str) -> Tensor:
    """float32 values around what a decoder distinguishes, and a sample."""
    decoder, fmt = load(name), FORMATS["float32"]
    values = [float(decoder.turning_x), float(decoder.turning_y), decoder.tail_y, -1e-38, 0.0, 1e-38, 1.0]
    values += [decoder.end_t**2, decoder.head_t**2, decoder.end_t**2 + float(decoder.turning_y), -3.0, 1e20]
    starts = [*(fmt.ordinal(v) - WINDOW // 2 for v in values), fmt.first_ordinal, fmt.largest_ordinal - WINDOW + 1]
    sample = 3 * torch.randn(8 * WINDOW, generator=torch.Generator().manual_seed(2))
    special = torch.tensor([np.inf, -np.inf, np.nan] + 5 * [0.0])
    return torch.cat([*(fmt.tensor(start, WINDOW) for start in starts), sample, special])


def codes(name: str, fmt: Format) -> dict[str, int]:
    """Every output with either side bit, side by side so that neighbouring bits differ."""
    y = every(fmt).repeat_interleave(2)
    return {"compared": y.numel(), "differing": compared(name, fmt, y, torch.arange(y.numel()) % 2 == 1)}


def inputs(name: str, fmt: Format) -> dict[str, int]:
    """Every input: its side bit from `pack` and from the fused forward; returns the worst of its values, too."""
    x = every(fmt) if fmt.bits == 16 else windows(name)
    expected = packed(naive.side_of(load(name), x), fmt.dtype)
    y, bits = gpu.fused_forward(name, x, False)
    side = gpu.unpack(bits, x.numel(), x.dtype)
    assert torch.equal(side.bool(), naive.side_of(load(name), x)), "unpacked otherwise than described"
    wrong = int((gpu.pack(load(name), x) != expected).sum()) + int((bits != expected).sum())
    # quick_gelu rounds to the format in between, and so does torch's, but for the last of three roundings at most; the
    # others round once. 2^-20 |x| is for float32 arithmetic: a few operations on numbers up to 2, each good to 2^-23.
    composed = name == "quick_gelu"
    own = gpu.OWN[name](x if composed else x.double()).double()
    near = x.double().abs() * 2**-20 + own.abs() * 2.0**-fmt.precision * (6 if composed else 1) + fmt.ulp(0.0)
    off = ~((y.double() - own).abs() <= near) & x.isfinite()
    return {"compared": x.numel(), "differing": wrong, "far": int(off.sum())}


def float32(name: str, fmt: Format) -> dict[str, int]:
    """Outputs around what the decoder distinguishes, with either side bit."""
    y = windows(name).repeat_interleave(2)
    return {"compared": y.numel(), "differing": compared(name, fmt, y, torch.arange(y.numel()) % 2 == 1)}


def lengths(name: str, fmt: Format) -> dict[str, int]:
    """Lengths around those of blocks, tensors that start anywhere, and nothing written beyond their ends."""
    total = wrong = 0
    for n in LENGTHS:
        for start in (0, 1, 3):
            x = (3 * torch.randn(start + n, generator=torch.Generator().manual_seed(n))).to(fmt.dtype)[start:]
            side = naive.side_of(load(name), x)
            wrong += int((gpu.pack(load(name), x) != packed(side, fmt.dtype)).sum())
            y = gpu.OWN[name](x)
            wrong += compared(name, fmt, y, side, n)
            frame = torch.full((start + n + 16,), 7.0, dtype=fmt.dtype)
            inner = frame[start : start + n]
            bits = torch.full((gpu.size(n, fmt.dtype) + 16,), 7, dtype=torch.uint8)
            values = (*gpu.constants(load(name), fmt.name), bits[8:-8], 0)
            tensors = (gpu._words(y), gpu._words(y), bits[8:-8], gpu._words(inner))
            gpu._launch(gpu_kernels.backward, y, tensors, values, {"DIRECT": False, "LOWEST": 0}, False)
            gpu._launch(gpu_kernels.pack, y, (gpu._words(y), bits[8:-8]), (0.0,), {}, False)
            outside = torch.cat([frame[:start], frame[start + n :]]), torch.cat([bits[:8], bits[-8:]])
            wrong += sum(int((part != 7).sum()) for part in outside)
            total += n
    return {"compared": total, "differing": wrong}


def lowest(name: str, fmt: Format) -> dict[str, int]:
    """Outputs in a window next to the turning value decode to a table instead, on either side."""
    y = windows(name).repeat_interleave(2)
    side, dy = torch.arange(y.numel()) % 2 == 1, torch.ones(y.numel())
    values = 1 + torch.arange(30, dtype=torch.float32).view(2, 15)
    table = Lowest(fmt.ordinal(float(load(name).turning_y)) - 7, values)
    kernel = gpu.backward(load(name), dy, y, packed(side, fmt.dtype), table)
    expected = table.replace(naive.backward(load(name), dy, y, side, fmt.name), y, side)
    inside = int(table.find(y, side)[0].sum())
    assert inside == 30, f"{inside} outputs in a window of 15 on two sides"
    return {"compared": y.numel(), "differing": differing(kernel, expected)}


def table(name: str, fmt: Format) -> dict[str, int]:
    """Every output of a 16-bit format with either side code, and without codes, by a table with an entry for each."""
    y = every(fmt).repeat_interleave(2)
    side = torch.arange(y.numel()) % 2 == 1
    dy = torch.randn(y.numel(), generator=torch.Generator().manual_seed(3)).to(fmt.dtype)
    values = torch.randn(2, 1 << 16, generator=torch.Generator().manual_seed(4))
    wrong = differing(gpu.by_table(values, dy, y, packed(side, fmt.dtype)), codes_.decode(values, dy, y, side))
    wrong += differing(gpu.by_table(values[:1], dy, y, None), codes_.decode(values[:1], dy, y, None))
    return {"compared": 2 * y.numel(), "differing": wrong}


CASES = {"lowest": lowest, "table": table, "codes": codes, "inputs": inputs, "float32": float32, "lengths": lengths}


def main() -> None:
    """Runs one case in the formats that it is for."""
    warnings.simplefilter("ignore", RuntimeWarning)
    assert gpu_kernels.INTERPRETED.value, "TRITON_INTERPRET is not set"
    name, case, *formats = sys.argv[1:]
    if case != "lengths":
        blocks_of(2048)
    print(json.dumps({fmt: CASES[case](name, FORMATS[fmt]) for fmt in formats}))


if __name__ == "__main__":
    main()
