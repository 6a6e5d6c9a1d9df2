"""The README's picture: the derivative as a function of the output, and the error along x beside the floor.

`python -m verify.figure` writes docs/gelu.svg, the same bytes each time on one machine. Everything drawn is computed
from the formula and the layer; nothing is sketched.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from invref import decoders, formats, formulas
from invref.engines import TORCH
from invref.kernels import naive, newton
from verify import batches, floor, measure, targets

PATH = Path(__file__).parents[1] / "docs" / "gelu.svg"
LEFT, RIGHT, NATIVE, INK = "#c2410c", "#1d4ed8", "#9ca3af", "#374151"
NEIGHBOURS = 4096

Floats = NDArray[np.float64]


def _curve(x: torch.Tensor) -> tuple[Floats, Floats]:
    """f and f' at float64 inputs."""
    formula = formulas.get("gelu")
    return formula.evaluate(x, TORCH).numpy(), formula.evaluate(x, TORCH, order=1).numpy()


def _branches(axes: Axes) -> None:
    turning = float(decoders.load("gelu").turning_x)
    left = _curve(torch.linspace(-6, turning, 400, dtype=torch.float64))
    right = _curve(torch.linspace(turning, 1.6, 400, dtype=torch.float64))
    axes.plot(*left, color=LEFT, lw=2)
    axes.plot(*right, color=RIGHT, lw=2)
    axes.plot(left[0][-1:], [0], "o", color=INK, ms=5)
    axes.annotate("turning point", (left[0][-1], 0), (0.16, 0.1), ha="left", color=INK,
                  arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.7, "shrinkB": 4})  # fmt: skip
    axes.annotate("side bit 1", (0.42, 0.8), color=RIGHT)
    axes.annotate("side bit 0", (0.03, -0.11), color=LEFT)
    axes.set(xlabel="stored output y", ylabel="derivative decoded from y", title="GELU's gradient from its output")
    axes.set(xlim=(-0.25, 1.6), ylim=(-0.22, 1.22))


def _errors_around(centres: Floats) -> tuple[Floats, Floats, Floats]:
    """Worst errors of consecutive inputs around each centre: torch's, ours, and the exact inverse's."""
    target, fmt, decoder = targets.TARGETS["gelu"], formats.get("float32"), decoders.load("gelu")
    x = torch.cat([fmt.tensor(fmt.ordinal(c) - NEIGHBOURS // 2, NEIGHBOURS) for c in centres])
    slopes = _curve(x.double())[1]
    y, ours = batches.together(target.layer, x)
    native = batches.together(target.native, x)[1]
    exact = newton.derivative(decoder, y.double(), naive.side_of(decoder, x))
    worst = [np.abs(dx.double().numpy() - slopes).reshape(-1, NEIGHBOURS).max(1) for dx in (native, ours, exact)]
    return worst[0], worst[1], worst[2]


def _floor(turning: float) -> float:
    """The error floor over the inputs around the turning point, where it is highest."""
    target, fmt = targets.TARGETS["gelu"], formats.get("float32")
    x = fmt.tensor(fmt.ordinal(turning) - measure.WINDOW, 2 * measure.WINDOW)
    codes = 2 * fmt.ordinals(batches.together(target.layer, x)[0]) + naive.side_of(decoders.load("gelu"), x)
    return floor.exact(codes.numpy(), _curve(x.double())[1])


def _errors(axes: Axes) -> None:
    turning = float(decoders.load("gelu").turning_x)
    # An even number of points: zero, around which floats crowd, is none of them.
    centres = np.union1d(np.linspace(-6, 4, 400), turning)
    native, ours, exact = _errors_around(centres)
    highest = _floor(turning)
    axes.axhline(highest, color=INK, lw=0.8, ls="--")
    axes.annotate(f"error floor, {highest:.2e}", (-5.9, highest * 1.4), color=INK)
    axes.semilogy(centres, exact, color=LEFT, lw=2.2, alpha=0.45, label="exact inverse of the stored y")
    axes.semilogy(centres, ours, color=RIGHT, lw=1.2, label="this layer's backward")
    axes.semilogy(centres, native, color=NATIVE, lw=1.2, label="torch's backward, which keeps x")
    axes.set(xlabel="input x", ylabel="gradient error", title=f"GELU in float32: worst of {NEIGHBOURS:,} neighbours")
    axes.set(xlim=(-6, 4), ylim=(1e-13, 1e-3))
    axes.legend(loc="lower left", frameon=False)


def draw() -> Figure:
    """The picture."""
    style = {"font.size": 9, "svg.hashsalt": "invref", "axes.titlesize": 10, "axes.spines.top": False,
             "axes.spines.right": False}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
        branches, errors = figure.subplots(1, 2)
        _branches(branches)
        _errors(errors)
    return figure


def main() -> None:
    """Writes the picture."""
    with mpl.rc_context({"svg.hashsalt": "invref"}):
        draw().savefig(PATH, metadata={"Date": None})


if __name__ == "__main__":
    main()
