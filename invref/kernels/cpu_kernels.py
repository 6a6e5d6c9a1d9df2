"""The CPU's kernels as texts in LLVM's language: packing, decoding on cells (float32) and by table (16 bit).

Must not know how kernels are compiled and called.
"""

from __future__ import annotations

from invref.decoders import CELLS_LEFT, CELLS_RIGHT, DEGREE
from invref.kernels.blocks import COUNT, FIRST_OWN, over_blocks, over_groups
from invref.kernels.sidebits import BLOCK, LANES
from invref.kernels.vectors import BYTE, DOUBLE, FLOAT, HALF, INT, WORD, Function, Row, Value, size_of
from invref.kernels.vectors import LANES as STEP

QUIET, HIGHEST = 0x7FC0, 0x7F800000
"""bfloat16's NaN, and float32's infinity."""
FORMATS = {"float32": FLOAT, "float64": DOUBLE, "bfloat16": WORD, "float16": HALF}


def _loaded(row: Row, index: Value) -> Value:
    """16 numbers; those of the 16-bit formats as float32."""
    value = row.load(index)
    if row.element is HALF:
        return value.widened(FLOAT)
    return (value.widened(INT) << 16).reinterpreted(FLOAT) if row.element is WORD else value


def _stored(row: Row, index: Value, value: Value) -> None:
    """Rounds to nearest even and stores; any NaN becomes the quiet one in bfloat16."""
    if row.element is HALF:
        value = value.narrowed(HALF)
    elif row.element is WORD:
        bits = value.reinterpreted(INT)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = ((bits & 0x7FFFFFFF) > HIGHEST).choose(QUIET, rounded).narrowed(WORD)
    row.store(index, value)


def pack(wide: bool, fmt: str) -> str:
    """Bit k of byte j of a block: whether element 64 k + j lies above the threshold, below infinity."""
    f = Function(wide)
    x, packed = f.row(FIRST_OWN, FORMATS[fmt]), f.row(FIRST_OWN + 1, BYTE)
    threshold = f.argument(FIRST_OWN + 2).reinterpreted(DOUBLE)
    limit = (threshold if fmt == "float64" else threshold.narrowed(FLOAT)).spread()

    def work(rows: list[Row], block: Value, count: Value) -> None:
        # From the first element to the last, as processors fetch memory ahead.
        totals = [f.number(0, BYTE).spread()] * (LANES // STEP)
        for at in range(0, BLOCK, STEP):
            v = _loaded(rows[0], f.number(at))
            inside = (v > limit) & (v < float("inf"))
            bit, group = f.number(1 << at // LANES, BYTE).spread(), at % LANES // STEP
            totals[group] = totals[group] | inside.choose(bit, 0)
        for group, total in enumerate(totals):
            packed.store(block * LANES + group * STEP, total)

    over_blocks(f, [x], [], work, padded=True)
    return f.finished()


_FROM_LEFT, _FROM_TAIL = CELLS_RIGHT + 1, CELLS_RIGHT + 1 + CELLS_LEFT
SIZE = size_of(DEGREE + 1)
"""Numbers in the table of coefficients."""
SCALARS = 10
"""Numbers that follow the table of coefficients: y* in two parts, the clamp, the split, `end_t` and the scales."""
MIRROR = 0x7FFFFFFF
"""What a negative float's bits are xored with to count up with its value."""


def cells(wide: bool, near: bool) -> str:
    """dx = dy * g(y, s), with g on the cells of a decoder; the algorithm of `decoders.Cells`, step by step.

    What only outputs next to the turning value need is done where there are any, below a limit, and anew then.
    near: whether some of these, which are negative, decode to entries of a table instead.
    """
    f = Function(wide)
    dy, y, dx = (f.row(FIRST_OWN + i, FLOAT) for i in range(3))
    packed, table = f.row(FIRST_OWN + 3, BYTE), f.row(FIRST_OWN + 4, FLOAT)
    numbers = [table.spread(SIZE + i) for i in range(SCALARS)]
    high, low, cut, base, slope, split, end, right_scale, left_scale, tail_scale = numbers
    limit = f.argument(FIRST_OWN + 5).narrowed(INT).reinterpreted(FLOAT).spread()
    if near:
        lowest, width = f.row(FIRST_OWN + 6, FLOAT), f.argument(FIRST_OWN + 7).narrowed(INT).spread()
        first = f.argument(FIRST_OWN + 8).narrowed(INT).spread()

    def derivative(v: Value, d: Value, right: Value) -> Value:
        """At a distance d from the turning value, or in the tail."""
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
        return g * tail.choose(v, 1.0)

    def at_the_turn(v: Value, d: Value, right: Value) -> Value:
        g = derivative(v, (d < cut).choose(base + slope * (d > 0.0).choose(d, 0.0), d), right)
        if not near:
            return g
        index = (v.reinterpreted(INT) ^ MIRROR) - first
        inside = index < width
        return inside.choose(lowest.gather(inside.choose(index + right.choose(width, 0), 0)), g)

    def work(rows: list[Row], block: Value, count: Value) -> None:
        dys, ys, out = rows

        def step(at: Value, byte: Value, bit: Value) -> None:
            mask = (f.number(1) << bit).narrowed(BYTE).spread()
            v = ys.load(at)
            right = (packed.load(block * LANES + byte) & mask) > 0
            d = (v - high) - low
            out.store(at, dys.load(at) * derivative(v, d, right))
            with f.whenever((v < limit).any(), likely=False):
                out.store(at, dys.load(at) * at_the_turn(v, d, right))

        over_groups(f, count, step)

    over_blocks(f, [dy, y], [dx], work)
    return f.finished()


def table(wide: bool, fmt: str, bits: int) -> str:
    """dx = dy times the table's entry for the pattern of y and its side code of so many bits."""
    f = Function(wide)
    kind = FORMATS[fmt]
    dy, y, dx = f.row(FIRST_OWN, kind), f.row(FIRST_OWN + 1, WORD), f.row(FIRST_OWN + 2, kind)
    packed, entries = f.row(FIRST_OWN + 3, BYTE), f.row(FIRST_OWN + 4, FLOAT)
    plane = (f.argument(COUNT) + (BLOCK - 1)) // BLOCK * LANES

    def work(rows: list[Row], block: Value, count: Value) -> None:
        dys, ys, out = rows

        def step(at: Value, byte: Value, bit: Value) -> None:
            shift = bit.narrowed(INT).spread()
            index = ys.load(at).widened(INT)
            for number in range(bits):
                sides = packed.load(plane * number + block * LANES + byte).widened(INT)
                index = index | (((sides >> shift) & 1) << (16 + number))
            _stored(out, at, _loaded(dys, at) * entries.gather(index))

        over_groups(f, count, step)

    over_blocks(f, [dy, y], [dx], work)
    return f.finished()
