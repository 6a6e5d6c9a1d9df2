"""Kernels as C functions, written in LLVM's language: numbers and vectors of 16 with Python's operators, and loops.

Left to itself a compiler finds no table look-ups in a loop, and uses no 512-bit registers. Here a kernel's inner step
is spelled out on 16 lanes, with every operation an IEEE one and every fused multiply-add explicit: the same bits on
every processor, for every element at every position. Where the processor has AVX-512, tables of 32 floats are looked up
in registers, elsewhere an entry of all tables is loaded at once. Must not know decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
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


class Value:
    """A number, or 16 lanes of one type, with Python's operators; Python numbers on the right are of the same type."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _of(self, value: Any) -> Value:
        return Value(self.builder, value)

    def filled(self, number: Any) -> Value:
        """A Python number of this type, in all lanes."""
        kind = self.value.type
        if not isinstance(kind, ir.VectorType):
            return self._of(ir.Constant(kind, number))
        return self._of(ir.Constant(kind, [ir.Constant(kind.element, number)] * LANES))

    def _operand(self, other: Any) -> Any:
        return (other if isinstance(other, Value) else self.filled(other)).value

    @property
    def _element(self) -> Any:
        kind = self.value.type
        return kind.element if isinstance(kind, ir.VectorType) else kind

    def _like(self, kind: Any) -> Any:
        return _vector(kind) if isinstance(self.value.type, ir.VectorType) else kind

    @property
    def _floating(self) -> bool:
        return isinstance(self._element, ir.HalfType | ir.FloatType | ir.DoubleType)

    def __add__(self, other: Any) -> Value:
        add = self.builder.fadd if self._floating else self.builder.add
        return self._of(add(self.value, self._operand(other)))

    def __sub__(self, other: Any) -> Value:
        subtract = self.builder.fsub if self._floating else self.builder.sub
        return self._of(subtract(self.value, self._operand(other)))

    def __mul__(self, other: Any) -> Value:
        multiply = self.builder.fmul if self._floating else self.builder.mul
        return self._of(multiply(self.value, self._operand(other)))

    def __floordiv__(self, other: Any) -> Value:
        return self._of(self.builder.udiv(self.value, self._operand(other)))

    def __neg__(self) -> Value:
        return self.filled(-0.0) - self

    def __lt__(self, other: Any) -> Value:
        compare = self.builder.fcmp_ordered if self._floating else self.builder.icmp_unsigned
        return self._of(compare("<", self.value, self._operand(other)))

    def __gt__(self, other: Any) -> Value:
        compare = self.builder.fcmp_ordered if self._floating else self.builder.icmp_unsigned
        return self._of(compare(">", self.value, self._operand(other)))

    def equals(self, other: Any) -> Value:
        """Whether numbers are equal, which NaN is to none."""
        compare = self.builder.fcmp_ordered if self._floating else self.builder.icmp_unsigned
        return self._of(compare("==", self.value, self._operand(other)))

    def is_negative(self) -> Value:
        """Of integers, whether their highest bit is set."""
        return self._of(self.builder.icmp_signed("<", self.value, self._operand(0)))

    def __and__(self, other: Any) -> Value:
        return self._of(self.builder.and_(self.value, self._operand(other)))

    def __or__(self, other: Any) -> Value:
        return self._of(self.builder.or_(self.value, self._operand(other)))

    def __xor__(self, other: Any) -> Value:
        return self._of(self.builder.xor(self.value, self._operand(other)))

    def __invert__(self) -> Value:
        return self._of(self.builder.not_(self.value))

    def __lshift__(self, bits: Any) -> Value:
        return self._of(self.builder.shl(self.value, self._operand(bits)))

    def __rshift__(self, bits: Any) -> Value:
        return self._of(self.builder.lshr(self.value, self._operand(bits)))

    def choose(self, yes: Any, no: Any) -> Value:
        """For truth values: `yes` where true, else `no`, one of which is no Python number."""
        like = yes if isinstance(yes, Value) else no
        return self._of(self.builder.select(self.value, like._operand(yes), like._operand(no)))

    def any(self) -> Value:
        """Whether any of 16 truth values is true."""
        return self._of(self.builder.bitcast(self.value, WORD)) > 0

    def spread(self) -> Value:
        """A number in all lanes."""
        nothing = ir.Constant(_vector(self.value.type), ir.Undefined)
        first = self.builder.insert_element(nothing, self.value, ir.Constant(INT, 0))
        zeros = ir.Constant(_vector(INT), [0] * LANES)
        return self._of(self.builder.shuffle_vector(first, nothing, zeros))

    def _call(self, name: str, *others: Value) -> Value:
        return self._of(_called(self.builder, name, self.value.type, [self.value, *(o.value for o in others)]))

    def sqrt(self) -> Value:
        """Of 16 floats, correctly rounded."""
        return self._call("llvm.sqrt.v16f32")

    def times_plus(self, factor: Value, addend: Value) -> Value:
        """self * factor + addend of 16 floats, rounded once."""
        return self._call("llvm.fma.v16f32", factor, addend)

    def truncated(self) -> Value:
        """Floats towards zero, as 32-bit integers; any one where they do not fit."""
        return self._of(_frozen(self.builder, self.builder.fptosi(self.value, self._like(INT))))

    def as_float(self) -> Value:
        """32-bit integers as floats."""
        return self._of(self.builder.sitofp(self.value, self._like(FLOAT)))

    def reinterpreted(self, kind: Any) -> Value:
        """The same bits as numbers of another type of the same width."""
        return self._of(self.builder.bitcast(self.value, self._like(kind)))

    def widened(self, kind: Any) -> Value:
        """Unsigned integers or floats as a wider type."""
        extend = self.builder.fpext if self._floating else self.builder.zext
        return self._of(extend(self.value, self._like(kind)))

    def narrowed(self, kind: Any) -> Value:
        """Integers cut off, or floats rounded to nearest even."""
        cut = self.builder.fptrunc if self._floating else self.builder.trunc
        return self._of(cut(self.value, self._like(kind)))


