"""Measure a layer on given inputs: run it and the framework's own, and tally both against the oracle.

Guarantees that every input given is in the tally once, on the side of the turning point where it lies. Must not know
bounds or verdicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invref.formats import Format
from verify import floor
from verify.oracle import FLOAT32, Oracle, Range
from verify.scan import Frame, Tally, tally_up
from verify.targets import Layer, Target

Path = Callable[[Layer, Tensor], tuple[Tensor, Tensor]]
"""`batches.together` or `batches.in_slices`."""

_NONE = FLOAT32.largest_ordinal + 1, FLOAT32.first_ordinal - 1


@dataclass
class Measured:
    """A tally, and what the error floor needs: y's ordinals and f' of every input, one pair of arrays a piece."""

    tally: Tally
    codes: list[NDArray[np.int64]]
    slopes: list[NDArray[np.float64]]

    @property
    def floor(self) -> float:
        """The error floor's maximum over these inputs."""
        floors = [floor.exact(codes, slopes) for codes, slopes in zip(self.codes, self.slopes, strict=True)]
        return float(np.max(floors, initial=0.0))


def frame_of(oracle: Oracle, part: Range, fmt: Format) -> Frame:
    """The kernel's constants for one piece; only float32 outputs count for the decoder error."""
    left, right = oracle.tails
    if fmt is FLOAT32:
        return Frame(part.slope, part.low, part.high, left, right, 0.0, 0.0)
    half = 2.0**-fmt.precision
    return Frame(part.slope, *_NONE, left, right, half, half * 2.0**fmt.emin)


def arrays_of(target: Target, x: Tensor, path: Path) -> tuple[NDArray[np.float32], ...]:
    """x, y, dx and the framework's y and dx as float32 arrays of shape (n,), exactly."""
    tensors = (x, *path(target.layer, x), *path(target.native, x))
    return tuple(tensor.float().numpy() for tensor in tensors)


def measure(target: Target, fmt: Format, oracle: Oracle, x: Tensor, path: Path) -> Measured:
    """Run `target` along `path` on x: finite, sorted, shape (n,), of format `fmt` (16 or 32 bits)."""
    arrays = arrays_of(target, x, path)
    codes = fmt.ordinals(torch.from_numpy(arrays[1]).to(fmt.dtype)).numpy()
    slopes = oracle.derivative(arrays[0])
    measured = Measured(Tally(), [], [])
    cuts = np.searchsorted(FLOAT32.ordinals(torch.from_numpy(arrays[0])).numpy(), [p.first for p in oracle.ranges])
    for part, start, stop in zip(oracle.ranges, cuts, [*cuts[1:], x.numel()], strict=True):
        if start < stop:
            inputs = tuple(array[start:stop] for array in arrays)
            output = oracle.outputs[part.piece.index] if fmt is FLOAT32 else oracle.slopes
            tally_up(inputs, oracle.slopes, output, frame_of(oracle, part, fmt), measured.tally)
            measured.codes.append(codes[start:stop])
            measured.slopes.append(slopes[start:stop])
    return measured
