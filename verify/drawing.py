"""What pictures made with matplotlib have in common: colours, strokes and the file's text.

Guarantees the same bytes for the same figure. Must not know what is drawn.
"""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = ("#0b63c5", "#c2410c", "#007a5c", "#9b3f8f", "#7a6a00", "#374151")
"""Told apart by colour-blind readers, too."""
INK, SOFT, GRID = "#374151", "#9ca3af", "#e5e7eb"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def svg(figure: Figure, fonts: str = "path") -> str:
    """The figure's text; `fonts` is "path" for outlines of letters, or "none" for text."""
    with mpl.rc_context({"svg.hashsalt": "invref", "svg.fonttype": fonts}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is all that can be seen, and a space at a line's end says nothing.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), out.getvalue())
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