class Row:
    """Numbers one after another in memory, read and written 16 at a time."""

    def __init__(self, builder: Any, address: Any, element: Any, wide: bool) -> None:
        self.builder, self.element = builder, element
        self._address, self._wide = address, wide

    def seen_as(self, element: Any) -> Row:
        """The same memory as numbers of another type of the same width."""
        return Row(self.builder, self._address, element, self._wide)

    def at(self, index: Value) -> Any:
        """The address of an element."""
        return self.builder.gep(self._address, [index.value], source_etype=self.element)

    def _constant(self, value: Any) -> Value:
        value.set_metadata("invariant.load", self.builder.module.add_metadata([]))
        return Value(self.builder, value)

    def load(self, index: Value) -> Value:
        """Elements index to index + 15."""
        loaded = self.builder.load(self.at(index), typ=_vector(self.element))
        loaded.align = 1
        return Value(self.builder, loaded)

    def one(self, index: Value) -> Value:
        """One element."""
        return Value(self.builder, self.builder.load(self.at(index), typ=self.element))

    def spread(self, index: int) -> Value:
        """One element, which the kernel does not write, in all lanes."""
        place = self.at(Value(self.builder, ir.Constant(LONG, index)))
        return self._constant(self.builder.load(place, typ=self.element)).spread()

    def store(self, index: Value, value: Value) -> None:
        """Writes one element, or 16."""
        place = self.builder.store(value.value, self.at(index))
        if isinstance(value.value.type, ir.VectorType):
            place.align = 1

    def gather(self, indices: Value) -> Value:
        """Floats at 16 unsigned indices below 2^31, which no kernel writes to while it reads."""
        builder = self.builder
        if self._wide:
            nothing, all_lanes = indices.reinterpreted(FLOAT).filled(0.0).value, ir.Constant(_vector(BIT), [1] * LANES)
            parameters = [nothing, self._address, indices.value, all_lanes, ir.Constant(INT, FLOAT_BYTES)]
            return Value(builder, _called(builder, "llvm.x86.avx512.mask.gather.dps.512", _vector(FLOAT), parameters))
        result = ir.Constant(_vector(self.element), ir.Undefined)
        wide = indices.widened(LONG).value
        for lane in range(LANES):
            number = ir.Constant(INT, lane)
            place = self.at(Value(builder, builder.extract_element(wide, number)))
            loaded = self._constant(builder.load(place, typ=self.element))
            result = builder.insert_element(result, loaded.value, number)
        return Value(builder, result)

    def look_up(self, count: int, indices: Value) -> list[Value]:
        """Entries of `count` tables, as `tables` lays them out, at the lowest five bits of 16 indices."""
        if self._wide:
            return [self._permuted(ENTRIES * table, indices) for table in range(count)]
        places = ((indices & (ENTRIES - 1)) << ROW_BITS).value
        halves = [self._columns(count, places, lanes) for lanes in (range(8), range(8, LANES))]
        join = ir.Constant(_vector(INT), list(range(LANES)))
        return [Value(self.builder, self.builder.shuffle_vector(*both, join)) for both in zip(*halves, strict=True)]

    def _permuted(self, first: int, indices: Value) -> Value:
        """Entries of the table of 32 floats that begins at `first`."""
        places = (Value(self.builder, ir.Constant(LONG, first + half)) for half in (0, LANES))
        low, high = (self.load(place).value for place in places)
        for half in (low, high):
            self._constant(half)
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        return Value(self.builder, _called(self.builder, name, _vector(FLOAT), [low, indices.value, high]))

    def _columns(self, count: int, places: Any, lanes: range) -> list[Any]:
        """For each of `count` tables 8 entries, read as rows of 4 floats and transposed in registers."""
        builder, found = self.builder, []

        def row(lane: int, first: int) -> Any:
            place = builder.zext(builder.extract_element(places, ir.Constant(INT, lane)), LONG)
            at = self.at(Value(builder, place) + count * ENTRIES + first)
            loaded = builder.load(at, typ=ir.VectorType(FLOAT, 4))
            loaded.align = FLOAT_BYTES
            return self._constant(loaded).value

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


