"""The pictures of a training run, from its record alone: losses, what parts the arms, the outcome beside the margin.

Guarantees that an arm has the same colour and stroke in every picture, that what is not finite is marked, not drawn,
and the same bytes for the same record. Must not know how anything was trained or judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from verify import drawing
from verify.drawing import COLOURS, GRID, INK, SOFT
from verify.plots_scale import Scale
from verify.training_findings import NATIVE, Findings, Line, shown
from verify.training_record import Record, Run, Seed

Floats = NDArray[np.float64]

ARMS = ("inverted", "coarse", "twin", "flipped", "wrong", NATIVE)
"""In the order of the colours."""
STROKES = {NATIVE: (0, (1, 1)), "inverted": "-", "twin": (0, (4, 1.5)), "coarse": "-.",
           "flipped": (0, (6, 2, 1, 2, 1, 2)), "wrong": (0, (2, 1))}  # fmt: skip
WIDE, HIGH = 4.4, 3.2
"""Inches of a picture: on a phone its letters are as large as that page's smallest."""
POINTS = 40
"""Points of a curve of distances at most; each is the mean over as many steps as that takes."""
REACH = 8.0
"""Margins either side of 0 that the picture of the outcome shows at most."""


def pictures(record: Record, found: Findings | None) -> dict[str, str]:
    """The text of each picture by its name; without findings there is none of the outcome."""
    texts = {}
    for name, (draw, high) in _chosen(found).items():
        with mpl.rc_context(drawing.STYLE):
            figure = Figure(figsize=(WIDE, high), layout="constrained", facecolor="white")
            draw(figure, record)
        texts[name] = drawing.svg(figure, "none")
    return texts


