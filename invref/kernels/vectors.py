"""Vectors of 16 numbers for kernels: arithmetic written once, lowered to LLVM's vector instructions inside Numba.

Numba alone leaves vectors to LLVM's loop vectoriser, which neither finds table look-ups nor uses 512-bit registers.
Here a kernel's inner step is spelled out on 16 lanes, with every operation an IEEE one and every fused multiply-add
explicit: the same bits on every processor, for every element at every position. Where the processor has AVX-512, tables
of 32 floats are looked up in registers, elsewhere an entry of all tables is loaded at once. Must not know decoders.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.np.arrayobj import make_array
from numpy.typing import NDArray

LANES = 16
ENTRIES = 32
"""Entries of a table for `look_up`: two vectors."""
ROW_BITS = 3
"""Where tables lie entry by entry, an entry takes 8 floats, whatever the number of tables."""

BIT, BYTE, WORD, INT, LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
FLOAT_BYTES = 4


def _vector(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


class Vector:
    """16 lanes of one type, with Python's operators; Python numbers on the right are spread over all lanes."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _of(self, value: Any) -> Vector:
        return Vector(self.builder, value)

    def filled(self, number: Any) -> Vector:
        """All lanes equal to a Python number, of this vector's type."""
        kind = self.value.type
        return self._of(ir.Constant(kind, [ir.Constant(kind.element, number)] * LANES))

    def _operand(self, other: Any) -> Any:
        return (other if isinstance(other, Vector) else self.filled(other)).value

    @property
    def _floating(self) -> bool:
        return isinstance(self.value.type.element, ir.HalfType | ir.FloatType | ir.DoubleType)

    def __add__(self, other: Any) -> Vector:
        add = self.builder.fadd if self._floating else self.builder.add
        return self._of(add(self.value, self._operand(other)))

    def __sub__(self, other: Any) -> Vector:
        return self._of(self.builder.fsub(self.value, self._operand(other)))

    def __mul__(self, other: Any) -> Vector:
        return self._of(self.builder.fmul(self.value, self._operand(other)))

    def __neg__(self) -> Vector:
        return self.filled(-0.0) - self

    def __lt__(self, other: Any) -> Vector:
        return self._of(self.builder.fcmp_ordered("<", self.value, self._operand(other)))

    def __gt__(self, other: Any) -> Vector:
        return self._of(self.builder.fcmp_ordered(">", self.value, self._operand(other)))

    def above(self, other: Any) -> Vector:
        """Unsigned comparison of integers."""
        return self._of(self.builder.icmp_unsigned(">", self.value, self._operand(other)))

    def __and__(self, other: Any) -> Vector:
        return self._of(self.builder.and_(self.value, self._operand(other)))

    def __or__(self, other: Any) -> Vector:
        return self._of(self.builder.or_(self.value, self._operand(other)))

    def __invert__(self) -> Vector:
        return self._of(self.builder.not_(self.value))

    def __lshift__(self, bits: int) -> Vector:
        return self._of(self.builder.shl(self.value, self._operand(bits)))

    def __rshift__(self, bits: int) -> Vector:
        return self._of(self.builder.lshr(self.value, self._operand(bits)))

    def choose(self, yes: Any, no: Any) -> Vector:
        """For a vector of truth values: lanes of `yes` where true, else of `no`, one of which is a vector."""
        like = yes if isinstance(yes, Vector) else no
        return self._of(self.builder.select(self.value, like._operand(yes), like._operand(no)))

    def _call(self, name: str, *others: Vector) -> Vector:
        return self._of(_called(self.builder, name, self.value.type, [self.value, *(o.value for o in others)]))

    def sqrt(self) -> Vector:
        """Of floats, correctly rounded."""
        return self._call("llvm.sqrt.v16f32")

    def times_plus(self, factor: Vector, addend: Vector) -> Vector:
        """self * factor + addend of floats, rounded once."""
        return self._call("llvm.fma.v16f32", factor, addend)

    def truncated(self) -> Vector:
        """Floats towards zero, as 32-bit integers; anything where they do not fit."""
        return self._of(self.builder.fptosi(self.value, _vector(INT)))

    def as_float(self) -> Vector:
        """32-bit integers as floats."""
        return self._of(self.builder.sitofp(self.value, _vector(FLOAT)))

    def reinterpreted(self, kind: Any) -> Vector:
        """The same bits as lanes of another type of the same width."""
        return self._of(self.builder.bitcast(self.value, _vector(kind)))

    def widened(self, kind: Any) -> Vector:
        """Unsigned integers or floats as a wider type."""
        extend = self.builder.fpext if self._floating else self.builder.zext
        return self._of(extend(self.value, _vector(kind)))

    def narrowed(self, kind: Any) -> Vector:
        """Integers cut off, or floats rounded to nearest even."""
        cut = self.builder.fptrunc if self._floating else self.builder.trunc
        return self._of(cut(self.value, _vector(kind)))


def spread(builder: Any, scalar: Any) -> Vector:
    """All lanes equal to a value of the kernel."""
    nothing = ir.Constant(_vector(scalar.type), ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(INT, 0))
    return Vector(builder, builder.shuffle_vector(first, nothing, ir.Constant(_vector(INT), [0] * LANES)))


