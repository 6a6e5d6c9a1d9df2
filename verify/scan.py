"""The inner loop of the sweep: compare a chunk of gradients with the truth and keep what is worst.

Guarantees that NaN wins every comparison (non-negative floats are compared as integers, where NaN is the largest), so
that it always reaches the tally. Must not know formats, layers or bounds: it takes float32 arrays and plain numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from verify.compiled import compiled
from verify.lookup import Table, evaluate
from verify.oracle import TAIL

BLOCK = 1024
"""Consecutive inputs whose outputs and slopes share one hull: what the error floor's search starts from."""

(GRADIENT, BEYOND_ROUNDING, NATIVE, DECODER, BEYOND_STORED) = range(5)
(ZERO_TAIL, WRONG_SIGN, ONE_TAIL, FORWARD_ULPS, NATIVE_ULPS) = range(5, 10)
(NONFINITE, NATIVE_NONFINITE, FORWARD, DIFFERENT, OVERFLOWED, OVERFLOWED_BADLY) = range(6)
_INFINITE = 0x7FF0000000000000
_RECIPROCAL = 0x7FE0000000000000
NOWHERE = np.iinfo(np.int64).min
_NO_HULL_Y = np.empty((0, 2), np.int32)
_NO_HULL_SLOPE = np.empty((0, 2), np.float64)


class Frame(NamedTuple):
    """What the kernel must know of the inputs it is given, all of one monotone piece.

    `slope` is the sign of f' there, 0 where f is constant, and counts only if `signed`; y of ordinals low ≤ o ≤ high
    count for the decoder error; x < left and x > right are tails, where f' is within `tail` of 0 or 1; half an ulp of a
    gradient in [2^e, 2^(e+1)) is `half_ulp` 2^e, at least `least_half_ulp` (with 0 for `half_ulp` there is no
    BEYOND_ROUNDING), which is divided by max(`typical`, |f'|) instead where `typical` is not 0. With `relative`, errors
    are divided by max(1, |f'|), and inputs with an infinite y are no part of them. With `identical`, gradients are
    compared with the framework's bit for bit. An ulp of an output in [2^e, 2^(e+1)) is `ulp` 2^e, at least `least_ulp`,
    and ±infinity counts as ±`beyond` (with 0 for `ulp` the forward is not measured). With `itself`, the layer is the
    framework's own and need not be compared with that.
    """

    slope: float
    signed: bool
    low: int
    high: int
    left: float
    right: float
    half_ulp: float
    least_half_ulp: float
    relative: bool = False
    identical: bool = False
    ulp: float = 0.0
    least_ulp: float = 0.0
    beyond: float = 0.0
    itself: bool = False
    tail: float = TAIL
    typical: float = 0.0


@dataclass
class Tally:
    """Worst errors and where (float32 ordinals), counts and where first, and the hulls of every block.

    `worst[GRADIENT]` is the largest |dx - f'|, BEYOND_ROUNDING that less half an ulp of dx, NATIVE the framework's own,
    DECODER |dx - g(y, s)|, BEYOND_STORED |dx - f'| - |g(y, s) - f'|, ZERO_TAIL |dx| where f' is nearly 0 in a tail,
    WRONG_SIGN how far dx lies on the wrong side of 0 there, ONE_TAIL |dx - f'| where f' is nearly 1 in a tail,
    FORWARD_ULPS |y - f| in ulps of f, NATIVE_ULPS the framework's own. `counts` are inputs with non-finite gradients,
    the framework's, outputs that differ from the framework's, gradients that do; inputs that overflow where f' has no
    bound, and those of them whose gradient is neither finite nor the framework's.
    """

    inputs: int = 0
    worst: NDArray[np.float64] = field(default_factory=lambda: np.zeros(10))
    worst_at: NDArray[np.int64] = field(default_factory=lambda: np.full(10, NOWHERE))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(6, np.int64))
    counts_at: NDArray[np.int64] = field(default_factory=lambda: np.full(6, NOWHERE))

    def add(self, other: Tally) -> None:
        """Takes in another tally; NaN stays the worst, the first of equals stays."""
        more = other.worst.view(np.int64) > self.worst.view(np.int64)
        self.worst[more], self.worst_at[more] = other.worst[more], other.worst_at[more]
        new = self.counts == 0
        self.counts_at[new] = other.counts_at[new]
        self.counts += other.counts
        self.inputs += other.inputs


@compiled()
def _ordinal(pattern: int) -> int:
    return pattern ^ ((pattern >> 31) & 0x7FFFFFFF)


@compiled()
def _keep(errors: Any, n: int, x: Any, slot: int, worst: Any, where: Any) -> int:
    """Compares the non-negative `errors` as integers with the worst so far; returns the largest, as an integer."""
    patterns = errors.view(np.int64)
    top = patterns[0]
    for i in range(n):
        top = max(top, patterns[i])
    if top > worst.view(np.int64)[slot]:
        for i in range(n):
            if patterns[i] == top:
                worst[slot] = errors[i]
                where[slot] = _ordinal(x[i])
                break
    return int(top)


