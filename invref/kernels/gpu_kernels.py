"""The Triton kernels: side bits of inputs, values with their side bits in one pass, and the gradient from the output.

One kernel a direction serves every decoder of `invref.decoders`: the coefficients are arguments. Arithmetic is float32,
line by line that of `naive`: each operation is rounded to nearest even, division and square root included, and none is
fused with another, so the same inputs give the same bits. A program serves one block; a block that is not full has its
own, masked variant, so that the others keep their 16-byte loads and stores. Must not know tensors, devices or torch.

Side bits: a block of BLOCK elements takes ROWS bytes. A thread's 16-byte load brings WIDTH neighbours (8 of 16 bits, 4
of 32), and its byte holds the bits of what it loads, in order: for WIDTH = 4 first from the block's first half, then
from its second. So a byte is loaded or stored once for its 8 elements, by the thread that needs it.

DIRECT is for NVIDIA: division and square root by the sequences that the processor's compiler uses itself, without the
branches with which it guards them against exponents that do not occur here (`_root` and `_quotient` say why not).

Under Triton's interpreter, whose bfloat16 is not to be relied upon (3.9.0 truncates where it must round, and reads
subnormals wrong), bfloat16 comes as 16-bit words and is widened and rounded on its bits; compiled, the hardware's own
conversions do that. The interpreter has no math library either: there the values stand on exp, log and erf alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

ROWS = tl.constexpr(128)
BITS = tl.constexpr(8)
BLOCK = tl.constexpr(1024)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Loads, stores and formats.


@triton.jit
def _offsets(part: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Where in its block each element of a part lies: (ROWS, WIDTH)."""
    return part * ROWS * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _rest(n: tl.tensor, block: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """How many elements the block has."""
    return (n - block * BLOCK).to(tl.int32) if MASKED else BLOCK


@triton.jit
def _load(at: tl.tensor, offset: tl.tensor, rest: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Elements of a block as they are stored, NaN where there are none: their side bits are 0."""
    if MASKED:
        nan: tl.constexpr = 0x7FC0 if at.dtype.element_ty == tl.int16 else float("nan")
        return tl.load(at + offset, mask=offset < rest, other=nan)
    return tl.load(at + offset)


@triton.jit
def _store(at: tl.tensor, offset: tl.tensor, value: tl.tensor, rest: tl.tensor, MASKED: tl.constexpr) -> None:
    """A float32 value, rounded once to what `at` points to."""
    narrow = _narrow(value, at.dtype.element_ty)
    if MASKED:
        tl.store(at + offset, narrow, mask=offset < rest)
    else:
        tl.store(at + offset, narrow)


@triton.jit
def _store_bits(at: tl.tensor, byte: tl.tensor, rest: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr) -> None:
    """A block's bytes."""
    rows = tl.arange(0, ROWS)
    if MASKED:
        tl.store(at + rows, byte.to(tl.uint8), mask=rows * WIDTH < rest)
    else:
        tl.store(at + rows, byte.to(tl.uint8))


@triton.jit
def _load_bits(at: tl.tensor, rest: tl.tensor, WIDTH: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """A block's bytes as int32 (ROWS, 1)."""
    rows = tl.arange(0, ROWS)
    byte = tl.load(at + rows, mask=rows * WIDTH < rest, other=0) if MASKED else tl.load(at + rows)
    return byte.to(tl.int32)[:, None]


@triton.jit
def _wide(value: tl.tensor) -> tl.tensor:
    """float32 of a value of any of the three formats; 16-bit words stand for bfloat16."""
    if value.dtype == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _narrow(value: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """A float32 value rounded to nearest even; to int16 as the words of bfloat16."""
    if kind == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, nearest, 0x7FC0).to(tl.int16)
    return value.to(kind)


# Side bits.


@triton.jit
def _bits(x: tl.tensor, threshold: tl.tensor, part: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """The side bits of x (ROWS, WIDTH) in their places in a byte: int32 (ROWS,)."""
    right = (x > threshold) & (x < float("inf"))
    return tl.sum(right.to(tl.int32) << (part * WIDTH + tl.arange(0, WIDTH))[None, :], axis=1)


@triton.jit(do_not_specialize=["first", "n"])
def pack(
    x_at: tl.tensor,
    bits_at: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    threshold: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """The side bits of the inputs x (n,), for the blocks from `first` on."""
    block = first + tl.program_id(0).to(tl.int64)
    rest = _rest(n, block, MASKED)
    byte = tl.zeros((ROWS,), tl.int32)
    for part in tl.static_range(BITS // WIDTH):
        x = _wide(_load(x_at + block * BLOCK, _offsets(part, WIDTH), rest, MASKED))
        byte += _bits(x, threshold, part, WIDTH)
    _store_bits(bits_at + block * ROWS, byte, rest, WIDTH, MASKED)


# The gradient.


@triton.jit
def _root(x: tl.tensor, DIRECT: tl.constexpr) -> tl.tensor:
    """sqrt(x), correctly rounded for -0, +0 and 2^-96 <= x < inf, NaN below 0.

    The direct way underflows for smaller x > 0, and gives something in [0, 2^-47], as good as the root where only its
    difference to a segment's centre counts. Negative x above -2^-126, for which it misses the NaN, never come.
    """
    if DIRECT:
        r = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        # 2^60: for x = 0 and what is flushed to it, r would be infinite.
        r = tl.minimum(tl.abs(r), 1152921504606846976.0, propagate_nan=tl.PropagateNan.ALL)
        s = x * r
        return tl.fma(tl.fma(-s, s, x), 0.5 * r, s)
    return tl.sqrt_rn(x)


@triton.jit
def _quotient(p: tl.tensor, q: tl.tensor, DIRECT: tl.constexpr) -> tl.tensor:
    """p / q, correctly rounded for |q| between 2^-60 and 2^60 and p likewise or 0, as decoders have; NaN stays NaN."""
    if DIRECT:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [q], tl.float32, is_pure=True, pack=1)
        r = tl.fma(tl.fma(-q, r, 1.0), r, r)
        t = p * r
        return tl.fma(tl.fma(-q, t, p), r, t)
    return tl.div_rn(p, q)


@triton.jit
def _pick(segments: tl.tensor, k: tl.constexpr, tail: tl.tensor, head: tl.tensor) -> tl.tensor:
    return tl.where(tail, segments[k], tl.where(head, segments[k + 24], segments[k + 12]))


@triton.jit
def _derivative(
    y: tl.tensor, right: tl.tensor, scalars: tl.tensor, segments: tl.tensor, DIRECT: tl.constexpr
) -> tl.tensor:
    # Line by line the algorithm of naive.derivative, but that the end of the head is kept by d and not by its root:
    # the root of end_d is end_t, and roots keep the order.
    high, low, cut, base, slope, tail_y, head_t, end_t, end_d = scalars
    d = (y - high) - low
    d = tl.where(d < cut, base + slope * tl.where(d > 0.0, d, 0.0), d)
    d = tl.minimum(d, end_d, propagate_nan=tl.PropagateNan.ALL)
    tail = (right == 0) & (y > tail_y)
    root = _root(tl.where(tail, -y, d), DIRECT)
    u = tl.where(tail | (right != 0), root, -root)
    head = u > head_t
    m = tl.where(tail, y, tl.where(head, end_t - u, u))
    z = u - _pick(segments, 0, tail, head)
    p = _pick(segments, 7, tail, head)
    for k in tl.static_range(6):
        p = p * z + _pick(segments, 6 - k, tail, head)
    q = _pick(segments, 11, tail, head)
    for k in tl.static_range(3):
        q = q * z + _pick(segments, 10 - k, tail, head)
    q = q * z + 1.0
    return tl.where(head, 1.0, 0.0) + m * _quotient(p, q, DIRECT)


@triton.jit
def _replaced(
    g: tl.tensor, y: tl.tensor, side: tl.tensor, at: tl.tensor, first: tl.tensor, LOWEST: tl.constexpr
) -> tl.tensor:
    # As codes.Lowest.find: by the ordinals of float32 outputs.
    pattern = y.to(tl.int32, bitcast=True)
    index = tl.where(pattern < 0, pattern ^ 0x7FFFFFFF, pattern) - first
    inside = (index >= 0) & (index < LOWEST)
    return tl.where(inside, tl.load(at + index + tl.where(side != 0, LOWEST, 0), mask=inside, other=0.0), g)


@triton.jit(do_not_specialize=["first", "n"])
def by_table(
    dy_at: tl.tensor,
    y_at: tl.tensor,
    bits_at: tl.tensor,
    dx_at: tl.tensor,
    table_at: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    SIDES: tl.constexpr,
) -> None:
    """dx = dy * table[s, y], all (n,) of a 16-bit format, y as int16 words; table (SIDES, 65536), s = 0 for one."""
    block = first + tl.program_id(0).to(tl.int64)
    rest = _rest(n, block, MASKED)
    start = block * BLOCK
    index = _load(y_at + start, _offsets(0, WIDTH), rest, MASKED).to(tl.int32) & 0xFFFF
    dy = _load(dy_at + start, _offsets(0, WIDTH), rest, MASKED)
    if SIDES > 1:
        byte = _load_bits(bits_at + block * ROWS, rest, WIDTH, MASKED)
        index += tl.where((byte & (1 << tl.arange(0, WIDTH)[None, :])) != 0, 65536, 0)
    g = tl.load(table_at + index).to(tl.float32)
    _store(dx_at + start, _offsets(0, WIDTH), _wide(dy) * g, rest, MASKED)


@triton.jit(do_not_specialize=["first", "n", "lowest_first"])
def backward(
    dy_at: tl.tensor,
    y_at: tl.tensor,
    bits_at: tl.tensor,
    dx_at: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    scalars: tl.tensor,
    segments: tl.tensor,
    lowest_at: tl.tensor,
    lowest_first: tl.tensor,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    DIRECT: tl.constexpr,
    LOWEST: tl.constexpr,
) -> None:
    """dx = dy * g(y, s), all (n,), for the blocks from `first` on; scalars and segments as `gpu.constants` has them.

    LOWEST: how many float32 outputs from the ordinal `lowest_first` on decode to lowest_at[s * LOWEST + i] instead.
    """
    block = first + tl.program_id(0).to(tl.int64)
    rest = _rest(n, block, MASKED)
    start = block * BLOCK
    # All loads come first: behind a store they would have to wait for it.
    byte = _load_bits(bits_at + block * ROWS, rest, WIDTH, MASKED)
    y = _load(y_at + start, _offsets(0, WIDTH), rest, MASKED)
    dy = _load(dy_at + start, _offsets(0, WIDTH), rest, MASKED)
    if WIDTH < BITS:
        y_more = _load(y_at + start, _offsets(1, WIDTH), rest, MASKED)
        dy_more = _load(dy_at + start, _offsets(1, WIDTH), rest, MASKED)
    places = 1 << tl.arange(0, WIDTH)[None, :]
    side = byte & places
    g = _derivative(_wide(y), side, scalars, segments, DIRECT)
    if LOWEST:
        g = _replaced(g, y, side, lowest_at, lowest_first, LOWEST)
    _store(dx_at + start, _offsets(0, WIDTH), _wide(dy) * g, rest, MASKED)
    if WIDTH < BITS:
        side = byte & (places << WIDTH)
        g = _derivative(_wide(y_more), side, scalars, segments, DIRECT)
        if LOWEST:
            g = _replaced(g, y_more, side, lowest_at, lowest_first, LOWEST)
        _store(dx_at + start, _offsets(1, WIDTH), _wide(dy_more) * g, rest, MASKED)


# Values. The operations, their order and their one fused product are those of PyTorch's CUDA kernels (aten/src/ATen/
# native/cuda/Activation{Gelu,Silu,Mish}Kernel.cu). What a compiler fuses beyond that is an option of the launch: which
# setting gives torch's bits, if one does, is found out on the device (`gpu_check`).


@triton.jit
def _exp(x: tl.tensor) -> tl.tensor:
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0) if INTERPRETED else libdevice.tanh(x)


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    return tl.log(1.0 + x) if INTERPRETED else libdevice.log1p(x)


@triton.jit
def _erf(x: tl.tensor) -> tl.tensor:
    return tl.erf(x) if INTERPRETED else libdevice.erf(x)


@triton.jit
def _value(x: tl.tensor, NAME: tl.constexpr, kind: tl.constexpr) -> tl.tensor:
    """f(x) in float32 for x that was widened from kind."""
    if NAME == "gelu":
        y = x * 0.5 * (1.0 + _erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * tl.fma(0.044715, x * x * x, x)))
    elif NAME == "silu":
        y = tl.div_rn(x, 1.0 + _exp(-x))
    elif NAME == "mish":
        y = x * _tanh(_log1p(_exp(x)))
    else:
        tl.static_assert(NAME == "quick_gelu")
        # Composed of three operations, each of which rounds to the format.
        scaled = _wide(_narrow(1.702 * x, kind))
        y = x * _wide(_narrow(tl.div_rn(1.0, 1.0 + _exp(-scaled)), kind))
    return y


@triton.jit(do_not_specialize=["first", "n"])
def forward(
    x_at: tl.tensor,
    y_at: tl.tensor,
    bits_at: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    threshold: tl.tensor,
    NAME: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """y = f(x) and the side bits of x (n,), for the blocks from `first` on."""
    block = first + tl.program_id(0).to(tl.int64)
    rest = _rest(n, block, MASKED)
    start = block * BLOCK
    kind: tl.constexpr = x_at.dtype.element_ty
    x = _wide(_load(x_at + start, _offsets(0, WIDTH), rest, MASKED))
    byte = _bits(x, threshold, 0, WIDTH)
    if WIDTH < BITS:
        more = _wide(_load(x_at + start, _offsets(1, WIDTH), rest, MASKED))
        byte += _bits(more, threshold, 1, WIDTH)
        _store(y_at + start, _offsets(1, WIDTH), _value(more, NAME, kind), rest, MASKED)
    _store(y_at + start, _offsets(0, WIDTH), _value(x, NAME, kind), rest, MASKED)
    _store_bits(bits_at + block * ROWS, byte, rest, WIDTH, MASKED)
