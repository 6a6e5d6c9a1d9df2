"""The clamp of a decoder: what the lowest stored codes decode to, calibrated on the framework's own forward.

Near the turning point thousands of inputs share one stored output, and the forward kernel's rounding decides which:
so the codes there are counted, not derived. Inputs around x* go through torch's layer, once in a long tensor (vector
code) and once in short slices (its scalar tail); each code then stands for an interval of f', and the clamp that makes
the worst distance to all of them smallest is chosen on a grid. Must not know kernels of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from invref.decoders import Clamp
from invref.formats import Format

Array = npt.NDArray[np.float64]

CODES = 16
"""How many codes above y* are looked at."""
HIGHEST_CUT = 6
"""The clamp stays below 8 ulp above y*, from where on the decoder answers for every code."""
GRID = 32
"""Bases are multiples of ulp / GRID, slopes of 1 / GRID."""
MOST_INPUTS = 1 << 18
"""Formats with more inputs in the window are sampled at regular steps."""
SLICE = 7
"""Shorter than any vector register, so that every element goes through the scalar tail."""


@dataclass(frozen=True)
class Side:
    """One side's codes: y - y*, the least and the most |f'| of their inputs, and |g| as a function of y - y*."""

    distances: Array
    least: Array
    most: Array
    exact: Callable[[Array], Array]


def clamp(
    forward: Callable[[Tensor], Tensor], turning: tuple[Fraction, Fraction], slopes: tuple[float, ...], fmt: Format
) -> Clamp:
    """The clamp for one format.

    forward: torch's layer; turning: (x*, y*); slopes: Taylor coefficients of f' at x*, the first one 0.
    """
    ulp = fmt.ulp(float(turning[1]))
    width = np.sqrt(2 * CODES * ulp / slopes[1])
    first, last = (fmt.ordinal(float(turning[0]) + w) for w in (-width, width))
    step = -(-(last - first) // MOST_INPUTS)
    x = fmt.from_ordinals(torch.arange(first, last + 1, step))
    gradient = np.polynomial.Polynomial(slopes)(_minus(x, turning[0]))

    sides = []
    for side in (gradient < 0, gradient > 0):
        outputs = np.concatenate([_minus(y, turning[1])[side] for y in (forward(x), _in_slices(forward, x))])
        distances, code = np.unique(outputs, return_inverse=True)
        sizes = np.abs(np.concatenate([gradient[side], gradient[side]]))
        least, most = np.full(len(distances), np.inf), np.zeros(len(distances))
        np.minimum.at(least, code, sizes)
        np.maximum.at(most, code, sizes)
        # The codes at the window's end are cut off by it; they are far above any clamp.
        exact = _exact(slopes, width, sign=1 if side[-1] else -1)
        sides.append(Side(distances[:-1], least[:-1], most[:-1], exact))
    return _best(sides, ulp, fmt)


def _minus(values: Tensor, exact: Fraction) -> Array:
    high = float(exact)
    wide: Array = values.double().numpy()
    return (wide - high) - float(exact - Fraction(high))


def _in_slices(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([forward(part) for part in x.split(SLICE)])


def _exact(slopes: tuple[float, ...], width: float, sign: int) -> Callable[[Array], Array]:
    """|g| on one side as a function of d = y - y*, interpolated in sqrt(d), in which it is nearly straight."""
    h = sign * np.linspace(0, 1.5 * width, 1 << 14)
    slope = np.polynomial.Polynomial(slopes)
    roots = np.sqrt(np.maximum(slope.integ()(h), 0))
    return lambda d: np.interp(np.sqrt(np.maximum(d, 0)), roots, np.abs(slope(h)))


def _best(sides: list[Side], ulp: float, fmt: Format) -> Clamp:
    codes = np.unique(np.concatenate([side.distances for side in sides]))
    cuts = (codes[1:] + codes[:-1]) / 2
    bases, slopes = (grid.ravel() for grid in np.meshgrid(_steps(1, HIGHEST_CUT) * ulp, _steps(0, 1)))
    best = (np.inf, np.inf, 0.0, 0.0, 0.0)
    for cut in cuts[(cuts > 0) & (cuts < HIGHEST_CUT * ulp)]:
        # The worst error decides; among equals the smaller sum of all codes' errors, then the smaller cut.
        worst, total = np.zeros_like(bases), np.zeros_like(bases)
        for side in sides:
            for distance, least, most in zip(side.distances, side.least, side.most, strict=True):
                decoded = bases + slopes * max(distance, 0.0) if distance < cut else distance
                error = np.maximum(most - side.exact(decoded), side.exact(decoded) - least)
                worst, total = np.maximum(worst, error), total + error
        index = int(np.lexsort((total, worst))[0])
        best = min(best, (worst[index], total[index], cut, bases[index], slopes[index]))
    kind = np.float64 if fmt.name == "float64" else np.float32
    return Clamp(*(float(kind(v)) for v in best[2:]))


def _steps(first: int, last: int) -> Array:
    return np.arange(first, last * GRID + 1, dtype=np.float64) / GRID