@compiled()
def _count(flags: Any, n: int, x: Any, slot: int, counts: Any, where: Any) -> None:
    for i in range(n):
        if flags[i]:
            if not counts[slot]:
                where[slot] = _ordinal(x[i])
            counts[slot] += 1


@compiled()
def _hull(ybits: Any, slopes: Any, n: int, hull_y: Any, hull_slope: Any) -> None:
    """Least and largest ordinal of y, and least and largest f' (NaN if any is), of a block."""
    low = high = _ordinal(ybits[0])
    for i in range(n):
        ordinal = np.int32(_ordinal(ybits[i]))
        low = min(low, ordinal)
        high = max(high, ordinal)
    hull_y[0], hull_y[1] = low, high
    patterns = slopes.view(np.int64)
    least = largest = patterns[0] ^ ((patterns[0] >> 63) & 0x7FFFFFFFFFFFFFFF)
    for i in range(n):
        ordered = patterns[i] ^ ((patterns[i] >> 63) & 0x7FFFFFFFFFFFFFFF)
        least = min(least, ordered)
        largest = max(largest, ordered)
    ends = np.array([least, largest])
    for k in range(2):
        ends[k] ^= (ends[k] >> 63) & 0x7FFFFFFFFFFFFFFF
    hull_slope[:] = ends.view(np.float64)


@compiled()
def _ulps(outputs: Any, truth: Any, n: int, frame: Frame, unit: Any, part: Any) -> None:
    """|y - f| in ulps of f to `part`; NaN where y is. `unit` is float64 room for `n` numbers."""
    patterns, units = truth.view(np.int64), unit.view(np.int64)
    beyond, scale, largest = frame.beyond, 1.0 / frame.ulp, 1.0 / frame.least_ulp
    for i in range(n):
        # The reciprocal of the power of two not above |f|.
        units[i] = _RECIPROCAL - (patterns[i] & _INFINITE)
    for i in range(n):
        per_ulp = unit[i] * scale
        per_ulp = largest if per_ulp > largest else per_ulp
        y = float(outputs[i])
        y = beyond if y > beyond else y
        y = -beyond if y < -beyond else y
        part[i] = abs(y - truth[i]) * per_ulp


