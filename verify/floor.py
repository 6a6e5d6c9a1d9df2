"""The error floor: half the width of f' over all inputs that share one stored pair (y, side).

No decoder of (y, side) can have a smaller worst error than the floor's maximum. Where errors are relative to
S = max(1, |f'|), values from a to b leave (b - a) / (S(a) + S(b)). Guarantees an exact maximum over the inputs it is
given, whether or not the forward is monotone. Must not know any layer: it is given y and f'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from verify.compiled import compiled

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_BATCH = 64
_MOST_MEETINGS = 1 << 31
"""Pairs of blocks whose outputs may meet: seconds of work. Forwards that are monotone but for rounding have few."""


def exact(codes: Ints, slopes: Floats, relative: bool = False) -> float:
    """Half the widest range of `slopes` (f', any shape (n,)) among equal `codes`; 0 for no input, NaN if any f' is."""
    return half_width(codes, slopes, slopes, relative)


@compiled()
def half(least: float, largest: float, relative: bool) -> float:
    """The floor of the values from `least` to `largest`."""
    scale = max(1.0, abs(least)) + max(1.0, abs(largest)) if relative else 2.0
    return (largest - least) / scale


def half_width(codes: Ints, least: Floats, largest: Floats, relative: bool = False) -> float:
    """As `exact`, for groups of inputs that share one code and have f' between `least` and `largest`."""
    if codes.size == 0:
        return 0.0
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lowest, highest = np.minimum.reduceat(least[order], starts), np.maximum.reduceat(largest[order], starts)
    return float(_halves(lowest, highest, relative).max())


@compiled()
def _halves(least: Floats, largest: Floats, relative: bool) -> Floats:
    result = np.empty(least.size, np.float64)
    for i in range(least.size):
        result[i] = half(least[i], largest[i], relative)
    return result


@dataclass(frozen=True)
class Hulls:
    """Hulls over blocks of consecutive inputs of pieces that share a side code, in any order.

    `first`: int64 (n,), the ordinal of each block's first input; `y`: int32 (n, 2), least and largest ordinal of y;
    `slope`: float64 (n, 2), least and largest f' of the block's inputs.
    """

    first: Ints
    y: NDArray[np.int32]
    slope: Floats


def search(hulls: Hulls, inputs: Callable[[Ints], tuple[Ints, Floats]], relative: bool = False) -> float:
    """The floor's maximum over all inputs of the blocks, by branch and bound.

    A block's inputs share codes only with blocks whose range of y meets its own, so the hull of f' over those bounds
    its floor from above. Blocks are taken in descending order of that bound, and their codes grouped exactly
    from their own inputs and those of every block they meet (`inputs`: first ordinals of blocks -> codes and f'
    of all their inputs), until no bound exceeds the best floor found. NaN where f' is, and where the forward is so far
    from monotone that too many blocks meet.
    """
    if not np.isfinite(hulls.slope).all():
        return nan
    single = hulls.y[:, 0] == hulls.y[:, 1]
    # A run of inputs with one code (every input left of the last nonzero output, say) counts as one block: its hull
    # is already exact, and without this each of its blocks would meet all the others.
    codes, least, largest = _merge(hulls.y[single, 0], hulls.slope[single])
    rest = ~single
    low = np.concatenate([codes, hulls.y[rest, 0]]).astype(np.int64)
    high = np.concatenate([codes, hulls.y[rest, 1]]).astype(np.int64)
    below = np.concatenate([least, hulls.slope[rest, 0]]).astype(np.float64)
    above = np.concatenate([largest, hulls.slope[rest, 1]]).astype(np.float64)
    first = np.concatenate([np.full(codes.size, _MERGED), hulls.first[rest]])

    order = np.argsort(low, kind="stable")
    low, high, first, below, above = low[order], high[order], first[order], below[order], above[order]
    start = np.searchsorted(np.maximum.accumulate(high), low, "left")
    stop = np.searchsorted(low, high, "right")
    if (stop - start).sum() > _MOST_MEETINGS:
        return nan
    bound = _bounds(low, high, below, above, start, stop, relative)

    merged = first == _MERGED
    best = float(_halves(below[merged], above[merged], relative).max(initial=0.0))
    queue = np.argsort(-bound, kind="stable")
    for taken in range(0, queue.size, _BATCH):
        batch = [i for i in queue[taken : taken + _BATCH] if bound[i] > best]
        if not batch:
            break
        ranges = [np.arange(start[i], stop[i]) for i in batch]
        met = np.unique(np.concatenate([near[high[near] >= low[i]] for i, near in zip(batch, ranges, strict=True)]))
        fixed = met[merged[met]]
        codes, slopes = inputs(np.sort(first[met[~merged[met]]]))
        group = half_width(np.r_[codes, low[fixed]], np.r_[slopes, below[fixed]], np.r_[slopes, above[fixed]], relative)
        best = group if not group <= best else best
    return best


_MERGED = np.iinfo(np.int64).min


def _merge(codes: NDArray[np.int32], slope: Floats) -> tuple[Ints, Floats, Floats]:
    """One entry for each code among blocks with a single code: the code, its least and its largest f'."""
    found, inverse = np.unique(codes, return_inverse=True)
    least, largest = np.full(found.size, np.inf), np.full(found.size, -np.inf)
    np.minimum.at(least, inverse, slope[:, 0])
    np.maximum.at(largest, inverse, slope[:, 1])
    return found.astype(np.int64), least, largest


@compiled()
def _bounds(low: Ints, high: Ints, below: Floats, above: Floats, start: Ints, stop: Ints, relative: bool) -> Floats:
    """Half the hull of f' over all blocks that meet each block."""
    bound = np.empty(low.size, np.float64)
    for i in range(low.size):
        least, largest = below[i], above[i]
        for j in range(start[i], stop[i]):
            if high[j] >= low[i]:
                least = min(least, below[j])
                largest = max(largest, above[j])
        bound[i] = half(least, largest, relative)
    return bound
