"""What an activation with a binned decoder stores for each dtype, and how the gradient comes back from it.

16-bit formats decode by a table over all stored codes, float32 by bins with the lowest codes at turning values
calibrated on the forward, float64 by solving f(x) = y in a bracket. Must not know formulas: it is given functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from invref.bins import Bins
from invref.kernels import binned, codes, dispatch, solve
from invref.kernels.scheme import Coded, CodeOf, Scheme, Tabled, packed, parts

Function = Callable[[Tensor], Tensor]

FARTHEST = 1000
"""Brackets for float64 reach to 2^FARTHEST, where f is finite there."""
CHECKED = 2.0**127
NEAREST = -60
PER_OCTAVE = 4


@dataclass(frozen=True)
class Binned:
    """Float32 outputs decoded by bins: compiled on the CPU, plain torch operations elsewhere, the same bits."""

    tables: binned.Tables
    edges: tuple[float, ...]
    bits: int
    keeps_output: bool = field(default=True, init=False)
    kind: str = field(default="binned polynomials", init=False)

    def pack(self, x: Tensor) -> Tensor | None:
        """The side codes of x, packed plane by plane."""
        if self.bits and dispatch.fast(x):
            from invref.kernels import binned_cpu

            return binned_cpu.pack(self.edges, self.bits, x)
        return packed(lambda part: binned.code_of(self.edges, part), self.bits, x.reshape(-1).contiguous())

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy times the derivative."""
        assert y is not None
        if dispatch.fast(y, dy, packed):
            from invref.kernels import binned_cpu

            return binned_cpu.backward(self.tables, dy, y, packed, self.bits)
        dy = dy.reshape(-1).contiguous()
        dx = torch.empty_like(dy)
        for part, sides in parts(dy.numel(), packed, self.bits, dy.device):
            sides = torch.zeros_like(y[part], dtype=torch.uint8) if sides is None else sides
            dx[part] = dy[part] * binned.derivative(self.tables, y[part], sides)
        return dx


def scheme(
    bins: Bins, forward: Function, value: Function, slope: Function, dtype: torch.dtype, device: torch.device
) -> Scheme:
    """The scheme of one dtype on one device.

    forward: the layer's, in that dtype; value and slope: f and f' of float64 tensors.
    """
    edges = binned.thresholds(bins, dtype)
    code_of = sides_of(edges)
    if dtype == torch.float64:
        return Coded("solved in float64", Solved(bins, value, slope), bins.bits, code_of)
    if dtype == torch.float32:
        return Binned(calibrated(bins, forward, slope, device), edges, bins.bits)
    breaks = [float(edge.at) for edge in bins.edges]
    table = codes.table(forward, slope, code_of, bins.sides, dtype, device, breaks, slices=False)
    return Tabled("table of all codes", lambda _: table, bins.bits, code_of)


def sides_of(edges: tuple[float, ...]) -> CodeOf | None:
    """The function from inputs to side codes; None where there is one code only."""
    return (lambda x: binned.code_of(edges, x)) if edges else None


def calibrated(bins: Bins, forward: Function, slope: Function, device: torch.device) -> binned.Tables:
    """The decoder's float32 tables on a device, with the lowest codes counted on that device's forward."""
    tables = binned.tables(bins)
    code_of = sides_of(binned.thresholds(bins, torch.float32))
    first, count, at = (torch.zeros_like(tables.lowest_first) for _ in range(3))
    values: list[Tensor] = []
    for code in range(bins.sides):
        for slot, cell in enumerate(bins.cells_of(code)):
            if cell.at is None:
                continue
            found = codes.lowest(
                forward, slope, code_of, bins.sides, float(cell.at), float(cell.anchor), device=device, slices=False
            )
            row = found.values[code].cpu()
            index = code * tables.slots + slot
            first[index], count[index], at[index] = found.first, len(row), sum(map(len, values))
            values.append(row)
    lowest = torch.cat(values) if values else tables.lowest
    return replace(tables, lowest_first=first, lowest_count=count, lowest_at=at, lowest=lowest).to(device)


@dataclass(frozen=True, eq=False)
class Solved:
    """The derivative in float64: x from f(x) = y by bracketed Newton steps on the piece of the code, then f'(x)."""

    bins: Bins
    value: Function
    slope: Function
    knots: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def __call__(self, y: Tensor, sides: Tensor | None) -> Tensor:
        """f' of float64 outputs (n,) with their side codes; NaN for NaN only."""
        return self.at_input(self.slope, y, sides)

    def at_input(self, function: Function, y: Tensor, sides: Tensor | None) -> Tensor:
        """A function of the input, f' or a higher derivative, for outputs (n,); 0 where f is constant on a piece."""
        found = torch.empty_like(y)
        for code in range(self.bins.sides):
            here = torch.ones_like(y, dtype=torch.bool) if sides is None else sides == code
            found[here] = solve.steadily(lambda part, code=code: self._on(code, function, part), y[here])
        return found

    def _on(self, code: int, function: Function, y: Tensor) -> Tensor:
        xs, ys = (knots.to(y.device) for knots in self._knots(code))
        if len(xs) < 2 or bool(ys[0] == ys[-1]):
            return torch.where(y.isnan(), y, 0.0)
        held = y.clamp(float(ys[0]), float(ys[-1]))
        lower, upper = solve.bracketed(held, xs, ys)
        x = solve.inverse(held, self.value, self.slope, lower, upper, bool(xs[-1] > xs[0]))
        return torch.where(y.isnan(), y, function(x))

    def _knots(self, code: int) -> tuple[Tensor, Tensor]:
        """Inputs of one code, and their outputs in ascending order."""
        if code not in self.knots:
            edges = binned.thresholds(self.bins, torch.float64)
            infinity = torch.tensor(torch.inf, dtype=torch.float64)
            low = torch.nextafter(torch.tensor(edges[code - 1], dtype=torch.float64), infinity) if code else -infinity
            high = torch.tensor(edges[code], dtype=torch.float64) if code < len(edges) else infinity
            steps = torch.arange(NEAREST * PER_OCTAVE, FARTHEST * PER_OCTAVE, dtype=torch.float64) / PER_OCTAVE
            distance = torch.exp2(steps)
            ends = [end for end in (low, high) if end.isfinite()] or [torch.zeros((), dtype=torch.float64)]
            x = torch.cat([torch.stack(ends), *(end + s * distance for end in ends for s in (-1, 1))])
            x = x[(x >= low) & (x <= high)].unique()
            y = self.value(x)
            x, y = x[y.isfinite()], y[y.isfinite()]
            near = x.abs() <= CHECKED
            falls = bool(y[near][-1] < y[near][0])
            steps = (y[1:] - y[:-1]) * (-1 if falls else 1)
            if bool((steps < 0).logical_and(~(near[1:] & near[:-1])).any()):
                # Out there the formula cancels, and only float32's range is looked after.
                x, y = x[near], y[near]
            if falls:
                x, y = x.flip(0), y.flip(0)
            self.knots[code] = x, torch.cummax(y, 0).values
        return self.knots[code]