class Row:
    """A one-dimensional contiguous array of the kernel, read and written 16 elements at a time."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any, element: Any) -> None:
        self.builder, self.element = builder, element
        self._data = make_array(kind)(context, builder, value).data
        self._wide = "+avx512f" in context.codegen().magic_tuple()[2].split(",")

    def _at(self, index: Any) -> Any:
        place = self.builder.gep(self._data, [index], inbounds=True)
        return self.builder.bitcast(place, _vector(self.element).as_pointer())

    def load(self, index: Any, constant: bool = False) -> Vector:
        """Elements index to index + 15; `constant` promises that the kernel writes nowhere near."""
        loaded = self.builder.load(self._at(index))
        loaded.align = 1
        if constant:
            loaded.set_metadata("invariant.load", self.builder.module.add_metadata([]))
        return Vector(self.builder, loaded)

    def spread(self, index: int) -> Vector:
        """All lanes equal to one element, which the kernel does not write."""
        loaded = self.builder.load(self.builder.gep(self._data, [ir.Constant(LONG, index)], inbounds=True))
        loaded.set_metadata("invariant.load", self.builder.module.add_metadata([]))
        return spread(self.builder, loaded)

    def store(self, index: Any, value: Vector) -> None:
        """Writes 16 elements."""
        self.builder.store(value.value, self._at(index)).align = 1

    def gather(self, indices: Vector) -> Vector:
        """Floats at 16 unsigned indices below 2^31, which no kernel writes to while it reads."""
        builder = self.builder
        if self._wide:
            nothing, all_lanes = indices.reinterpreted(FLOAT).filled(0.0).value, ir.Constant(_vector(BIT), [1] * LANES)
            base = builder.bitcast(self._data, BYTE.as_pointer())
            parameters = [nothing, base, indices.value, all_lanes, ir.Constant(INT, FLOAT_BYTES)]
            return Vector(builder, _called(builder, "llvm.x86.avx512.mask.gather.dps.512", _vector(FLOAT), parameters))
        result = ir.Constant(_vector(self.element), ir.Undefined)
        wide = indices.widened(LONG).value
        for lane in range(LANES):
            number = ir.Constant(INT, lane)
            place = builder.gep(self._data, [builder.extract_element(wide, number)], inbounds=True)
            loaded = builder.load(builder.bitcast(place, self.element.as_pointer()))
            loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
            result = builder.insert_element(result, loaded, number)
        return Vector(builder, result)

    def look_up(self, count: int, indices: Vector) -> list[Vector]:
        """Entries of `count` tables, as `tables` lays them out, at the lowest five bits of 16 indices."""
        if self._wide:
            return [self._permuted(ENTRIES * table, indices) for table in range(count)]
        places = ((indices & (ENTRIES - 1)) << ROW_BITS).value
        halves = [self._columns(count, places, lanes) for lanes in (range(8), range(8, LANES))]
        join = ir.Constant(_vector(INT), list(range(LANES)))
        return [Vector(self.builder, self.builder.shuffle_vector(*both, join)) for both in zip(*halves, strict=True)]

    def _permuted(self, first: int, indices: Vector) -> Vector:
        """Entries of the table of 32 floats that begins at `first`."""
        low, high = (self.load(ir.Constant(LONG, first + half), constant=True).value for half in (0, LANES))
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        return Vector(self.builder, _called(self.builder, name, _vector(FLOAT), [low, indices.value, high]))

    def _columns(self, count: int, places: Any, lanes: range) -> list[Any]:
        """For each of `count` tables 8 entries, read as rows of 4 floats and transposed in registers."""
        builder, found = self.builder, []
        kind = ir.VectorType(FLOAT, 4).as_pointer()

        def row(lane: int, first: int) -> Any:
            place = builder.zext(builder.extract_element(places, ir.Constant(INT, lane)), LONG)
            at = builder.gep(
                self._data, [builder.add(place, ir.Constant(LONG, count * ENTRIES + first))], inbounds=True
            )
            loaded = builder.load(builder.bitcast(at, kind))
            loaded.align = FLOAT_BYTES
            loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
            return loaded

        def shuffled(a: Any, b: Any, *order: int) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(order)), order))

        for first in range(0, count, 4):
            # Rows of lanes i and i + 4 side by side, as instructions work on halves of 128 bits.
            rows = [shuffled(row(lanes[i], first), row(lanes[i + 4], first), *range(8)) for i in range(4)]
            for low in (True, False)[: -(-(count - first) // 2)]:
                order = (0, 8, 1, 9, 4, 12, 5, 13) if low else (2, 10, 3, 11, 6, 14, 7, 15)
                pairs = [shuffled(rows[i], rows[i + 1], *order) for i in (0, 2)]
                found.append(shuffled(*pairs, 0, 1, 8, 9, 4, 5, 12, 13))
                found.append(shuffled(*pairs, 2, 3, 10, 11, 6, 7, 14, 15))
        return found[:count]


def size_of(count: int) -> int:
    """How many floats `tables` makes of so many."""
    return ENTRIES * (count + (1 << ROW_BITS))


def tables(columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """Tables of 32 entries, (count, 32), count up to 8, for `Row.look_up`: one after another, then entry by entry."""
    rows = np.zeros((ENTRIES, 1 << ROW_BITS), np.float32)
    rows[:, : len(columns)] = columns.T
    return np.concatenate([columns.reshape(-1), rows.reshape(-1)])


def _called(builder: Any, name: str, result: Any, values: list[Any]) -> Any:
    signature = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), values)
