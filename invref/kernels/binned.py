"""The binned decoder to read: from a stored output and its side code to the derivative, in plain torch operations.

The compiled kernel agrees with it bit for bit. Float32 arithmetic without fused multiply-adds, any device. Must not
know formulas or how the tables were made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invref.bins import TERMS, Bins, Cell
from invref.decoders import nearest

EXPONENTS = 256
MANTISSA = 23
MASK = (1 << MANTISSA) - 1
ONE = 0x3F800000
"""Bit pattern of 1.0: with a mantissa below it, a float in [1, 2)."""
SPLIT_BITS = 5


@dataclass(frozen=True, eq=False)
class Tables:
    """A decoder laid out for lookup; `slots` cells for each side code, those that do not exist start at infinity.

    `octaves` (cells * 256): first row of the octave, shifted left by SPLIT_BITS, plus its number of splits. The lowest
    codes of a cell, ordinals from `lowest_first` on, `lowest_count` of them, decode to `lowest` from `lowest_at` on.
    """

    slots: int
    start: Tensor
    high: Tensor
    low: Tensor
    side: Tensor
    octaves: Tensor
    rows: Tensor
    lowest_first: Tensor
    lowest_count: Tensor
    lowest_at: Tensor
    lowest: Tensor

    def to(self, device: torch.device) -> Tables:
        """The same tables on another device."""
        moved: dict[str, Any] = {
            key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def _linear(cell: Cell, exponent: int) -> list[float]:
    """base + slope * d on one octave, as a polynomial of its z; biased exponent 0 holds zero and the subnormals."""
    if exponent == 0:
        # Rounded once and then doubled: at d = 0, where z = -1/2, both cancel and leave base.
        half = float(np.float32(cell.slope * 2.0**-127))
        return [cell.base + half, 2 * half, *[0.0] * (TERMS - 2)]
    middle, width = 1.5, 2.0 ** (exponent - 127)
    return [cell.base + cell.slope * middle * width, cell.slope * width, *[0.0] * (TERMS - 2)]


def _rows(cell: Cell, first_row: int) -> tuple[list[int], np.ndarray]:
    """The octave table of one cell, and its rows, numbered from `first_row` on."""
    start, octaves = cell.first + 127, []
    below = np.array([_linear(cell, e) for e in range(start)], dtype=np.float64).reshape(-1, TERMS)
    octaves = [(first_row + e) << SPLIT_BITS for e in range(start)]
    row = first_row + start
    for splits in cell.splits:
        octaves.append(row << SPLIT_BITS | splits)
        row += 1 << splits
    octaves += [row << SPLIT_BITS] * (EXPONENTS - len(octaves))
    above = np.array([[cell.limit, *[0.0] * (TERMS - 1)]])
    return octaves, np.concatenate([below, cell.coefficients, above]).astype(np.float32)


@cache
def tables(bins: Bins) -> Tables:
    """The lookup tables of a decoder on the CPU, without lowest codes."""
    slots = max(len(bins.cells_of(code)) for code in range(bins.sides))
    octaves, rows, count = [], [], 0
    columns: list[tuple[float, float, float, float]] = []
    for code in range(bins.sides):
        cells = bins.cells_of(code)
        for slot in range(slots):
            cell = cells[min(slot, len(cells) - 1)]
            entries, found = _rows(cell, count)
            octaves += entries
            rows.append(found)
            count += len(found)
            high = nearest(cell.anchor, np.float32)
            low = nearest(cell.anchor - type(cell.anchor)(float(high)), np.float32)
            start = cell.start if slot < len(cells) else float("inf")
            columns.append((start, float(high), float(low), float(cell.side)))
    start_, high_, low_, side_ = (torch.tensor(c, dtype=torch.float32) for c in zip(*columns, strict=True))
    nothing = torch.zeros(len(columns), dtype=torch.int32)
    return Tables(
        slots=slots,
        start=start_,
        high=high_,
        low=low_,
        side=side_,
        octaves=torch.tensor(octaves, dtype=torch.int32),
        rows=torch.from_numpy(np.concatenate(rows)),
        lowest_first=nothing,
        lowest_count=nothing,
        lowest_at=nothing,
        lowest=torch.zeros(1),
    )


def derivative(t: Tables, y: Tensor, codes: Tensor) -> Tensor:
    """f' in float32, shape of y; y: float32, codes: integers of the same shape. NaN comes out for y = NaN only."""
    cell = codes.long() * t.slots
    first = cell
    for slot in range(1, t.slots):
        cell = cell + (y >= t.start[first + slot])
    d = ((y - t.high[cell]) - t.low[cell]) * t.side[cell]
    d = torch.where(d > 0, d, 0.0)

    bits = d.view(torch.int32)
    entry = t.octaves[cell * EXPONENTS + (bits >> MANTISSA)]
    mantissa, splits = bits & MASK, entry & ((1 << SPLIT_BITS) - 1)
    row = (entry >> SPLIT_BITS) + (mantissa >> (MANTISSA - splits))
    z = (((mantissa << splits) & MASK) | ONE).view(torch.float32) - 1.5

    value = t.rows[row, TERMS - 1]
    for k in range(TERMS - 2, -1, -1):
        value = value * z + t.rows[row, k]

    pattern = y.view(torch.int32)
    ordinal = torch.where(pattern < 0, pattern ^ 0x7FFFFFFF, pattern)
    place = ordinal.long() - t.lowest_first[cell]
    lowest = (place >= 0) & (place < t.lowest_count[cell])
    value = torch.where(lowest, t.lowest[torch.where(lowest, t.lowest_at[cell] + place, 0)], value)
    return torch.where(torch.isnan(y), y, value)


def code_of(edges: tuple[float, ...], x: Tensor) -> Tensor:
    """Side codes, uint8, of inputs x: how many edges (the largest inputs on the left) lie below each."""
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    for edge in edges:
        codes += wide > edge
    return codes


def thresholds(bins: Bins, dtype: torch.dtype) -> tuple[float, ...]:
    """The edges of a decoder for inputs of a dtype: floats of float32 also serve what is narrower."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    return tuple(float(edge.threshold(kind)) for edge in bins.edges)
