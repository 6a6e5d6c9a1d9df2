"""Polynomials on the bins of one arc: how each octave of d is split, and float32 coefficients for each bin.

An octave [2^e, 2^(e+1)) of distances is split into 2^k equal bins; z in [-1/2, 1/2) is the place inside a bin. Each
bin's polynomial interpolates f' in Chebyshev points of z; k is the least for which all of an octave's bins stay
within the tolerance. Only +, -, * and / of IEEE floats decide the coefficients, so that the same call gives the same
bits on every machine. What is proved of them is proved in `bincertify`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from invref.arcs import BITS, NEGLIGIBLE, OCTAVE, Arc
from invref.bins import TERMS
from invref.engines import precision
from invref.errors import FormulaError

Array = npt.NDArray[np.float64]

TOLERANCE = 2.0**-27
"""Of the interpolation, before its coefficients are rounded: absolute, relative where |f'| > 1."""
ROUNDED = 2.0**-24
"""Of the polynomials with their coefficients rounded to float32, relative where |f'| > 1."""
RELATIVE = 2.0**-12
"""Where f' is tiny the error also stays below this share of it, which keeps its sign."""
MOST_SPLITS = 10
NODES = 16
"""Exact points per stretch of an octave from which all its bins are fitted."""
CHECKS = (-0.49, -0.21, 0.27, 0.47)
SAMPLES = 17


@dataclass(frozen=True)
class Octave:
    """Exponent e, number of splits k, and 2^k rows of float32 coefficients (as float64), ascending powers of z."""

    exponent: int
    splits: int
    rows: Array
    served: int
    """How many of the rows the arc reaches; those beyond repeat its last value."""


@dataclass(frozen=True)
class Stretch:
    """f' over a part of an octave as Newton's interpolation polynomial in t in [-1/2, 1/2]."""

    nodes: Array
    differences: Array

    def __call__(self, t: Array) -> Array:
        """Values at t."""
        value = np.full_like(t, self.differences[-1])
        for node, difference in zip(self.nodes[-2::-1], self.differences[-2::-1], strict=True):
            value = value * (t - node) + difference
        return value


def octaves(arc: Arc) -> list[Octave]:
    """The arc's octaves from the first that the linear start does not serve to the last before the limit."""
    scaffold = arc.scaffold
    first = math.floor(scaffold[1][1] / OCTAVE)
    last, end = _last(arc)
    with precision(BITS, 16):
        return [_octave(arc, e, end) for e in range(first, last + 1)]


def _last(arc: Arc) -> tuple[int, float]:
    """The last octave that needs bins, and the largest distance served."""
    if arc.last is not None:
        end = math.exp(arc.point(arc.last)[1])
        return math.floor(math.log2(end)), end
    top = arc.scaffold[-1][1]
    allowed, reached = NEGLIGIBLE * max(1.0, abs(arc.limit)), top
    for _, logarithm, _, slope in reversed(arc.scaffold):
        if not abs(slope - arc.limit) <= allowed or math.isinf(arc.limit):
            break
        reached = logarithm
    return min(math.floor(reached / OCTAVE), 127), math.exp(min(top, 128 * OCTAVE))


def _octave(arc: Arc, e: int, end: float) -> Octave:
    share = min(end / 2.0**e - 1, 1.0)
    finest, stretches = _stretches(arc, e, share)
    g = np.concatenate([s.differences[:1] for s in stretches])
    least = float(np.min(np.abs(g)))
    tolerance = min(TOLERANCE * max(1.0, least), RELATIVE * least) if least < 1 else TOLERANCE * least
    for splits in range(finest, MOST_SPLITS + 1):
        rows, error, rounded, served = _fitted(stretches, finest, splits, share)
        if error <= tolerance and (rounded <= ROUNDED or splits == MOST_SPLITS):
            return Octave(e, splits, rows, served)
    raise FormulaError(
        f"f' changes too fast near x = {float(arc.x_at(arc.u_of(2.0**e))):.6g}: use a smoother formula there"
    )


def _stretches(arc: Arc, e: int, share: float) -> tuple[int, list[Stretch]]:
    """The least number of halvings that will do, and interpolation polynomials of f' on the parts that are served."""
    for level in range(MOST_SPLITS):
        served = [part for part in range(1 << level) if not part or part / 2.0**level < share]
        parts: list[Stretch] = []
        for part in served:
            stretch, error, scale = _stretch(arc, e, level, part)
            if not error <= min(TOLERANCE, RELATIVE * scale) / 8 * max(1.0, scale):
                break
            parts.append(stretch)
        if len(parts) == len(served):
            return level, parts
    raise FormulaError(
        f"f' changes too fast near x = {float(arc.x_at(arc.u_of(2.0**e))):.6g}: use a smoother formula there"
    )


