"""From a formula to its decoder: rational minimax fits, polished in float32, certified by Arb, clamps calibrated.

`python -m invref.fit [NAME ...]` writes the tables that ship, on one processor byte for byte the same each time: clamps
are calibrated on torch's own forward. A table's bounds are certified sup-norms of its segments in exact arithmetic;
what float32 evaluation adds is measured by the verifier over all inputs. Handles formulas with one smooth minimum,
limits 0 at the left end and slope 1 at the right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import torch
from flint import arb
from torch import Tensor

from invref import calibrate, cells, enclosure, formulas, native
from invref.certify import BITS, FAR, SATURATED, SERIES_TERMS, certified, with_series
from invref.curve import DIGITS, Curve
from invref.decoders import Cells, Clamp, Decoder, Segment, to_json
from invref.engines import ARB, coefficients, precision, to_mpf, variable
from invref.formats import FORMATS
from invref.kernels import naive
from invref.minimax import middle, rational

Array = npt.NDArray[np.float64]

DEGREES = (6, 4)
"""Of numerator and denominator: the least for which all three segments stay below 2^-22 in every activation so far."""
TAIL_SHARES = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
HEAD_SHARES = (0.36, 0.37, 0.38, 0.39, 0.41, 0.42, 0.43, 0.44, 0.46, 0.48, 0.51, 0.52, 0.53, 0.54, 0.56, 0.58)
"""Where the segments may meet, as shares of the largest |t| on the left and of end_t."""
CARE_AT_ZERO = 3.0
CARE_NEAR_ONE = 3.0
"""How many times more an error counts there."""
MOVES = (-16, -8, -4, -2, -1, 1, 2, 4, 8, 16)
"""Ulps by which polishing moves a coefficient."""
LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_fast": native.gelu_fast,
    "gelu_new": native.gelu_new,
    "gelu_tanh": native.gelu_tanh,
    "mish": torch.nn.functional.mish,
    "quick_gelu": native.quick_gelu,
    "silu": torch.nn.functional.silu,
}


def _single(value: float) -> float:
    return float(np.float32(value))


@dataclass(frozen=True)
class _Points:
    """A segment's samples: u, the factor m and the offset c of g = c + m * P/Q, g, and how much an error counts."""

    u: list[arb]
    m: list[arb]
    c: int
    g: list[arb]
    care: list[float]

    def fit(self) -> tuple[Segment, float]:
        """The minimax segment with float32 coefficients, and its error.

        The numerator is fitted once more to the rounded denominator, which takes up most of that rounding.
        """
        centre = _single((min(self._arrays[0]) + max(self._arrays[0])) / 2)
        keep = [i for i, m in enumerate(self.m) if abs(m) > 0]
        z = [middle(self.u[i] - centre) for i in keep]
        target = [middle((self.g[i] - self.c) / self.m[i]) for i in keep]
        weight = [middle(abs(self.m[i]) * self.care[i]) for i in keep]
        best = rational(z, target, weight, DEGREES)
        denominator = tuple(_single(float(v)) for v in best.denominator[1:])
        q = [middle(1 + sum((v**k * c for k, c in enumerate(denominator, start=1)), arb(0))) for v in z]
        again = rational(
            z,
            [middle(h * value) for h, value in zip(target, q, strict=True)],
            [middle(w / value) for w, value in zip(weight, q, strict=True)],
            (DEGREES[0], 0),
        )
        numerator = tuple(_single(float(v)) for v in again.numerator)
        segment = Segment(centre, numerator, denominator, bound=float("nan"))
        return segment, self.error(segment)

    @cached_property
    def _arrays(self) -> tuple[Array, ...]:
        u, m, g = (np.array([float(v) for v in values]) for values in (self.u, self.m, self.g))
        return u, m, g, np.array(self.care)

    def error(self, segment: Segment) -> float:
        """The worst weighted error of a segment on the points, evaluated in float64: rounding noise left out."""
        u, m, g, care = self._arrays
        z = u - segment.centre
        p, q = np.zeros_like(z), np.zeros_like(z)
        for coefficient in reversed(segment.numerator):
            p = p * z + coefficient
        for coefficient in reversed((1.0, *segment.denominator)):
            q = q * z + coefficient
        return float(np.max(np.abs(self.c + m * (p / q) - g) * care))


def _turn(curve: Curve, a: float, b: float) -> _Points:
    # Input 0 is one of the points, and counts: its gradient is to be exact, so single ulps must be enough to get there.
    x = [*curve.between(curve.x_of(-a), curve.x_of(b)), arb(0)]
    values = [curve.at(v) for v in x]
    t = [
        middle((f - curve.turning[1]).sqrt() * (1 if v > curve.turning[0] else -1))
        for v, (f, _) in zip(x, values, strict=True)
    ]
    return _Points(t, t, 0, [g for _, g in values], [1.0] * (len(x) - 1) + [CARE_AT_ZERO])


def _head(curve: Curve, b: float, end: float) -> _Points:
    values = [curve.at(v) for v in curve.between(curve.x_of(b), curve.x_of(end))]
    t = [middle((f - curve.turning[1]).sqrt()) for f, _ in values]
    # Where f' is within 1e-6 of its limit, one ulp of 1 is all that an error may be.
    care = [1 + CARE_NEAR_ONE / (1 + abs(float(g) - 1) / 1e-6) for _, g in values]
    return _Points(t, [middle(end - v) for v in t], 1, [g for _, g in values], care)


def _tail(curve: Curve, a: float) -> _Points:
    far = enclosure.inverse(curve.formula, arb(-FAR), 0, DIGITS)
    values = [curve.at(v) for v in curve.between(middle(far), curve.x_of(-a))]
    u, g = [middle((-f).sqrt()) for f, _ in values], [g for _, g in values]
    return _Points(u, [f for f, _ in values], 0, g, [1.0] * len(u))