class Function:
    """A C function that is being written: its one parameter is the address of its arguments, 64 bits each."""

    def __init__(self, wide: bool) -> None:
        """wide: whether the processor has AVX-512."""
        self.module, self.wide = ir.Module(), wide
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [ir.PointerType()]), NAME)
        self.builder = ir.IRBuilder(function.append_basic_block())
        self._arguments = Row(self.builder, function.args[0], LONG, wide)

    def finished(self) -> str:
        """The text of the whole."""
        self.builder.ret_void()
        return str(self.module)

    def number(self, value: float, kind: Any = LONG) -> Value:
        """A number of a type; without one a 64-bit integer."""
        return Value(self.builder, ir.Constant(kind, value))

    def argument(self, index: int) -> Value:
        """An argument, which is a 64-bit integer."""
        return self._arguments.one(self.number(index))

    def row(self, index: int, element: Any) -> Row:
        """Numbers of which an argument is the address."""
        return Row(self.builder, self._pointer(self.argument(index)), element, self.wide)

    def buffer(self, count: int, element: Any) -> Row:
        """Room for numbers while the function runs; what lies there first is anything."""
        with self.builder.goto_entry_block():
            room = self.builder.alloca(element, count)
        # To llvmlite what `alloca` gives is a pointer to this type alone.
        room.type = ir.PointerType()
        return Row(self.builder, room, element, self.wide)

    def either(self, condition: Value, yes: Row, index: Value, no: Row) -> Row:
        """The numbers of one row from an index on, or another row."""
        address = self.builder.select(condition.value, yes.at(index), no._address)
        return Row(self.builder, address, yes.element, self.wide)

    def asked(self, index: int) -> Value:
        """What a C function without parameters says, of which an argument is the address: an int, widened."""
        kind = ir.PointerType(ir.FunctionType(INT, []))
        function = self.builder.inttoptr(self.argument(index).value, kind)
        return Value(self.builder, self.builder.call(function, [])).widened(LONG)

    def _pointer(self, address: Value) -> Any:
        return self.builder.inttoptr(address.value, ir.PointerType())

    @contextmanager
    def whenever(self, condition: Value, likely: bool | None = None) -> Iterator[None]:
        """What follows is done where the condition holds."""
        with self.builder.if_then(condition.value, likely):
            yield

    @contextmanager
    def stepping(self, start: Value, stop: Value, step: Callable[[], Value] | None = None) -> Iterator[Value]:
        """What follows is done again and again for an index from start on, below stop, in steps of 1, or of `step`.

        `step` is asked at the end of each round.
        """
        builder = self.builder
        index = self.buffer(1, LONG)
        head, body, after = (builder.append_basic_block() for _ in range(3))
        index.store(self.number(0), start)
        builder.branch(head)
        builder.position_at_end(head)
        builder.cbranch((index.one(self.number(0)) < stop).value, body, after)
        builder.position_at_end(body)
        now = index.one(self.number(0))
        yield now
        index.store(self.number(0), now + (step() if step else 1))
        builder.branch(head)
        builder.position_at_end(after)


NAME = "kernel"
"""Every function is the only one of its module."""


def size_of(count: int) -> int:
    """How many floats `tables` makes of so many."""
    return ENTRIES * (count + (1 << ROW_BITS))


def tables(columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """Tables of 32 entries, (count, 32), count up to 8, for `Row.look_up`: one after another, then entry by entry."""
    rows = np.zeros((ENTRIES, 1 << ROW_BITS), np.float32)
    rows[:, : len(columns)] = columns.T
    return np.concatenate([columns.reshape(-1), rows.reshape(-1)])


def _frozen(builder: Any, value: Any) -> Any:
    """A number in any case: to LLVM a float out of range is none as an integer, and an address from it anything."""
    frozen = ir.instructions.Instruction(builder.block, value.type, "freeze", [value])
    # What every other instruction is added by; there is no method for this one.
    builder._insert(frozen)
    return frozen


def _called(builder: Any, name: str, result: Any, values: list[Any]) -> Any:
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [value.type for value in values]), name)
    return builder.call(function, values)
