"""From a formula to its decoder: rational minimax fits, polished in float32, certified by Arb, clamps calibrated.

`python -m invref.fit [NAME ...]` writes the tables that ship, byte for byte the same each time. A table's bounds are
certified sup-norms of its segments in exact arithmetic; what float32 evaluation adds is measured by the verifier over
all inputs. Handles formulas with one smooth minimum, limits 0 at the left end and slope 1 at the right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch
from flint import arb
from torch import Tensor

from invref import calibrate, enclosure, formulas
from invref.certify import BITS, FAR, SATURATED, SERIES_TERMS, certified, with_series
from invref.curve import DIGITS, Curve
from invref.decoders import Clamp, Decoder, Segment, to_json
from invref.engines import ARB, coefficients, precision, to_mpf, variable
from invref.formats import FORMATS
from invref.kernels import naive
from invref.minimax import middle, rational

DEGREES = (6, 4)
"""Of numerator and denominator: the least for which all three segments stay below 2^-22 in every activation so far."""
TAIL_SHARES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
HEAD_SHARES = (0.36, 0.38, 0.4, 0.42, 0.44, 0.46, 0.48, 0.5, 0.52, 0.54, 0.56, 0.58, 0.6)
"""Where the segments may meet, as shares of the largest |t| on the left and of end_t."""
MOVES = (-16, -8, -4, -2, -1, 1, 2, 4, 8, 16)
"""Ulps by which polishing moves a coefficient."""
LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def _single(value: float) -> float:
    return float(np.float32(value))


def _care(g: float, limit: int) -> float:
    """How much more an error counts where f' is within 1e-6 of its limit 1: one ulp of 1 is allowed there."""
    return 1 + limit * 3 / (1 + abs(g - 1) / 1e-6)


@dataclass(frozen=True)
class _Points:
    """A segment's samples: u, the factor m and the offset c of g = c + m * P/Q, and g."""

    u: list[arb]
    m: list[arb]
    c: int
    g: list[arb]

    def fit(self) -> tuple[Segment, float]:
        """The minimax segment with float32 coefficients, and the error before they were rounded.

        The numerator is fitted once more to the rounded denominator, which takes up most of that rounding.
        """
        centre = _single(float((self.u[0] + self.u[-1]) / 2))
        keep = [i for i, m in enumerate(self.m) if abs(m) > 0]
        z = [middle(self.u[i] - centre) for i in keep]
        target = [middle((self.g[i] - self.c) / self.m[i]) for i in keep]
        weight = [middle(abs(self.m[i]) * _care(float(self.g[i]), self.c)) for i in keep]
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
        return Segment(centre, numerator, denominator, bound=float("nan")), best.error


def _turn(curve: Curve, a: float, b: float) -> _Points:
    x = curve.between(curve.x_of(-a), curve.x_of(b))
    values = [curve.at(v) for v in x]
    t = [
        middle((f - curve.turning[1]).sqrt() * (1 if v > curve.turning[0] else -1))
        for v, (f, _) in zip(x, values, strict=True)
    ]
    return _Points(t, t, 0, [g for _, g in values])


def _head(curve: Curve, b: float, end: float) -> _Points:
    values = [curve.at(v) for v in curve.between(curve.x_of(b), curve.x_of(end))]
    t = [middle((f - curve.turning[1]).sqrt()) for f, _ in values]
    return _Points(t, [middle(end - v) for v in t], 1, [g for _, g in values])


def _tail(curve: Curve, a: float) -> _Points:
    far = enclosure.inverse(curve.formula, arb(-FAR), 0, DIGITS)
    values = [curve.at(v) for v in curve.between(middle(far), curve.x_of(-a))]
    return _Points([middle((-f).sqrt()) for f, _ in values], [f for f, _ in values], 0, [g for _, g in values])


def _end(curve: Curve) -> float:
    """The smallest multiple of 1/16 from which on f' rounds to 1."""
    t = 1.0
    while not abs(1 - curve.at(curve.x_of(t))[1]) < SATURATED or curve.at(curve.x_of(t))[0] < 1:
        t += 1 / 16
    return t


