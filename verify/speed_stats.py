"""What many timings of the same things say: medians with 20/80 percentiles, of times and of pairs.

Guarantees that a quotient or a difference is taken within a pair, between samples of one round, before any median:
what disturbs a whole round cancels. Must not know what was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
PERCENTILES = (20, 50, 80)


@dataclass(frozen=True)
class Spread:
    """The 20th percentile, the median and the 80th percentile of a sample."""

    low: float
    middle: float
    high: float

    def to_json(self) -> list[float]:
        """The three numbers."""
        return [self.low, self.middle, self.high]


def spread(values: Sequence[float] | Floats) -> Spread:
    """The percentiles of at least one finite value, interpolated linearly; ValueError otherwise."""
    array = np.asarray(values, np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"no percentiles of {array.size} values that are not all finite")
    return Spread(*np.percentile(array, PERCENTILES).tolist())


def ratio(ours: Sequence[float] | Floats, theirs: Sequence[float] | Floats) -> Spread:
    """The spread of ours / theirs over the rounds; both (rounds,)."""
    return spread(_paired(ours, theirs, np.divide))


def difference(ours: Sequence[float] | Floats, theirs: Sequence[float] | Floats) -> Spread:
    """The spread of ours - theirs over the rounds; both (rounds,)."""
    return spread(_paired(ours, theirs, np.subtract))


def _paired(ours: Sequence[float] | Floats, theirs: Sequence[float] | Floats, operation: np.ufunc) -> Floats:
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} samples cannot be paired with {b.size}")
    result: Floats = operation(a, b)
    return result
