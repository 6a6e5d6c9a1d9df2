"""The binned decoder's kernels for float32 as texts in LLVM's language: the same bits as `binned`.

Must not know how kernels are compiled and called.
"""

from __future__ import annotations

from invref.bins import TERMS
from invref.kernels.binned import EXPONENTS, MANTISSA, MASK, ONE, SPLIT_BITS
from invref.kernels.blocks import COUNT, FIRST_OWN, over_blocks, over_groups
from invref.kernels.cpu_kernels import MIRROR
from invref.kernels.sidebits import BITS, BLOCK, LANES
from invref.kernels.vectors import BYTE, FLOAT, INT, Function, Row, Value
from invref.kernels.vectors import LANES as STEP


def pack(wide: bool, bits: int) -> str:
    """Plane b: bit k of byte j of a block is bit b of how many edges lie below element 64 k + j."""
    f = Function(wide)
    x, planes = f.row(FIRST_OWN, FLOAT), f.row(FIRST_OWN + 1, BYTE)
    edges, edge_count = f.row(FIRST_OWN + 2, FLOAT), f.argument(FIRST_OWN + 3)
    plane = (f.argument(COUNT) + (BLOCK - 1)) // BLOCK * LANES
    codes = f.buffer(STEP, INT)
    origin = f.number(0)

    def work(rows: list[Row], block: Value, count: Value) -> None:
        with f.stepping(origin, f.number(LANES // STEP)) as group:
            totals: list[Value] = []
            for k in range(BITS):
                v = rows[0].load(group * STEP + LANES * k)
                codes.store(origin, f.number(0, INT).spread())
                with f.stepping(origin, edge_count) as i:
                    above = v > edges.one(i).spread()
                    known = codes.load(origin)
                    codes.store(origin, known + above.choose(known.filled(1), 0))
                code = codes.load(origin)
                taken = [(((code >> b) & 1) << k).narrowed(BYTE) for b in range(bits)]
                totals = [total | bit for total, bit in zip(totals, taken, strict=True)] if totals else taken
            for b, total in enumerate(totals):
                planes.store(plane * b + block * LANES + group * STEP, total)

    over_blocks(f, [x], [], work, padded=True)
    return f.finished()


def backward(wide: bool, bits: int, slots: int) -> str:
    """dx = dy * f', line by line the algorithm of `binned.derivative`."""
    f = Function(wide)
    dy, y, dx = (f.row(FIRST_OWN + i, FLOAT) for i in range(3))
    planes = f.row(FIRST_OWN + 3, BYTE)
    begin, high, low, side, octaves, coefficients, first, counts, at_, lowest = (
        f.row(FIRST_OWN + 4 + i, FLOAT) for i in range(10)
    )
    plane = (f.argument(COUNT) + (BLOCK - 1)) // BLOCK * LANES

    def work(rows: list[Row], block: Value, count: Value) -> None:
        dys, ys, out = rows

        def step(at: Value, byte: Value, bit: Value) -> None:
            v = ys.load(at)
            shift = bit.narrowed(INT).spread()
            code = shift.filled(0)
            for b in range(bits):
                sides = planes.load(plane * b + block * LANES + byte).widened(INT)
                code = code | (((sides >> shift) & 1) << b)
            home = cell = code * slots
            for slot in range(1, slots):
                begins = begin.gather(home + slot)
                cell = cell + ((v > begins) | v.equals(begins)).choose(cell.filled(1), 0)
            d = ((v - high.gather(cell)) - low.gather(cell)) * side.gather(cell)
            pattern = (d > 0.0).choose(d, 0.0).reinterpreted(INT)
            entry = octaves.gather(cell * EXPONENTS + (pattern >> MANTISSA)).reinterpreted(INT)
            mantissa, splits = pattern & MASK, entry & ((1 << SPLIT_BITS) - 1)
            row = (entry >> SPLIT_BITS) + (mantissa >> (splits.filled(MANTISSA) - splits))
            z = (((mantissa << splits) & MASK) | ONE).reinterpreted(FLOAT) - 1.5
            place = row * TERMS
            g = coefficients.gather(place + (TERMS - 1))
            for k in range(TERMS - 2, -1, -1):
                g = g * z + coefficients.gather(place + k)
            counted = counts.gather(cell).reinterpreted(INT)
            out.store(at, dys.load(at) * v.equals(v).choose(g, v))
            with f.whenever((counted > 0).any(), likely=False):
                own = v.reinterpreted(INT)
                ordinal = own.is_negative().choose(own ^ MIRROR, own)
                index = ordinal - first.gather(cell).reinterpreted(INT)
                inside = (index < counted) & v.equals(v)
                with f.whenever(inside.any(), likely=False):
                    found = lowest.gather(inside.choose(at_.gather(cell).reinterpreted(INT) + index, 0))
                    out.store(at, inside.choose(dys.load(at) * found, out.load(at)))

        over_groups(f, count, step)

    over_blocks(f, [dy, y], [dx], work)
    return f.finished()
