"""Measure a layer on given inputs: run it and the framework's own, and tally both against the oracle.

Guarantees that every input given that lies at no jump is in the tally once, in the piece that holds it. Must not know
bounds or verdicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invref.engines import TORCH
from invref.formats import Format
from verify import floor
from verify.lookup import Table, joined
from verify.oracle import CLEARANCE, FLOAT32, Oracle, Range
from verify.ranges import NO_OUTPUT, counting, ranges
from verify.scan import Frame, Tally, tally_up
from verify.targets import Layer, Target

Path = Callable[[Layer, Tensor], tuple[Tensor, Tensor]]
"""`batches.together` or `batches.in_slices`."""

_NO_TABLE = joined([])

WINDOW = 1 << 14
"""So many inputs on each side of a turning point show what happens there: the lowest outputs take 3000 each."""


@dataclass
class Measured:
    """A tally, and what the error floor needs: y's ordinals and f' of every input, one pair of arrays a piece."""

    tally: Tally
    relative: bool
    codes: dict[int, list[NDArray[np.int64]]] = field(default_factory=lambda: defaultdict(list))
    slopes: dict[int, list[NDArray[np.float64]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def floor(self) -> float:
        """The error floor's maximum over these inputs: among those of equal y and side code."""
        floors = [
            floor.exact(np.concatenate(self.codes[side]), np.concatenate(self.slopes[side]), self.relative)
            for side in self.codes
        ]
        return float(np.max(floors, initial=0.0))


def frame_of(oracle: Oracle, part: Range, fmt: Format, target: Target | None = None) -> Frame:
    """The kernel's constants for one piece; only float32 outputs count for the decoder error."""
    left, right = oracle.tails
    half = 2.0**-fmt.precision
    rounding = (0.0, 0.0) if fmt is FLOAT32 else (half, half * 2.0**fmt.emin)
    native = target is not None and target.role == "native"
    counted = counted_outputs(oracle, part, target) if fmt is FLOAT32 and not native else NO_OUTPUT
    frame = Frame(part.slope, oracle.gradient is None, *counted, left, right, *rounding, oracle.relative)
    if target is None:
        return frame
    if target.by_formula and not target.held(fmt.dtype):
        frame = frame._replace(half_ulp=half, least_half_ulp=half * 2.0**fmt.emin, typical=oracle.typical)
    if measures_forward(target):
        frame = frame._replace(ulp=2 * half, least_ulp=2 * half * 2.0**fmt.emin, beyond=2.0 ** (fmt.emax + 1))
    return frame._replace(identical=target.own(fmt.dtype), itself=native and target.layer is target.native)


def counted_outputs(oracle: Oracle, part: Range, target: Target | None) -> tuple[int, int]:
    """Ordinals of the least and the largest y of a piece that count for the decoder error."""
    if target is None or target.role != "row" or part.low > part.high:
        return part.low, part.high
    clearance = clearance_of(target)
    return counting(oracle.formula, part.piece, clearance) if clearance > CLEARANCE else (part.low, part.high)


@lru_cache(maxsize=256)
def clearance_of(target: Target) -> int:
    """How many ulp from a turning value outputs count for the decoder error.

    `CLEARANCE`, or twice what the framework's float32 forward errs by around there if that is more: within that the
    exact inverse of y, which errs by more than the floor, is not what a decoder should give.
    """
    error = 0.0
    for part in ranges(target.formula)[1:]:
        if part.piece.left_end == "turning":
            x = FLOAT32.tensor(part.first - WINDOW, 2 * WINDOW)
            truth = target.formula.evaluate(x.double(), TORCH)
            errors = (target.native(x.to(target.device)).cpu().double() - truth).abs()
            error = max(error, float(errors.max()) / FLOAT32.ulp(float(part.piece.left_limit)))
    return max(CLEARANCE, ceil(2 * error))


def measures_forward(target: Target) -> bool:
    """Whether y is compared with f(x); rows of the catalogue repeat the framework's forward bit for bit instead."""
    return target.role != "row" and target.known


def tables_of(oracle: Oracle, part: Range, fmt: Format, target: Target) -> tuple[Table, Table, Table]:
    """The kernel's tables for one piece: of f', of g (none but in float32) and of f (none where y is not measured)."""
    decoded = fmt is FLOAT32 and part.low <= part.high and target.role != "native"
    outputs = oracle.outputs[part.piece.index] if decoded else _NO_TABLE
    return oracle.slopes, outputs, oracle.values if measures_forward(target) else _NO_TABLE


def arrays_of(target: Target, x: Tensor, path: Path) -> tuple[NDArray[np.float32], ...]:
    """x, y, dx and the framework's y and dx as float32 arrays of shape (n,), exactly."""
    ours = path(target.layer, x)
    theirs = ours if target.native is target.layer else path(target.native, x)
    return tuple(tensor.float().numpy() for tensor in (x, *ours, *theirs))


def side_of(target: Target, piece: int) -> int:
    """The side code of a piece, where the target states one."""
    return target.codes[piece] if target.codes is not None else piece


def measure(target: Target, fmt: Format, oracle: Oracle, x: Tensor, path: Path) -> Measured:
    """Run `target` along `path` on x: finite, sorted, shape (n,), of format `fmt` (16 or 32 bits)."""
    arrays = arrays_of(target, x, path)
    codes = fmt.ordinals(torch.from_numpy(arrays[1]).to(fmt.dtype)).numpy()
    slopes = oracle.derivative(arrays[0])
    if oracle.relative:
        slopes[np.isinf(arrays[1])] = 0.0
    measured = Measured(Tally(), oracle.relative)
    ordinals = FLOAT32.ordinals(torch.from_numpy(arrays[0])).numpy()
    for part in oracle.ranges:
        start, stop = np.searchsorted(ordinals, [part.first, part.stop])
        if start < stop:
            inputs = tuple(array[start:stop] for array in arrays)
            tables = tables_of(oracle, part, fmt, target)
            tally_up(inputs, *tables, frame_of(oracle, part, fmt, target), measured.tally)
            side = side_of(target, part.piece.index)
            measured.codes[side].append(codes[start:stop])
            measured.slopes[side].append(slopes[start:stop])
    return measured
