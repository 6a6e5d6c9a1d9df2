"""The picture of the ratios: invref's time over torch's against the size, a panel a format and thread count.

Guarantees that the line at 1, where nothing is lost and nothing gained, is in every panel, and the same bytes for the
same measurements. Must not measure anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from verify import drawing
from verify.drawing import COLOURS, GRID, INK, SOFT
from verify.speed_record import OURS, Timing
from verify.speed_stats import Spread

MARKS = ("o", "s", "^", "D", "v", "P")
WIDE, HIGH = 3.6, 2.9
"""Inches of a panel."""
STRAIGHT = 4
"""Highest over lowest ratio from which the axis is logarithmic."""
NAMED = 6
"""Lines a panel has names for; more are drawn in grey, with the slowest and the fastest named."""


def draw(timings: Sequence[Timing], title: str) -> Figure:
    """One panel for each format and thread count; ValueError where no layer was measured."""
    ours = [t for t in timings if t.kind == "layer" and t.contestant == OURS and t.ratio is not None]
    if not ours:
        raise ValueError("there are no ratios to draw")
    dtypes = list(dict.fromkeys(t.dtype for t in ours))
    threads = list(dict.fromkeys(t.threads for t in ours))
    with mpl.rc_context(drawing.STYLE):
        figure = Figure(figsize=(WIDE * len(threads) + 0.8, HIGH * len(dtypes) + 0.5), layout="constrained",
                        facecolor="white")  # fmt: skip
        panels = figure.subplots(len(dtypes), len(threads), squeeze=False, sharex=True, sharey=True)
        for axes, dtype in zip(panels, dtypes, strict=True):
            for panel, count in zip(axes, threads, strict=True):
                where = "" if ours[0].device != "cpu" else f", {count} thread{'' if count == 1 else 's'}"
                _panel(panel, [t for t in ours if (t.dtype, t.threads) == (dtype, count)], dtype + where)
            axes[0].set_ylabel("invref's time / torch's")
        for panel in panels[-1]:
            panel.set_xlabel("elements")
        _scale(panels[0][0], [t.ratio for t in ours if t.ratio])
        panels[0][0].legend(frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=10)
    return figure


def svg(timings: Sequence[Timing], title: str) -> str:
    """The picture's text."""
    return drawing.svg(draw(timings, title))


def _scale(axes: Axes, ratios: Sequence[Spread]) -> None:
    """A straight axis where ratios are near each other, a logarithmic one where they are not."""
    low, high = min(1.0, *(r.low for r in ratios)), max(1.0, *(r.high for r in ratios))
    if high < STRAIGHT * low:
        room = (high - low) / 20 or 0.05
        axes.set_ylim(low - room, high + room)
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.1, high * 1.1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _panel(axes: Axes, timings: list[Timing], title: str) -> None:
    names = list(dict.fromkeys(t.activation for t in timings))
    last = {t.activation: t.ratio.middle for t in sorted(timings, key=lambda t: t.n) if t.ratio}
    ranked = sorted(names, key=lambda name: last[name])
    named = names if len(names) <= NAMED else [*ranked[:2], *ranked[-2:]]
    axes.axhline(1, color=INK, lw=1.2, ls="--")
    for name in names:
        points = sorted((t for t in timings if t.activation == name), key=lambda t: t.n)
        n = [t.n for t in points]
        spreads = [t.ratio for t in points if t.ratio]
        place = named.index(name) if name in named else None
        colour = SOFT if place is None else COLOURS[place]
        middles = [s.middle for s in spreads]
        if place is None:
            axes.plot(n, middles, color=colour, lw=0.7)
        else:
            axes.plot(n, middles, color=colour, lw=1.4, marker=MARKS[place], ms=4, label=name)
            axes.fill_between(n, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    sizes = sorted({t.n for t in timings})
    axes.set_xticks(sizes if len(sizes) <= 8 else sizes[:: -(-len(sizes) // 8)])
    axes.xaxis.set_major_formatter(FuncFormatter(_elements))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=GRID, lw=0.5)
    axes.set_title(title)


def _elements(value: float, _place: int) -> str:
    n = round(value)
    return f"$2^{{{n.bit_length() - 1}}}$" if n > 0 and n & (n - 1) == 0 else f"{n:,}"