def _balanced(curve: Curve) -> Decoder:
    """The decoder whose worst segment is best, over the places where segments may meet; no bounds, no clamps yet."""
    x, y = curve.turning
    left, end = float((-y).sqrt()), _end(curve)
    tails = {share: _tail(curve, share * left).fit() for share in TAIL_SHARES}
    heads = {share: _head(curve, share * end, end).fit() for share in HEAD_SHARES}
    best = (np.inf, 0.0, 0.0, tails[TAIL_SHARES[0]][0])
    for a, b in sorted(
        ((a, b) for a in TAIL_SHARES for b in HEAD_SHARES), key=lambda p: max(tails[p[0]][1], heads[p[1]][1])
    ):
        outer = max(tails[a][1], heads[b][1])
        if outer >= best[0]:
            break
        turn, inner = _turn(curve, a * left, b * end).fit()
        if max(outer, inner) < best[0]:
            best = (max(outer, inner), a, b, turn)
    _, a, b, turn = best
    with mpmath.workdps(DIGITS):
        texts = [mpmath.nstr(to_mpf(v), DIGITS - 10) for v in (x, y)]
    return Decoder(
        activation=curve.formula.name,
        formula=curve.formula.text,
        turning_x=texts[0],
        turning_y=texts[1],
        tail_y=_single(float(y) + (a * left) ** 2),
        head_t=_single(b * end),
        end_t=end,
        tail=tails[a][0],
        turn=turn,
        head=heads[b][0],
        series=(),
        series_radius=0.0,
        series_bound=0.0,
        clamps={name: Clamp(0.0, 0.0) for name in FORMATS},
    )


def _samples(curve: Curve, low: float, high: float, piece: int, count: int = 1500) -> tuple[Tensor, Tensor]:
    """float32 outputs evenly spread over the inputs between two outputs of one piece, and the exact g of each."""
    ends = [middle(enclosure.inverse(curve.formula, arb(v), piece, DIGITS)) for v in (low, high)]
    inputs = [middle(ends[0] + (ends[1] - ends[0]) * arb(k + 1) / (count + 1)) for k in range(count)]
    samples = {_single(float(curve.at(x)[0])): x for x in inputs}
    outputs = sorted(samples)
    g = [float(curve.at(curve.x_near(y, samples[y]))[1]) for y in outputs]
    return torch.tensor(outputs, dtype=torch.float32), torch.tensor(g, dtype=torch.float64)


def _polished(curve: Curve, decoder: Decoder, name: str, samples: list[tuple[Tensor, Tensor, bool]]) -> Decoder:
    """The decoder with one segment's coefficients moved by single ulps while its error *as evaluated* shrinks."""
    y, g = torch.cat([s[0] for s in samples]), torch.cat([s[1] for s in samples])
    side = torch.cat([torch.full(s[0].shape, s[2]) for s in samples])
    care = torch.tensor([_care(value, int(name == "head")) for value in g.tolist()], dtype=torch.float64)
    zero = torch.zeros(1)
    slope = torch.tensor([_single(float(curve.at(arb(0))[1]))])

    def error(candidate: Decoder) -> tuple[bool, float]:
        exact = bool(naive.derivative(candidate, zero, zero == 0, "float32") == slope)
        worst = ((naive.derivative(candidate, y, side, "float32").double() - g).abs() * care).max()
        return not exact, float(worst)

    def moved(index: int, ulps: int) -> Decoder:
        segment: Segment = getattr(decoder, name)
        numbers = np.array([*segment.numerator, *segment.denominator], dtype=np.float32)
        numbers.view(np.int32)[index] += ulps
        values, cut = [float(v) for v in numbers], len(segment.numerator)
        change: dict[str, Any] = {
            name: replace(segment, numerator=tuple(values[:cut]), denominator=tuple(values[cut:]))
        }
        return replace(decoder, **change)

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
        decoder = _balanced(curve)
        y, split = float(curve.turning[1]), decoder.tail_y
        near = y * (1 - 1e-4)
        head_y, end_y = y + decoder.head_t**2, y + decoder.end_t**2
        samples = {
            "tail": [(*_samples(curve, -FAR, split, 0), False)],
            "turn": [(*_samples(curve, split, near, 0), False), (*_samples(curve, near, head_y, 1), True)],
            "head": [(*_samples(curve, head_y, end_y, 1), True)],
        }
        for segment, points in samples.items():
            decoder = _polished(curve, decoder, segment, points)
        return _with_clamps(curve, with_series(curve, certified(curve, decoder)))


def main(names: list[str], folder: Path | None = None) -> None:
    """Write the tables of these activations (default: all) into the folder (default: the package's)."""
    folder = folder or Path(str(resources.files("invref") / "tables"))
    for name in names or list(LAYERS):
        decoder = fit(name)
        (folder / f"{name}.json").write_text(to_json(decoder, f"python -m invref.fit {name}"))
        bounds = ", ".join(f"{part} {getattr(decoder, part).bound:.2e}" for part in ("tail", "turn", "head"))
        print(f"{name}: certified |approximation - g| <= {bounds}")


if __name__ == "__main__":
    main(sys.argv[1:])
