"""The pictures of a report, drawn from its data alone.

Guarantees the same bytes for the same data. Colours and strokes are the style sheet's. Must not know how anything was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from verify.plots import Picture
from verify.plots_scale import Scale
from verify.record import ABSOLUTE

DECADES = 8
COLOURS = 4
"""Pieces take turns in this many colours."""

Data = Mapping[str, Any]


def colour(piece: int) -> str:
    """The class that colours a piece, the same in every picture."""
    return f"p{piece % COLOURS}"


def function(data: Data) -> str:
    """f and f' over x, coloured by piece, with the landmarks as hairlines."""
    curves = data["curves"]
    low, high = data["drawn"]
    values = np.array([v for curve in curves for v in (*curve["f"], *curve["slope"]) if v is not None])
    picture = Picture(Scale(low, high), _padded(values, limit=5.0), f"{data['activation']}: f and f′", "x")
    picture.level(0.0, "zero")
    for mark in data["landmarks"]:
        picture.upright(float(mark["x"]), "landmark")
    for curve in curves:
        css = colour(curve["piece"])
        picture.line(curve["x"], _numbers(curve["slope"]), f"slope {css}")
        picture.line(curve["x"], _numbers(curve["f"]), f"curve {css}")
    turning = [m for m in data["landmarks"] if m["kind"] == "turning"]
    picture.dots([float(m["x"]) for m in turning], [float(m["y"]) for m in turning], "mark", 3.5)
    for mark in turning[:2]:
        picture.note(float(mark["x"]), float(mark["y"]), "turning point", "ink")
    last = curves[-1]
    for name, key, share in (("f", "f", 0.85), ("f′", "slope", 0.92)):
        inside = [(a, b) for a, b in zip(last["x"], last[key], strict=True) if b is not None and 0 < picture.y(b) < 1]
        if inside:
            at = min(int(share * len(inside)), len(inside) - 1)
            picture.note(*inside[at], name, colour(last["piece"]))
    if len(curves) > 1:
        for curve in curves[:4]:
            middle = len(curve["x"]) // 2
            picture.note(
                curve["x"][middle], _numbers(curve["f"])[middle], f"piece {curve['piece']}", colour(curve["piece"])
            )
    return picture.svg()


def from_output(data: Data) -> str:
    """The derivative as a function of the output: the exact curve of each piece, and what the layer decoded."""
    curves = data["curves"]
    y = np.array([v for curve in curves for v in curve["f"] if v is not None])
    slope = np.array([v for curve in curves for v in curve["slope"] if v is not None])
    picture = Picture(_padded(y, limit=4.0), _padded(slope, limit=4.0),
                      f"{data['activation']}: the derivative from the output", "stored output y", "f′")  # fmt: skip
    picture.level(0.0, "zero")
    for curve in curves:
        css = colour(curve["piece"])
        picture.line(_numbers(curve["f"]), _numbers(curve["slope"]), f"curve {css}")
    rows = data["decoded"]
    picture.dots([_number(r[1]) for r in rows], [_number(r[2]) for r in rows], "decoded", 2.4)
    sides = data["codes"]
    for curve in curves[:6]:
        middle = len(curve["f"]) // 2
        side = f", side code {sides[curve['piece']]}" if len(set(sides)) > 1 else ""
        picture.note(_number(curve["f"][middle]), _number(curve["slope"][middle]),
                     f"piece {curve['piece']}{side}", colour(curve["piece"]))  # fmt: skip
    return picture.svg()


def errors(data: Data, dtype: str, said: str) -> str:
    """Error against input: the floor as an area, our error and the native one as lines, the worst of all as `said`."""
    found, record = data["errors"][dtype], _record(data, dtype)
    reach, bend = data["axis"]["reach"], data["axis"]["bend"]
    scale = Scale(-reach, reach, "symlog", bend)
    ends = np.linspace(scale.bent(-reach), scale.bent(reach), len(found["floor"]) + 1)
    x = [scale.unbent((a + b) / 2) for a, b in pairwise(ends)]
    curves = {name: _numbers(found[name]) for name in ("floor", "ours", "native")}
    worst = float(record["worst_error"])
    peaks = [v for values in (*curves.values(), [worst]) for v in values if math.isfinite(v) and v > 0] or [1.0]
    top = 10.0 ** math.ceil(math.log10(max(peaks)) + 0.15)
    errors_axis = Scale(top / 10**DECADES, top, "log")
    unit = "gradient error" if data["scale"] == ABSOLUTE else "gradient error / max(1, |f′|)"
    picture = Picture(scale, errors_axis, f"{data['activation']} in {dtype}: error against input", "input x", unit)
    # An error of 0 stands at the bottom.
    lowest = top / 10 ** (DECADES + 2)
    positive = {name: [lowest if v < lowest else v for v in values] for name, values in curves.items()}
    picture.area(x, positive["floor"], "floor")
    for mark in data["landmarks"]:
        picture.upright(float(mark["x"]), "landmark")
    picture.line(x, positive["native"], "native")
    picture.line(x, positive["floor"], "floor-edge")
    picture.line(x, positive["ours"], "ours")
    place = record["worst_input"]
    if place is not None and 0 < worst < math.inf:
        at = min(max(float(place["value"]), -reach), reach)
        picture.dots([at], [worst], "worst", 3.5)
        picture.note(at, worst, f"worst {said}", "ours")
    if not any(v > 0 for values in curves.values() for v in values):
        picture.note(0.0, top / 10 ** (DECADES / 2), "no error at any input", "ink")
    _name_lines(picture, x, positive, top / 10**DECADES)
    for name in ("native", "ours"):
        lost = [x[k] for k in found["nonfinite_columns"][name]]
        picture.dots(lost, [top / 1.6] * len(lost), f"lost {name}", 2.5, f"{name}: not finite" if lost else "")
    return picture.svg()