def _end(curve: Curve) -> float:
    """The smallest multiple of 1/16 from which on f' rounds to 1."""
    t = 1.0
    while not abs(1 - curve.at(curve.x_of(t))[1]) < SATURATED or curve.at(curve.x_of(t))[0] < 1:
        t += 1 / 16
    return t


def _balanced(curve: Curve) -> tuple[Decoder, dict[str, _Points]]:
    """The decoder whose worst segment is best, over the places where segments may meet, and what it was fitted to.

    Bounds, cells, clamps and the Taylor polynomial are still missing.
    """
    x, y = curve.turning
    left, end = float((-y).sqrt()), _end(curve)
    tails = {share: _tail(curve, share * left) for share in TAIL_SHARES}
    heads = {share: _head(curve, share * end, end) for share in HEAD_SHARES}
    outer = {share: points.fit() for share, points in (tails | heads).items()}
    places = [(max(outer[a][1], outer[b][1]), a, b) for a in tails for b in heads]
    best, a, b, turn = np.inf, 0.0, 0.0, _turn(curve, TAIL_SHARES[0] * left, HEAD_SHARES[0] * end)
    segment = turn.fit()[0]
    for worst, share, other in sorted(places):
        if worst >= best:
            break
        points = _turn(curve, share * left, other * end)
        candidate, error = points.fit()
        if max(worst, error) < best:
            best, a, b, turn, segment = max(worst, error), share, other, points, candidate
    with mpmath.workdps(DIGITS):
        texts = [mpmath.nstr(to_mpf(v), DIGITS - 10) for v in (x, y)]
    decoder = Decoder(
        activation=curve.formula.name,
        formula=curve.formula.text,
        turning_x=texts[0],
        turning_y=texts[1],
        tail_y=_single(float(y) + (a * left) ** 2),
        head_t=_single(b * end),
        end_t=end,
        tail=outer[a][0],
        turn=segment,
        head=outer[b][0],
        cells=Cells(0.0, (0.0, 0.0, 0.0), (), float("nan")),
        series=(),
        series_radius=0.0,
        series_bound=0.0,
        clamps={name: Clamp(0.0, 0.0) for name in FORMATS},
    )
    return decoder, {"tail": tails[a], "turn": turn, "head": heads[b]}


def _polished(curve: Curve, decoder: Decoder, name: str, points: _Points) -> Decoder:
    """The decoder with one segment's coefficients moved by ulps until g(0) is evaluated exactly, or the error is least.

    The error is that of the exact rational function: what float32 evaluation adds is noise that single ulps of the
    coefficients do not change, and that fitting to samples of it would only hide.
    """
    zero = torch.zeros(1)
    slope = torch.tensor([_single(float(curve.at(arb(0))[1]))])

    def moved(index: int, ulps: int) -> Decoder:
        segment: Segment = getattr(decoder, name)
        numbers = np.array([*segment.numerator, *segment.denominator], dtype=np.float32)
        numbers.view(np.int32)[index] += ulps
        values, cut = [float(v) for v in numbers], len(segment.numerator)
        change: dict[str, Any] = {
            name: replace(segment, numerator=tuple(values[:cut]), denominator=tuple(values[cut:]))
        }
        return replace(decoder, **change)

    def error(candidate: Decoder) -> tuple[bool, float]:
        exact = bool(naive.derivative(candidate, zero, zero == 0, "float32") == slope)
        return not exact, points.error(getattr(candidate, name))

    best = error(decoder)
    while True:
        candidates = [moved(index, ulps) for index in range(sum(DEGREES) + 1) for ulps in MOVES]
        measured, _, candidate = min((error(c), k, c) for k, c in enumerate(candidates))
        if measured >= best:
            return decoder
        decoder, best = candidate, measured


def _with_clamps(curve: Curve, decoder: Decoder) -> Decoder:
    turning = Fraction(decoder.turning_x), Fraction(decoder.turning_y)
    f = coefficients(curve.formula.evaluate(variable(curve.turning[0], SERIES_TERMS + 2), ARB))
    slopes = (0.0, *(float(k * c) for k, c in enumerate(f[2:], start=2)))
    layer = LAYERS[decoder.activation]
    clamps = {name: calibrate.clamp(layer, turning, slopes, fmt) for name, fmt in FORMATS.items()}
    return replace(decoder, clamps=clamps)


def fit(name: str) -> Decoder:
    """The decoder of an activation of the catalogue, certified and calibrated."""
    curve = Curve(formulas.get(name))
    with precision(BITS, SERIES_TERMS + 4):
        decoder, points = _balanced(curve)
        for segment in points:
            decoder = _polished(curve, decoder, segment, points[segment])
        decoder = certified(curve, decoder)
        decoder = replace(decoder, cells=cells.fit(curve, decoder))
        return _with_clamps(curve, with_series(curve, decoder))


def main(names: list[str], folder: Path | None = None) -> None:
    """Write the tables of these activations (default: all) into the folder (default: the package's)."""
    folder = folder or Path(str(resources.files("invref") / "tables"))
    for name in names or list(LAYERS):
        decoder = fit(name)
        (folder / f"{name}.json").write_text(to_json(decoder, f"python -m invref.fit {name}"))
        bounds = ", ".join(f"{part} {getattr(decoder, part).bound:.2e}" for part in ("tail", "turn", "head", "cells"))
        print(f"{name}: certified |approximation - g| <= {bounds}")


if __name__ == "__main__":
    main(sys.argv[1:])
