"""Small pictures in SVG: curves, areas, bars and dots over two axes, coloured by CSS classes and labelled directly.

Guarantees the same bytes for the same data, no script, no font and no colour of its own: the page's style sheet has
those, for light and dark. Labels are put where they cover least. Must not know what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from verify.plots_scale import Scale

Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 24, 38
FONT = 11
_CHARACTER = 0.57 * FONT
"""Mean width of a character of the labels."""

_RADII = (8.0, 13.0, 20.0, 30.0, 44.0, 62.0)
_TURNS = 16


def thin(x: Floats, y: Floats, tolerance: float) -> NDArray[np.bool_]:
    """Which points of the curve x, y (n,) to keep so that the rest lie within `tolerance` of the lines between them."""
    keep = np.zeros(x.size, bool)
    keep[[0, -1]] = True
    todo = [(0, x.size - 1)]
    while todo:
        a, b = todo.pop()
        if b - a < 2:
            continue
        dx, dy = x[b] - x[a], y[b] - y[a]
        length = float(np.hypot(dx, dy)) or 1.0
        off = np.abs((x[a + 1 : b] - x[a]) * dy - (y[a + 1 : b] - y[a]) * dx) / length
        far = int(off.argmax())
        if off[far] > tolerance:
            middle = a + 1 + far
            keep[middle] = True
            todo += [(a, middle), (middle, b)]
    return keep


@dataclass(frozen=True)
class _Label:
    text: str
    css: str
    anchors: list[tuple[float, float]]
    marked: bool


@dataclass
class Picture:
    """One pair of axes; draw first, then ask for `svg`."""

    x: Scale
    y: Scale
    title: str
    x_label: str = ""
    y_label: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    _curves: list[str] = field(default_factory=list)
    _marks: list[str] = field(default_factory=list)
    _labels: list[_Label] = field(default_factory=list)
    _covered: list[tuple[float, float]] = field(default_factory=list)

    def line(self, x: Sequence[float], y: Sequence[float], css: str) -> None:
        """A curve; it breaks where a value is not finite, and is cut off at the picture's edges."""
        for points in self._runs(x, y):
            self._curves.append(f'<path class="{css}" d="{_path(points)}"/>')
            self._cover(points)

    def area(self, x: Sequence[float], y: Sequence[float], css: str) -> None:
        """What lies below a curve."""
        for points in self._runs(x, y):
            ground = self.height - BOTTOM
            closed = [(points[0][0], ground), *points, (points[-1][0], ground)]
            self._curves.append(f'<path class="{css}" d="{_path(closed)}Z"/>')

    def dots(self, x: Sequence[float], y: Sequence[float], css: str, radius: float = 2.5, label: str = "") -> None:
        """A dot at each point inside the picture."""
        points = self._inside(x, y)
        self._marks += [f'<circle class="{css}" cx="{_n(px)}" cy="{_n(py)}" r="{radius:g}"/>' for px, py in points]
        self._covered += points
        if label:
            self._labels.append(_Label(label, css, points, True))

    def bars(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> None:
        """A vertical stroke at each x from `low` to `high`."""
        strokes = []
        for at, lowest, highest in zip(x, low, high, strict=True):
            if not 0 <= self.x(at) <= 1:
                continue
            bottom, top = (self._pixel(at, min(max(v, self.y.low), self.y.high))[1] for v in (lowest, highest))
            px = self._pixel(at, lowest)[0]
            strokes.append(f"M{_n(px)} {_n(bottom + 0.5)}V{_n(top - 0.5)}")
            self._covered += [(px, py) for py in np.linspace(top, bottom, max(2, int((bottom - top) / 4))).tolist()]
        if strokes:
            self._marks.append(f'<path class="{css}" d="{"".join(strokes)}"/>')

    def upright(self, x: float, css: str) -> None:
        """A vertical hairline across the picture."""
        if not 0 < self.x(x) < 1:
            return
        px = self._pixel(x, self.y.low)[0]
        self._marks.append(f'<path class="{css}" d="M{_n(px)} {TOP}V{self.height - BOTTOM}"/>')
        self._cover([(px, TOP), (px, self.height - BOTTOM)])

    def level(self, y: float, css: str) -> None:
        """A hairline from the left edge to the right."""
        if 0 <= self.y(y) <= 1:
            py = self._pixel(self.x.low, y)[1]
            self._marks.append(f'<path class="{css}" d="M{LEFT} {_n(py)}H{self.width - RIGHT}"/>')
            self._cover([(LEFT, py), (self.width - RIGHT, py)])

    def note(self, x: float, y: float, text: str, css: str) -> None:
        """A label as near to a point as it fits."""
        self._labels.append(_Label(text, css, self._inside([x], [y]) or [(self.width / 2, self.height / 2)], True))

    def name(self, x: Sequence[float], y: Sequence[float], text: str, css: str) -> None:
        """A label close to any one of the points, whichever leaves most of the picture free."""
        anchors = self._inside(x, y)
        if anchors:
            self._labels.append(_Label(text, css, anchors, False))

    def svg(self) -> str:
        """The picture's text."""
        axes = self._axes()
        taken: list[Box] = []
        labels = [self._placed(label, taken) for label in self._labels]
        name = escape(self.title)
        box = f"{LEFT} {TOP - 1} {self.width - LEFT - RIGHT} {self.height - TOP - BOTTOM + 2}"
        left, top, across, up = box.split()
        # A picture inside the picture cuts the curves off at the axes.
        window = (
            f'<svg x="{left}" y="{top}" width="{across}" height="{up}" viewBox="{box}">{"".join(self._curves)}</svg>'
        )
        return (
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{name}">'
            f"<title>{name}</title>{''.join(axes)}{window}{''.join(self._marks)}{''.join(labels)}</svg>"
        )

    def _axes(self) -> list[str]:
        right, ground = self.width - RIGHT, self.height - BOTTOM
        parts = []
        for value, text in self.x.ticks():
            px = _n(self._pixel(value, self.y.low)[0])
            parts.append(f'<path class="grid" d="M{px} {TOP}V{ground}"/>')
            parts.append(f'<text class="tick" x="{px}" y="{ground + 15}" text-anchor="middle">{text}</text>')
        for value, text in self.y.ticks():
            py = self._pixel(self.x.low, value)[1]
            parts.append(f'<path class="grid" d="M{LEFT} {_n(py)}H{right}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 5}" y="{_n(py + 4)}" text-anchor="end">{text}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{ground}H{right}"/>')
        if self.x_label:
            middle = (LEFT + right) // 2
            parts.append(f'<text class="axis-label" x="{middle}" y="{self.height - 5}" text-anchor="middle">'
                         f"{escape(self.x_label)}</text>")  # fmt: skip
        if self.y_label:
            parts.append(f'<text class="axis-label" x="4" y="{TOP - 11}">{escape(self.y_label)}</text>')
        return parts

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        across, up = self.x(x), self.y(y)
        return (
            LEFT + across * (self.width - LEFT - RIGHT),
            self.height - BOTTOM - up * (self.height - TOP - BOTTOM),
        )

    def _inside(self, x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
        pairs = zip(x, y, strict=True)
        return [self._pixel(a, b) for a, b in pairs if 0 <= self.x(a) <= 1 and 0 <= self.y(b) <= 1]

    def _runs(self, x: Sequence[float], y: Sequence[float]) -> list[list[tuple[float, float]]]:
        """The curve in pixels, cut at values that are not finite and held near the picture."""
        runs: list[list[tuple[float, float]]] = [[]]
        for a, b in zip(x, y, strict=True):
            if np.isfinite(a) and np.isfinite(b) and -1e-9 <= self.x(a) <= 1 + 1e-9:
                px, py = self._pixel(a, b)
                lowest = self.height - BOTTOM + (0.5 if self.y.kind == "log" else self.height)
                runs[-1].append((px, min(max(py, -float(self.height)), lowest)))
            elif runs[-1]:
                runs.append([])
        return [_thinned(run) for run in runs if run]

    def _cover(self, points: list[tuple[float, float]]) -> None:
        """Remembers where a curve runs, a point every few pixels."""
        for (ax, ay), (bx, by) in pairwise(points):
            steps = int(max(abs(bx - ax), abs(by - ay)) / 3) + 1
            self._covered += [(ax + (bx - ax) * k / steps, ay + (by - ay) * k / steps) for k in range(steps + 1)]

    def _holds(self, box: Box) -> bool:
        """Whether a label's box lies between the axes and the edges."""
        left, top, right, bottom = box
        return left >= LEFT + 2 and right <= self.width - 2 and top >= TOP - 6 and bottom <= self.height - BOTTOM

    def _placed(self, label: _Label, taken: list[Box]) -> str:
        """The label's text element, where it covers least of what is drawn, nearest to one of its anchors."""
        wide, high = len(label.text) * _CHARACTER, FONT + 1.0
        covered = np.array(self._covered or [(-99.0, -99.0)])
        step = max(1, len(label.anchors) // 24)
        anchors = label.anchors[::step] or [(self.width / 2, self.height / 2)]
        best: tuple[float, float, float, Box] | None = None
        for ax, ay in anchors:
            for radius in _RADII:
                for turn in range(_TURNS):
                    angle = 2 * np.pi * turn / _TURNS
                    middle = ax + np.cos(angle) * (radius + wide / 2), ay - np.sin(angle) * (radius + high / 2 - 4)
                    box = (middle[0] - wide / 2, middle[1] - high / 2, middle[0] + wide / 2, middle[1] + high / 2)
                    if (
                        box[0] < LEFT + 2
                        or box[2] > self.width - 2
                        or box[1] < TOP - 6
                        or box[3] > self.height - BOTTOM
                    ):
                        continue
                    cost = _cost(box, covered, taken) + radius
                    if best is None or cost < best[0] - 1e-9:
                        best = (cost, ax, ay, box)
        if best is None:
            return ""
        _, ax, ay, box = best
        taken.append(box)
        x, y = (box[0] + box[2]) / 2, box[3] - 3
        text = (
            f'<text class="label {label.css}" x="{_n(x)}" y="{_n(y)}" text-anchor="middle">{escape(label.text)}</text>'
        )
        near = min(max(ax, box[0]), box[2]), min(max(ay, box[1]), box[3])
        if label.marked and np.hypot(near[0] - ax, near[1] - ay) > 10:
            text = f'<path class="leader" d="M{_n(ax)} {_n(ay)}L{_n(near[0])} {_n(near[1])}"/>' + text
        return text


def _cost(box: Box, covered: Floats, taken: list[Box]) -> float:
    """How much lies under a label: 10 for each covered point, 10,000 for another label."""
    left, top, right, bottom = box
    px, py = covered[:, 0], covered[:, 1]
    hits = int(((px > left - 2) & (px < right + 2) & (py > top) & (py < bottom + 1)).sum())
    others = sum(left < b[2] + 4 and b[0] < right + 4 and top < b[3] and b[1] < bottom for b in taken)
    return 10.0 * hits + 1e4 * others


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) < 3:
        return points
    array = np.array(points)
    kept = array[thin(array[:, 0], array[:, 1], 0.12)]
    return [(float(px), float(py)) for px, py in kept]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{_n(px)} {_n(py)}" for px, py in points)


def _n(pixels: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return (
        f"{round(pixels, 1):.1f}".removesuffix(".0").replace("-0", "0")
        if abs(pixels) < 0.05
        else (f"{pixels:.1f}".removesuffix(".0"))
    )