def zoom(data: Data, dtype: str, index: int) -> str:
    """The codes around a turning point: for each the derivatives that share it, and what is decoded."""
    rows = data["zooms"][index][dtype]
    y = np.array([v for row in rows for v in row[2:4]])
    picture = Picture(Scale(-2.5, 9.5), _padded(y), f"{data['activation']} in {dtype}: the codes at the turning point",
                      "ulps from the turning value to the stored y", "f′")  # fmt: skip
    picture.level(0.0, "zero")
    picture.upright(0.0, "landmark")
    for piece in sorted({row[1] for row in rows}):
        mine = [row for row in rows if row[1] == piece]
        at = [row[0] for row in mine]
        picture.bars(at, [r[2] for r in mine], [r[3] for r in mine], f"hull {colour(piece)}")
        picture.dots(at, [_number(r[4]) for r in mine], "decoded", 2.0)
        far = mine[-3]
        picture.note(far[0], far[2 if far[2] < 0 else 3], f"piece {piece}", colour(piece))
    return picture.svg()


def thumbnail(data: Data) -> str:
    """f in the space of a table's cell."""
    curves = data["curves"]
    low, high = data["drawn"]
    scale = _padded(np.array([v for curve in curves for v in curve["f"] if v is not None]), limit=5.0)
    across, up = 64.0, 34.0
    parts = []
    for curve in curves:
        points = [(across * (a - low) / (high - low), up * (1 - scale(_number(b))))
                  for a, b in zip(curve["x"], curve["f"], strict=True) if b is not None]  # fmt: skip
        kept = points[:: max(1, len(points) // 16)] + points[-1:]
        parts.append(
            f'<path class="curve {colour(curve["piece"])}" d="M' + " ".join(f"{a:.0f} {b:.1f}" for a, b in kept) + '"/>'
        )
    zero = f'<path class="zero" d="M0 {up * (1 - scale(0.0)):.1f}H{across:g}"/>' if 0 <= scale(0.0) <= 1 else ""
    return f'<svg class="thumb" viewBox="0 0 {across:g} {up:g}" aria-hidden="true">{zero}{"".join(parts)}</svg>'


def _name_lines(picture: Picture, x: Sequence[float], curves: Mapping[str, list[float]], bottom: float) -> None:
    """Names each line where it runs alone, most apart from the other two."""
    for name, text, css in (("native", "native", "native"), ("ours", "ours", "ours"), ("floor", "floor", "floor-ink")):
        others = [curves[other] for other in curves if other != name]
        apart: dict[int, float] = {}
        for k, value in enumerate(curves[name]):
            if math.isfinite(value) and value > bottom * 3 and 6 < k < len(x) - 12:
                gaps = [abs(math.log10(value / other[k])) for other in others if math.isfinite(other[k])]
                apart[k] = min([*gaps, 3.0]) + 0.02 * math.log10(value / bottom)
        alone = [k for k in apart if apart[k] > max(apart.values()) - 0.5]
        picture.name([x[k] for k in alone], [curves[name][k] for k in alone], text, css)


def _record(data: Data, dtype: str) -> Data:
    return next(record for record in data["records"] if record["dtype"] == dtype)


def _padded(values: Any, limit: float = math.inf) -> Scale:
    """An axis around all values, but no further than `limit` from 0."""
    clipped = np.clip(values[np.isfinite(values)], -limit, limit)
    low, high = float(clipped.min()), float(clipped.max())
    margin = 0.08 * ((high - low) or 1.0)
    return Scale(low - margin, high + margin)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