def sheet(record: Record, found: Findings | None, title: str) -> str:
    """All pictures on one sheet."""
    chosen = list(_chosen(found).items())
    with mpl.rc_context(drawing.STYLE):
        rows = -(-len(chosen) // 2)
        figure = Figure(figsize=(2 * WIDE, HIGH * rows + 0.4), layout="constrained", facecolor="white")
        places = figure.subfigures(rows, 2, squeeze=False).ravel()
        for place, (name, (draw, _)) in zip(places, chosen, strict=False):
            draw(place, record)
            place.suptitle(name, fontsize=9, color=INK)
        figure.suptitle(title, fontsize=11)
    return drawing.svg(figure, "none")


def used(record: Record, found: Findings | None) -> tuple[Seed, ...]:
    """The seeds that the findings are about; a longer run may have left more in the file."""
    return record.seeds if found is None else record.seeds[: found.lines[0].test.seeds]


Draw = Callable[[FigureBase, Record], None]


def _chosen(found: Findings | None) -> dict[str, tuple[Draw, float]]:
    chosen: dict[str, tuple[Draw, float]] = {
        "loss of each step": (lambda figure, record: _losses(figure, used(record, found)), HIGH),
        "distance of the loss from native's": (lambda figure, record: _apart(figure, used(record, found)), HIGH),
        "distance of the parameters from native's": (
            lambda figure, record: _distances(figure, used(record, found)),
            HIGH,
        ),
    }
    if found is not None:
        chosen["outcome beside the margin"] = (lambda figure, _record: _outcome(figure, found), HIGH)
    return chosen


def _losses(figure: FigureBase, seeds: Sequence[Seed]) -> None:
    axes: Axes = figure.subplots()
    native = _of(seeds, NATIVE, _losses_of)
    steps = np.arange(1, native.shape[1] + 1)
    low, high = native.min(0), native.max(0)
    axes.fill_between(steps, low, high, color=_colour(NATIVE), alpha=0.15, lw=0, label="native, all seeds")
    for arm in _arms(seeds):
        _curve(axes, steps, _of(seeds, arm, _losses_of), arm)
    finite = native[np.isfinite(native)]
    if finite.size:
        # Native's losses fill the picture; an arm that leaves it has gone astray.
        room = (finite.max() - finite.min()) / 20 or 0.1
        axes.set_ylim(finite.min() - room, finite.max() + room)
    _finish(axes, "step; means over seeds", "loss")


def _apart(figure: FigureBase, seeds: Sequence[Seed]) -> None:
    axes: Axes = figure.subplots()
    native = _of(seeds, NATIVE, _losses_of)
    width = -(-native.shape[1] // POINTS)
    starts = np.arange(0, native.shape[1], width)
    # The middle of the steps that each point is the mean of.
    steps = (starts + np.minimum(starts + width, native.shape[1]) + 1) / 2
    lengths = np.diff(np.append(starts, native.shape[1]))
    for arm in _arms(seeds)[1:]:
        with np.errstate(invalid="ignore"):
            apart = np.abs(_of(seeds, arm, _losses_of) - native)
            _curve(axes, steps, np.add.reduceat(apart, starts, axis=1) / lengths, arm)
    over = f"seeds and {width} steps" if width > 1 else "seeds"
    _logarithmic(axes)
    _finish(axes, f"step; means over {over}", "|loss − native's|")


def _distances(figure: FigureBase, seeds: Sequence[Seed]) -> None:
    axes: Axes = figure.subplots()
    for arm in _arms(seeds)[1:]:
        _curve(axes, np.asarray(seeds[0].marks, float), _of(seeds, arm, lambda run: run.distances), arm, marker="o")
    _logarithmic(axes)
    _finish(axes, "step; means over seeds", "|parameters − native's| / |native's|")


def _outcome(figure: FigureBase, found: Findings) -> None:
    lines = [line for line in found.lines if line.level == "outcome"]
    quantities = list(dict.fromkeys(line.quantity for line in lines))
    for axes, quantity in zip(np.atleast_1d(figure.subplots(len(quantities), 1)), quantities, strict=True):
        _intervals(axes, [line for line in lines if line.quantity == quantity])


def _intervals(axes: Axes, lines: Sequence[Line]) -> None:
    margin = lines[0].test.margin
    ends = np.array([v for line in lines for v in (line.test.low, line.test.high)])
    reach = float(np.abs(ends[np.isfinite(ends)]).max(initial=0.0))
    if np.isfinite(margin) and margin > 0:
        axes.axvspan(-margin, margin, color=SOFT, alpha=0.25, lw=0)
        reach = min(max(reach, margin), REACH * margin)
    reach = 1.1 * reach or 1.0
    axes.axvline(0, color=SOFT, lw=0.8)
    for place, line in enumerate(lines):
        t, colour = line.test, _colour(line.arm)
        if np.isfinite([t.low, t.high]).all():
            axes.plot([t.low, t.high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot([t.mean], [place], "o", color=colour, ms=4.5)
            for end, mark in ((t.low, "<"), (t.high, ">")):
                if abs(end) > reach:
                    axes.plot([np.copysign(reach, end)], [place], mark, color=colour, ms=7, clip_on=False)
        verdict = t.verdict if np.isfinite(t.mean) else f"{t.verdict}: not finite"
        axes.text(1.02, place, verdict, transform=axes.get_yaxis_transform(), va="center", color=INK)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [line.arm for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    axes.set_xlabel(f"{lines[0].quantity} − native's; shaded: the margin, ±{shown(margin)}", color=INK)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _curve(axes: Axes, x: Floats, values: Floats, arm: str, marker: str = "") -> None:
    """The mean over seeds, as far as all of them are finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean = values.mean(0)
    whole = bool(np.isfinite(values).all())
    mean[~np.isfinite(mean)] = np.nan
    name = arm if whole else f"{arm} (not finite)"
    axes.plot(x, mean, color=_colour(arm), ls=STROKES.get(arm, "-"), lw=1.4, marker=marker, ms=3, label=name)
    finite = np.flatnonzero(np.isfinite(mean))
    if not whole and finite.size:
        axes.plot(x[finite[-1]], mean[finite[-1]], "x", color=_colour(arm), ms=7, mew=2)


def _logarithmic(axes: Axes) -> None:
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.zeros(0)])
    drawn = drawn[drawn > 0]
    if drawn.size:
        axes.set_yscale("log", nonpositive="mask")
        # Whole decades, so that there are two ticks at least.
        low, high = np.floor(np.log10(drawn.min())), np.ceil(np.log10(drawn.max()))
        scale = Scale(10.0**low, 10.0 ** max(high, low + 1), "log")
        axes.set_ylim(scale.low, scale.high)
        axes.set_yticks(*zip(*scale.ticks(), strict=True))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.text(0.5, 0.5, "no finite difference to show", transform=axes.transAxes, ha="center", color=INK)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", color=GRID, lw=0.5)
    axes.margins(x=0.02)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handlelength=2.6,
                columnspacing=1.2)  # fmt: skip


def _arms(seeds: Sequence[Seed]) -> list[str]:
    """Native first."""
    return [NATIVE, *(run.arm for run in seeds[0].runs if run.arm != NATIVE)]


def _of(seeds: Sequence[Seed], arm: str, numbers: Callable[[Run], Sequence[float]]) -> Floats:
    """What `numbers` gives of an arm's run: (seeds, n)."""
    return np.array([numbers(seed.run(arm)) for seed in seeds], np.float64)


def _losses_of(run: Run) -> Sequence[float]:
    return run.losses


def _colour(arm: str) -> str:
    return COLOURS[ARMS.index(arm)] if arm in ARMS else SOFT
