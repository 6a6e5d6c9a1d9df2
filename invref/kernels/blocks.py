"""What kernels of the CPU share: how they are told what to do, and their way over blocks of 512 elements.

A block of a contiguous tensor is worked on where it lies; those of a strided one, and the last, pass through a buffer.
Must not know what kernels compute, or how they are compiled.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from torch import Tensor

from invref.kernels.sidebits import BLOCK, LANES
from invref.kernels.vectors import DOUBLE, FLOAT, HALF, INT, LONG, WORD, Function, Row, Value
from invref.kernels.vectors import LANES as STEP

# The arguments of every kernel. Those of one run of several say which it is; where their number is 0, OpenMP is asked.
RUN, RUNS, OWN_NUMBER, OWN_COUNT, COUNT, INNER, INNER_STRIDE, OUTER, SHAPE, STRIDES, FIRST_OWN = range(11)

_PLAIN = {FLOAT: INT, DOUBLE: LONG, WORD: WORD, HALF: WORD}
"""As what elements are copied."""
_LOWEST = {FLOAT: float("-inf"), DOUBLE: float("-inf"), WORD: 0xFF80, HALF: float("-inf")}
"""Minus infinity; words are bfloat16."""


def laid_out(x: Tensor, n: int) -> tuple[tuple[int, ...], Any]:
    """The arguments of a kernel from `COUNT` to `STRIDES` for a tensor that is not contiguous, and what they point to.

    That is n, the length and the stride of the last axis, and the number, the shape and the strides of the others.
    """
    axes: list[list[int]] = []
    for length, stride in zip(x.shape, x.stride(), strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1] == length * stride:
            axes[-1] = [axes[-1][0] * length, stride]
        else:
            axes.append([length, stride])
    shape, strides = array("q", [a[0] for a in axes[:-1]]), array("q", [a[1] for a in axes[:-1]])
    places = (shape.buffer_info()[0], strides.buffer_info()[0])
    return (n, *axes[-1], len(axes) - 1, *places), (shape, strides)


Work = Callable[[list[Row], Value, Value], None]
"""(inputs and outputs of a block from its beginning on, its number, its elements) -> None."""


def over_blocks(f: Function, inputs: list[Row], outputs: list[Row], work: Work, padded: bool = False) -> None:
    """Does `work` on the blocks of this run; the first of the inputs may have strides.

    padded: whether minus infinity follows the last element of it, where otherwise anything does.
    """
    origin = f.number(0)
    run, runs = f.buffer(1, LONG), f.buffer(1, LONG)
    run.store(origin, f.argument(RUN))
    runs.store(origin, f.argument(RUNS))
    with f.whenever(f.argument(RUNS).equals(0)):
        run.store(origin, f.asked(OWN_NUMBER))
        runs.store(origin, f.asked(OWN_COUNT))
    own, total, n = run.one(origin), runs.one(origin), f.argument(COUNT)
    blocks = (n + (BLOCK - 1)) // BLOCK
    dense = f.argument(INNER).equals(n) & f.argument(INNER_STRIDE).equals(1)
    rows = [*inputs, *outputs]
    buffers = [f.buffer(BLOCK, row.element) for row in rows]
    with f.stepping(blocks * own // total, blocks * (own + 1) // total) as block:
        start = block * BLOCK
        rest = n - start
        whole = rest > BLOCK - 1
        count = whole.choose(BLOCK, rest)
        with f.whenever(~(whole & dense), likely=False):
            if padded:
                lowest = f.number(_LOWEST[inputs[0].element], inputs[0].element).spread()
                with f.stepping(origin, f.number(BLOCK // STEP)) as group:
                    buffers[0].store(group * STEP, lowest)
            _gather(f, inputs[0], start, count, buffers[0])
        with f.whenever(~whole, likely=False):
            for row, buffer in zip(inputs[1:], buffers[1:], strict=False):
                _copy(f, row, start, f.number(1), buffer, origin, count)
        direct = [whole & dense, *[whole] * (len(rows) - 1)]
        places = zip(direct, rows, buffers, strict=True)
        taken = [f.either(there, row, start, buffer) for there, row, buffer in places]
        work(taken, block, count)
        with f.whenever(~whole, likely=False):
            for row, buffer in zip(outputs, buffers[len(inputs) :], strict=True):
                _copy(f, buffer, origin, f.number(1), row, start, count)


def _copy(f: Function, source: Row, at: Value, stride: Value, target: Row, to: Value, count: Value) -> None:
    """target[to + i] = source[at + i * stride] for i < count."""
    source, target = source.seen_as(_PLAIN[source.element]), target.seen_as(_PLAIN[source.element])
    with f.stepping(f.number(0), count) as i:
        target.store(to + i, source.one(at + i * stride))


def _gather(f: Function, x: Row, start: Value, count: Value, out: Row) -> None:
    """out[i] = element start + i of a strided array, of which x is the storage: rows of its last axis, or parts."""
    inner, stride = f.argument(INNER), f.argument(INNER_STRIDE)
    shape, strides = f.row(SHAPE, LONG), f.row(STRIDES, LONG)
    origin, outer = f.number(0), f.argument(OUTER)
    rest, at = f.buffer(1, LONG), f.buffer(1, LONG)
    length: list[Value] = []
    with f.stepping(origin, count, lambda: length[0]) as done:
        element = start + done
        row = element // inner
        place = element - row * inner
        rest.store(origin, row)
        at.store(origin, place * stride)
        with f.stepping(origin, outer) as i:
            axis = outer - i - 1
            now, size = rest.one(origin), shape.one(axis)
            above = now // size
            at.store(origin, at.one(origin) + (now - above * size) * strides.one(axis))
            rest.store(origin, above)
        left, wanted = inner - place, count - done
        length.append((left < wanted).choose(left, wanted))
        _copy(f, x, at.one(origin), stride, out, done, length[0])


def over_groups(f: Function, count: Value, step: Callable[[Value, Value, Value], None]) -> None:
    """Calls step(element, byte, bit) for each 16 of so many elements of a block, whose bits are those of 16 bytes."""
    with f.stepping(f.number(0), (count + (STEP - 1)) // STEP) as group:
        per_bit = LANES // STEP
        bit = group // per_bit
        step(group * STEP, (group - bit * per_bit) * STEP, bit)