@compiled()
def scan(
    arrays: tuple[Any, ...],
    derivative: Table,
    output: Table,
    forward: Table,
    frame: Frame,
    worst: Any,
    worst_at: Any,
    counts: Any,
    counts_at: Any,
    hull_y: Any,
    hull_slope: Any,
) -> None:
    """Tally the float32 arrays (x, y, dx, native y, native dx); the hulls are those of whole blocks of `BLOCK` inputs.

    `hull_y` (int32 ordinals) and `hull_slope` (float64), shape (blocks, 2), receive (least, largest) of y and of f'.
    """
    x, y, dx, native_y, native_dx = arrays
    slopes = np.empty(BLOCK, np.float64)
    decoded = np.empty(BLOCK, np.float64)
    error = np.empty(BLOCK, np.float64)
    scale = np.ones(BLOCK, np.float64)
    unit = np.empty(BLOCK, np.float64)
    part = np.empty(BLOCK, np.float64)
    binade = np.empty(BLOCK, np.int32)
    power = binade.view(np.float32)
    ends_y = np.empty(2, np.int32)
    ends = np.empty(2, np.float64)
    for block in range((x.size + BLOCK - 1) // BLOCK):
        start = block * BLOCK
        n = min(BLOCK, x.size - start)
        xs, ys, dxs = x[start : start + n], y[start : start + n], dx[start : start + n]
        natives = native_dx[start : start + n]
        xbits, ybits, dxbits = xs.view(np.int32), ys.view(np.int32), dxs.view(np.int32)
        expected = native_y[start : start + n].view(np.int32)
        evaluate(derivative, xs, slopes)
        overflow = False
        for i in range(n if frame.relative else 0):
            overflow |= np.isinf(ys[i])
        if overflow:
            dxs, natives = dxs.copy(), natives.copy()
            for i in range(n):
                if np.isinf(ys[i]):
                    if not counts[OVERFLOWED]:
                        counts_at[OVERFLOWED] = _ordinal(xbits[i])
                    counts[OVERFLOWED] += 1
                    if not (np.isfinite(dxs[i]) | (dxs[i] == natives[i])):
                        if not counts[OVERFLOWED_BADLY]:
                            counts_at[OVERFLOWED_BADLY] = _ordinal(xbits[i])
                        counts[OVERFLOWED_BADLY] += 1
                    slopes[i] = 0.0
                    dxs[i] = 0.0
                    natives[i] = 0.0
            dxbits = dxs.view(np.int32)
        for i in range(n if frame.relative else 0):
            size = abs(slopes[i])
            scale[i] = 1.0 if size < 1.0 else size
        _hull(ybits, slopes, n, ends_y, ends)
        if block < hull_y.shape[0]:
            hull_y[block] = ends_y
            hull_slope[block] = ends

        for i in range(n):
            error[i] = abs(dxs[i] - slopes[i])
        if frame.relative:
            for i in range(n):
                error[i] /= scale[i]
        if _keep(error, n, xbits, GRADIENT, worst, worst_at) >= _INFINITE:
            _count(~np.isfinite(dxs), n, xbits, NONFINITE, counts, counts_at)
        if frame.half_ulp:
            for i in range(n):
                binade[i] = dxbits[i] & 0x7F800000
            for i in range(n):
                half = power[i] * frame.half_ulp
                half = frame.least_half_ulp if half < frame.least_half_ulp else half
                half = half / scale[i] if frame.relative else half
                beyond = error[i] - half
                if frame.typical:
                    size = abs(slopes[i])
                    beyond *= scale[i] / (frame.typical if size < frame.typical else size)
                part[i] = abs(0.0 if beyond < 0.0 else beyond)
            _keep(part, n, xbits, BEYOND_ROUNDING, worst, worst_at)

        unequal = np.int32(0)
        for i in range(0 if frame.itself else n):
            unequal |= ybits[i] ^ expected[i]
        if unequal:
            _count(ybits != expected, n, xbits, FORWARD, counts, counts_at)

        bad = 0
        for i in range(n):
            distance = abs(natives[i] - slopes[i])
            distance = distance / scale[i] if frame.relative else distance
            finite = distance < np.inf
            bad += not finite
            part[i] = distance if finite else 0.0
        _keep(part, n, xbits, NATIVE, worst, worst_at)
        if bad:
            _count(~np.isfinite(natives), n, xbits, NATIVE_NONFINITE, counts, counts_at)

        if frame.identical:
            unequal = np.int32(0)
            theirs = native_dx[start : start + n].view(np.int32)
            ours = dx[start : start + n].view(np.int32)
            for i in range(n):
                unequal |= ours[i] ^ theirs[i]
            if unequal:
                both = np.isnan(dx[start : start + n]) & np.isnan(native_dx[start : start + n])
                _count((ours != theirs) & ~both, n, xbits, DIFFERENT, counts, counts_at)

        if frame.ulp:
            evaluate(forward, xs, decoded)
            for i in range(n):
                f = decoded[i]
                f = frame.beyond if f > frame.beyond else f
                decoded[i] = -frame.beyond if f < -frame.beyond else f
            _ulps(ys, decoded, n, frame, unit, part)
            _keep(part, n, xbits, FORWARD_ULPS, worst, worst_at)
            if not frame.itself:
                _ulps(native_y[start : start + n], decoded, n, frame, unit, part)
                for i in range(n):
                    part[i] = part[i] if part[i] < np.inf else 0.0
                _keep(part, n, xbits, NATIVE_ULPS, worst, worst_at)

        if (ends_y[1] >= frame.low) & (ends_y[0] <= frame.high):
            evaluate(output, ys, decoded)
            for i in range(n):
                ordinal = _ordinal(ybits[i])
                counted = (ordinal >= frame.low) & (ordinal <= frame.high)
                part[i] = abs(dxs[i] - decoded[i]) if counted else 0.0
                stored = abs(decoded[i] - slopes[i])
                decoded[i] = stored if counted else np.inf
            if frame.relative:
                for i in range(n):
                    part[i] /= scale[i]
                    decoded[i] /= scale[i]
            for i in range(n):
                beyond = error[i] - decoded[i]
                decoded[i] = abs(0.0 if beyond < 0.0 else beyond)
            _keep(part, n, xbits, DECODER, worst, worst_at)
            _keep(decoded, n, xbits, BEYOND_STORED, worst, worst_at)

        if not ((xs[0] < frame.left) | (xs[n - 1] > frame.right)):
            continue
        if (ends[0] < frame.tail) & (ends[1] > -frame.tail):
            for i in range(n):
                tail = ((xs[i] < frame.left) | (xs[i] > frame.right)) & (abs(slopes[i]) < frame.tail)
                part[i] = abs(dxs[i]) if tail else 0.0
                against = -frame.slope * dxs[i] if frame.slope else abs(dxs[i])
                decoded[i] = abs(0.0 if (against < 0.0) | (not (tail & frame.signed)) else against)
            _keep(part, n, xbits, ZERO_TAIL, worst, worst_at)
            _keep(decoded, n, xbits, WRONG_SIGN, worst, worst_at)
        if (ends[0] < 1.0 + frame.tail) & (ends[1] > 1.0 - frame.tail):
            for i in range(n):
                tail = ((xs[i] < frame.left) | (xs[i] > frame.right)) & (abs(1.0 - slopes[i]) < frame.tail)
                part[i] = error[i] if tail else 0.0
            _keep(part, n, xbits, ONE_TAIL, worst, worst_at)


def tally_up(
    arrays: tuple[NDArray[np.float32], ...],
    derivative: Table,
    output: Table,
    forward: Table,
    frame: Frame,
    tally: Tally,
    hull_y: NDArray[np.int32] = _NO_HULL_Y,
    hull_slope: NDArray[np.float64] = _NO_HULL_SLOPE,
) -> None:
    """`scan` into a `Tally`."""
    scan(
        arrays, derivative, output, forward, frame,
        tally.worst, tally.worst_at, tally.counts, tally.counts_at, hull_y, hull_slope,
    )  # fmt: skip
    tally.inputs += arrays[0].size