def _stretch(arc: Arc, e: int, level: int, part: int) -> tuple[Stretch, float, float]:
    width = 2.0 ** (e - level)
    low = 2.0**e + part * width

    def exact(t: Array) -> tuple[Array, Array]:
        points = [arc.at(arc.x_at(arc.u_of(low + (v + 0.5) * width))) for v in t.tolist()]
        return (np.array([float(d - low) for d, _ in points]) / width - 0.5), np.array([float(g) for _, g in points])

    nodes, differences = exact(_leja())
    differences = differences.copy()
    for k in range(1, len(nodes)):
        differences[k:] = (differences[k:] - differences[k - 1 : -1]) / (nodes[k:] - nodes[: len(nodes) - k])
    stretch = Stretch(nodes, differences)
    t, g = exact(np.array(CHECKS))
    return stretch, float(np.max(np.abs(stretch(t) - g))), float(np.min(np.abs(g)))


@cache
def _leja() -> Array:
    """Chebyshev points of [-1/2, 1/2] in an order that keeps divided differences accurate."""
    points = list(_chebyshev(NODES))
    order = [points.pop(0)]
    while points:
        best = max(points, key=lambda p: math.prod(abs(p - q) for q in order))
        points.remove(best)
        order.append(best)
    return np.array(order)


def _chebyshev(count: int) -> tuple[float, ...]:
    return tuple(-0.5 * math.cos(math.pi * (2 * i + 1) / (2 * count)) for i in range(count))


@cache
def _inverse_vandermonde() -> Array:
    """From values in the Chebyshev points to coefficients: row k, column of the point."""
    nodes = _chebyshev(TERMS)
    columns = []
    for i, node in enumerate(nodes):
        polynomial = [1.0]
        for j, other in enumerate(nodes):
            if j != i:
                shifted = [0.0, *polynomial]
                polynomial = [a - other * b for a, b in zip(shifted, [*polynomial, 0.0], strict=True)]
                polynomial = [v / (node - other) for v in polynomial]
        columns.append(polynomial)
    return np.array(columns).T


def horner(rows: Array, z: Array) -> Array:
    """Polynomials (rows) at z: result[row, point]."""
    value = np.repeat(rows[:, -1:], len(z), axis=1)
    for k in range(rows.shape[1] - 2, -1, -1):
        value = value * z[None, :] + rows[:, k : k + 1]
    return value


def _fitted(stretches: list[Stretch], level: int, splits: int, share: float) -> tuple[Array, float, float, int]:
    """Rows for all bins of an octave, their largest error before and after rounding, and how many are served."""
    per = 1 << (splits - level)
    served = min(max(math.ceil(share * (1 << splits) - 2.0**-22), 1), 1 << splits)
    nodes, samples = np.array(_chebyshev(TERMS)), np.linspace(-0.5, 0.5, SAMPLES)
    inverse = _inverse_vandermonde()
    rows, error, rounded = [], 0.0, 0.0
    for part, stretch in enumerate(stretches):
        bins = np.arange(part * per, min((part + 1) * per, served)) - part * per
        if not len(bins):
            continue
        values = stretch(((bins[:, None] + nodes[None, :] + 0.5) / per) - 0.5)
        exact = stretch(((bins[:, None] + samples[None, :] + 0.5) / per) - 0.5)
        found = np.zeros((len(bins), TERMS))
        for k in range(TERMS):
            found[:, k] = sum(inverse[k, i] * values[:, i] for i in range(TERMS))
        error = max(error, float(np.max(np.abs(horner(found, samples) - exact))))
        found = found.astype(np.float32).astype(np.float64)
        misses = np.abs(horner(found, samples) - exact) / np.maximum(1, np.abs(exact))
        rounded = max(rounded, float(np.max(misses)))
        rows.append(found)
    table = np.concatenate(rows)
    rest = np.zeros(((1 << splits) - len(table), TERMS))
    if len(rest):
        rest[:, 0] = float(horner(table[-1:], np.array([0.5]))[0, 0])
    return np.concatenate([table, rest]), error, rounded, served


def below(arc: Arc, first: Octave | None) -> tuple[float, float]:
    """(base, slope) of the linear start: exact at the anchor, and at the first octave's edge where f' is 0 there."""
    base, slope = arc.start
    if first is not None and (base, slope) == (0.0, 0.0):
        edge = float(horner(first.rows[:1], np.array([-0.5]))[0, 0])
        slope = edge / 2.0**first.exponent
    return float(np.float32(base)), float(np.float32(slope))
