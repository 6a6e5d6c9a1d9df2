"""One input under the magnifying glass: what `--input BITS` prints, to reproduce a worst case by itself.

Guarantees that truth is the exact reference's, to 30 digits. Must not know bounds or verdicts: it shows numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mpmath
import torch

from invref import formats, pieces, reference
from invref.engines import MPMATH
from invref.errors import InputError
from invref.formats import Format
from verify import batches
from verify.ranges import Edge
from verify.record import WorstInput
from verify.sweep import oracle_of
from verify.targets import Target

DIGITS = 30


def show(target: Target, dtype: str, bits: str) -> list[str]:
    """The lines for the input of format `dtype` with that bit pattern; InputError when `bits` names no finite input."""
    fmt = formats.get(dtype)
    ordinal = _ordinal(fmt, bits)
    x = fmt.tensor(ordinal, 1)
    oracle = oracle_of(target.formula, target.gradient)
    piece = oracle.piece_at(fmt, ordinal)
    at = WorstInput.of(fmt, ordinal, piece)
    truth = _truth(target, at.value)
    # As many copies as fill every vector register, so that the first element goes through vector code.
    outputs = {
        "one long tensor": batches.together(target.layer, x.repeat(batches.VECTOR)),
        "one element": batches.together(target.layer, x),
    }
    lines = [
        f"{target.label} in {dtype} at x = {_both(at.value)}, bits {at.bits}, piece {piece}",
        f"  f'(x)                    {_digits(truth)}",
        *_sides(oracle.edges(fmt), ordinal),
        _error("torch's own gradient", batches.together(target.native, x)[1][0], truth),
    ]
    for name, (y, dx) in outputs.items():
        stored = float(y[0])
        lines += [f"  in {name}: y = {_both(stored)}", _error("gradient", dx[0], truth)]
        exact = _from_output(target, stored, piece)
        if exact is not None:
            lines.append(f"    exact inverse of y     {_digits(exact)}  (stored-value error {_size(exact - truth)})")
            lines.append(f"    decoder error          {_size(mpmath.mpf(float(dx[0])) - exact)}")
    return lines


def _ordinal(fmt: Format, bits: str) -> int:
    try:
        pattern = int(bits, 0)
    except ValueError:
        pattern = -1
    if not 0 <= pattern < 1 << fmt.bits:
        raise InputError(f"{bits!r} is no bit pattern of {fmt.name}: write {fmt.bits // 4} hexadecimal digits after 0x")
    magnitude = pattern & (1 << fmt.bits - 1) - 1
    if magnitude > fmt.largest_ordinal:
        raise InputError(f"{bits} is not a finite {fmt.name}: infinities and NaN have no derivative to compare with")
    return magnitude if magnitude == pattern else -1 - magnitude


def _truth(target: Target, x: float) -> Any:
    """What the gradient should be, to `DIGITS` digits; at a jump, what the branch that owns the input gives."""
    if target.gradient is None:
        return reference.derivative(target.formula, x, DIGITS).value
    with mpmath.workdps(DIGITS + 10):
        return mpmath.mpf(target.gradient.evaluate(mpmath.mpf(x), MPMATH))


def _sides(edges: Iterable[Edge], ordinal: int) -> list[str]:
    """The derivatives on both sides of a jump, where the input lies at one."""
    met = [edge for edge in edges if edge.first <= ordinal < edge.stop]
    return [f"  at a break: any gradient from {edge.least!r} to {edge.largest!r} is right" for edge in met]


def _from_output(target: Target, y: float, piece: int) -> Any:
    """g(max(y, y*), piece); None where y lies outside the piece's range at its other end, as an underflowed 0 does.

    None as well where f is constant on the piece, and where the gradient is not meant to be f'.
    """
    branch = pieces.piece(target.formula, piece)
    if branch.plateau or target.gradient is not None:
        return None
    ends = sorted([branch.left_limit, branch.right_limit])
    turning = [point.y for point in pieces.turning_points(target.formula)]
    nearest = min(max(mpmath.mpf(y), ends[0]), ends[1])
    if nearest in ends and nearest not in turning:
        return None
    return reference.derivative_from_output(target.formula, nearest, piece, DIGITS).value


def _error(name: str, gradient: torch.Tensor, truth: Any) -> str:
    value = float(gradient)
    return f"  {name:<25}{_both(value)}  (error {_size(mpmath.mpf(value) - truth)})"


def _both(value: float) -> str:
    return f"{value!r} = {value.hex()}"


def _digits(number: Any) -> str:
    return str(mpmath.nstr(number, 20))


def _size(number: Any) -> str:
    return str(mpmath.nstr(abs(number), 4))
