"""What a report draws, measured: curves, errors column by column, the codes around a turning point, special inputs.

Guarantees that every finite input of a 16-bit format is in one column, that float32's columns hold runs of
neighbours and all that lies close to a landmark, and the same numbers on every run. Must not know pictures or verdicts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from invref import formats
from invref.engines import TORCH
from invref.errors import ProofError
from invref.formats import Format
from invref.formulas import Formula
from invref.pieces import limit, turning_points
from verify import batches
from verify.oracle import FLOAT32, Oracle
from verify.plots import thin
from verify.record import RELATIVE
from verify.sweep32 import inputs_at
from verify.targets import Target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REACH, BEND, COLUMNS = 100.0, 0.03, 160
"""The error picture's axis: symmetric-log from -REACH to REACH; the outermost columns hold all that lies beyond."""
NEIGHBOURS = 2048
WINDOW = 1 << 15
BELOW, ABOVE = 4, 9
"""The zoom shows codes from `BELOW` ulp outside to `ABOVE` ulp inside the turning value."""
SETTLED = 0.02
FARTHEST_DRAWN = 8.0
POINTS = 500
FINE = 6e-4
"""Curves are thinned until straight lines miss them by this share of the picture."""


def short(value: float, digits: int = 4) -> float | None:
    """`value` to a few digits for the page's data; None where it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Run:
    """Inputs of one format and what came out, as float64 arrays (n,); `piece` is -1 for inputs exactly at a break."""

    fmt: Format
    x: Floats
    y: Floats
    codes: Ints
    dx: Floats
    native: Floats
    slope: Floats
    piece: Ints

    def near(self, chosen: NDArray[np.bool_]) -> Run:
        """The inputs chosen."""
        arrays = (getattr(self, name)[chosen] for name in ("x", "y", "codes", "dx", "native", "slope", "piece"))
        return Run(self.fmt, *arrays)


class Measured:
    """The numbers behind one activation's pictures."""

    def __init__(self, target: Target, oracle: Oracle, scale: str) -> None:
        self.target, self.oracle, self.relative = target, oracle, scale == RELATIVE
        self.formula: Formula = target.formula
        self._runs: dict[str, Run] = {}

    def errors(self, fmt: Format) -> dict[str, Any]:
        """Per column the largest floor, error of ours and native error; None where a column has none finite.

        Inputs exactly at a jump of f', where any slope between the two sides will do, are left out.
        """
        run = self._run(fmt)
        size = np.maximum(1.0, np.abs(run.slope)) if self.relative else np.ones(1)
        kept = (run.piece >= 0) & (np.isfinite(run.y) | (not self.relative))
        column = np.clip(((_bent(run.x) / _bent(REACH) + 1) * COLUMNS / 2).astype(int), 0, COLUMNS - 1)
        worst = {
            "floor": self._floors(run),
            "ours": np.abs(run.dx - run.slope) / size,
            "native": np.abs(run.native - run.slope) / size,
        }
        curves = {}
        for name, values in worst.items():
            most = np.full(COLUMNS, -np.inf)
            good = np.isfinite(values) & kept
            np.maximum.at(most, column[good], values[good])
            curves[name] = [short(v, 3) for v in most.tolist()]
        lost = {
            name: np.unique(column[kept & ~np.isfinite(values)]).tolist()
            for name, values in (("ours", run.dx), ("native", run.native))
        }
        return {"inputs": int(run.x.size), **curves, "nonfinite_columns": lost}

    def zoom(self, fmt: Format, index: int) -> list[list[float | int | None]]:
        """Codes around turning point `index`: rows of ulps from y*, piece, least and largest f' and decoded ones."""
        point = turning_points(self.formula)[index]
        left = point.index
        ulp = fmt.ulp(float(point.y))
        if not point.y or ulp <= 2.0 ** (fmt.emin - fmt.precision + 2):
            return []
        run = self._run(fmt)
        high = float(point.y)
        distance = ((run.y - high) - float(point.y - high)) / ulp * (1 if point.minimum else -1)
        chosen = (distance > -BELOW) & (distance < ABOVE) & ((run.piece == left) | (run.piece == left + 1))
        near, distance = run.near(chosen), distance[chosen]
        rows: list[list[float | int | None]] = []
        for piece in (left, left + 1):
            for code in np.unique(near.codes[near.piece == piece]):
                same = (near.codes == code) & (near.piece == piece)
                slopes, decoded = near.slope[same], near.dx[same]
                ends = (slopes.min(), slopes.max(), decoded.min(), decoded.max())
                rows.append([short(distance[same][0]), piece, *(short(float(v), 5) for v in ends)])
        return rows

    def curves(self) -> list[dict[str, Any]]:
        """f and f' on each piece, thinned, over the part of the line where something happens."""
        low, high = self.drawn
        result = []
        for part in self.oracle.ranges:
            left, right = max(low, float(part.piece.left)), min(high, float(part.piece.right))
            if not left < right:
                continue
            gap = (right - left) * 1e-9
            x = np.linspace(left + gap, right - gap, POINTS)
            f, slope = self._exact(x, 0), self._exact(x, 1)
            kept = thin(x / (high - low), f / self._span(0), FINE) | thin(x / (high - low), slope / self._span(1), FINE)
            kept |= thin(f / self._span(0), slope / self._span(1), FINE)
            rows = [[short(float(v), 5) for v in values[kept]] for values in (x, f, slope)]
            result.append({"piece": part.piece.index, "x": rows[0], "f": rows[1], "slope": rows[2]})
        return result

    def decoded(self) -> list[list[float | int | None]]:
        """Rows (piece, y, dx) of the layer in float32 at inputs spread over what `curves` shows."""
        x = torch.linspace(*self.drawn, 45).float()
        y, dx = batches.together(self.target.layer, x)
        pieces = self._pieces(FLOAT32.ordinals(x).numpy())
        rows = zip(pieces.tolist(), y.double().tolist(), dx.double().tolist(), strict=True)
        return [[piece, short(a, 5), short(b, 5)] for piece, a, b in rows]

    @cached_property
    def drawn(self) -> tuple[float, float]:
        """The part of the line that is drawn: where f' is further than `SETTLED` from its limits, and a margin."""
        grid = np.linspace(-FARTHEST_DRAWN, FARTHEST_DRAWN, 1601)
        slopes = self._exact(grid, 1)
        ends = []
        for sign, order in ((-1, 1), (+1, -1)):
            final = float(limit(self.formula, sign, 1))
            unsettled = np.flatnonzero(~(np.abs(slopes - final) < SETTLED))[::order]
            ends.append(float(grid[unsettled[0]]) if unsettled.size and math.isfinite(final) else sign * 4.0)
        left, right = min(ends[0], -2.0), max(ends[1], 2.0)
        margin = 0.12 * (right - left)
        return round(left - margin, 2), round(right + margin, 2)

    def special(self, fmt: Format) -> list[dict[str, Any]]:
        """What happens at the ends of the format: the zeros, subnormals, the largest values, infinities, NaN."""
        smallest, normal = 2.0 ** (fmt.emin - fmt.precision + 1), 2.0**fmt.emin
        largest = fmt.value(fmt.largest_ordinal)
        named = [("+0", 0.0), ("−0", -0.0)]
        for name, value in (("smallest subnormal", smallest), ("smallest normal", normal), ("largest", largest),
                            ("inf", math.inf)):  # fmt: skip
            named += [(f"+{name}", value), (f"−{name}", -value)]
        rows = []
        for name, value in [*named, ("NaN", math.nan)]:
            x = torch.full((batches.VECTOR,), value, dtype=torch.float64).to(fmt.dtype)
            y, dx = batches.together(self.target.layer, x)
            native = batches.together(self.target.native, x)[1]
            exact = self._slope(np.array([value]))[0] if math.isfinite(value) else math.nan
            if math.isinf(value):
                exact = float(limit(self.formula, int(math.copysign(1, value)), 1))
            numbers = (float(y[0]), float(dx[0]), float(native[0]), exact)
            rows.append(
                {"input": name, **dict(zip(("y", "ours", "native", "exact"), map(_text, numbers), strict=True))}
            )
        return rows

    def _exact(self, x: Floats, order: int) -> Floats:
        values: Floats = self.formula.evaluate(torch.from_numpy(x), TORCH, order).numpy()
        return values

    def _span(self, order: int) -> float:
        low, high = self.drawn
        values = self._exact(np.linspace(low, high, POINTS), order)
        return float(np.nanmax(values) - np.nanmin(values)) or 1.0

    def _pieces(self, ordinals: Ints) -> Ints:
        """The piece of each float32 ordinal, -1 between pieces."""
        first = np.array([part.first for part in self.oracle.ranges])
        stop = np.array([part.stop for part in self.oracle.ranges])
        index = np.array([part.piece.index for part in self.oracle.ranges])
        at = np.clip(np.searchsorted(first, ordinals, side="right") - 1, 0, None)
        return np.where((ordinals >= first[at]) & (ordinals < stop[at]), index[at], -1)

    def _slope(self, x: Floats) -> Floats:
        try:
            return self.oracle.derivative(x.astype(np.float32))
        except ProofError:
            return self._exact(x, 1)

    def _run(self, fmt: Format) -> Run:
        if fmt.name not in self._runs:
            self._runs[fmt.name] = self._measured(fmt)
        return self._runs[fmt.name]

    def _measured(self, fmt: Format) -> Run:
        x = fmt.tensor(fmt.first_ordinal, fmt.finite_count) if fmt.bits == 16 else self._neighbours()
        padded = torch.cat([x, x[-1:].expand(-x.numel() % batches.VECTOR)])
        y, dx = (values[: x.numel()] for values in batches.together(self.target.layer, padded))
        native = batches.together(self.target.native, padded)[1][: x.numel()]
        wide = x.double().numpy()
        arrays = (values.double().numpy() for values in (y, dx, native))
        values, ours, theirs = arrays
        piece = self._pieces(FLOAT32.ordinals(x.float()).numpy())
        codes = fmt.ordinals(y).numpy()
        return Run(fmt, wide, values, codes, ours, theirs, self._slope(wide), piece)

    def _neighbours(self) -> torch.Tensor:
        """float32: consecutive inputs around the middle of each column, and around 0 and every end of a piece."""
        step = 2 * _bent(REACH) / COLUMNS
        bent = -_bent(REACH) + step * (np.arange(COLUMNS) + 0.5)
        middles = FLOAT32.ordinals(torch.from_numpy(np.sign(bent) * np.expm1(np.abs(bent)) * BEND).float()).numpy()
        ends = [FLOAT32.first_ordinal + NEIGHBOURS, FLOAT32.largest_ordinal - NEIGHBOURS, 0]
        near = np.concatenate([middles, ends])[:, None] + np.arange(-NEIGHBOURS // 2, NEIGHBOURS // 2)
        marks = np.array([part.first for part in self.oracle.ranges[1:]], dtype=np.int64)
        around = marks[:, None] + np.arange(-WINDOW, WINDOW)
        return inputs_at(np.unique(np.concatenate([near.ravel(), around.ravel()])))

    def _floors(self, run: Run) -> Floats:
        """For each input half the width of f' over all inputs of the run with its stored pair; NaN at breaks."""
        codes = getattr(self.target, "codes", None) or tuple(range(len(self.oracle.ranges)))
        side = np.where(run.piece >= 0, np.array(codes)[run.piece], -1)
        pairs = run.codes * (max(codes) + 2) + side
        _, group = np.unique(pairs, return_inverse=True)
        least, most = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
        np.fmin.at(least, group, run.slope)
        np.fmax.at(most, group, run.slope)
        size = np.maximum(1, np.abs(least)) + np.maximum(1, np.abs(most)) if self.relative else 2.0
        with np.errstate(invalid="ignore"):
            floors: Floats = np.where(side >= 0, ((most - least) / size)[group], np.nan)
        return floors


def _bent(x: Any) -> Any:
    return np.sign(x) * np.log1p(np.abs(x) / BEND)


def _text(value: float) -> str:
    """A number to four digits."""
    if math.isnan(value):
        return "NaN"
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), f"{value:.4g}").replace("-", "−")


def formats_drawn() -> tuple[Format, ...]:
    """The formats that have an error picture and a zoom."""
    return tuple(formats.get(name) for name in ("bfloat16", "float16", "float32"))
