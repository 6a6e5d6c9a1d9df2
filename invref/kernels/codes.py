"""Decoding by table: what each stored code stands for, counted on the forward kernel itself.

In a 16-bit format there are 65,536 outputs and a few side codes: every finite input goes through the forward, once in
a long tensor (vector code) and once in short slices (its scalar tail), and each pair (output, side code) decodes to the
middle of the derivatives of the inputs that gave it. No decoder of that pair can be better: the error floor is met by
construction. In float32 the same is done for the few outputs at a turning value, where thousands of inputs share one.
Must not know formulas or parameters: it is given functions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from invref.formats import BY_DTYPE, FORMATS, Format

Forward = Callable[[Tensor], Tensor]
CodeOf = Callable[[Tensor], Tensor]
"""Inputs (n,) -> their side codes, bool or uint8 (n,)."""
Slope = Callable[[Tensor], Tensor]
"""Inputs as float64 (n,) -> f'(x) as float64 (n,), for ±inf and NaN what the framework's layer gives as gradient."""

Array = npt.NDArray[np.float64]

_ONE_AT_A_TIME = threading.Lock()

PATTERNS = 1 << 16
PAIR = 32
"""Bytes of two of the smallest vector registers, as torch's loops take them: less goes through the scalar tail."""
WIDEST = 64
"""No vector register holds more elements of 16 bits and the unrolled loop around it."""
SPAN = 7
"""How many ulp around a turning value are decoded by table in float32."""
NOTHING = 2.0**-24
"""An error that float32 arithmetic makes anyway near 1."""
FAVOUR = 0.05
"""By how much of the floor the scalar tail's error may grow for the sake of the vector code."""
MOST_INPUTS = 1 << 18
"""Windows of more inputs are sampled at regular steps."""


def table(
    forward: Forward,
    slope: Slope,
    code_of: CodeOf | None,
    sides: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    breaks: Sequence[float] = (),
    slices: bool = True,
) -> Tensor:
    """The derivative for every side code and 16-bit pattern of the output, float32 of shape (sides, 65536).

    Inputs equal to a break count only where no other input gives the same code. Codes that no input gives are
    interpolated between their neighbours. The value is finite for every code that a finite input gives.
    """
    return tables(forward, (slope,), code_of, sides, dtype, device, breaks, slices)[0]


def tables(
    forward: Forward,
    slopes: Sequence[Slope],
    code_of: CodeOf | None,
    sides: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    breaks: Sequence[float] = (),
    slices: bool = True,
) -> Tensor:
    """`table` for several functions of the input in one pass: float32 of shape (len(slopes), sides, 65536)."""
    fmt = BY_DTYPE[dtype]
    x = fmt.tensor(fmt.first_ordinal, fmt.finite_count).to(device)
    at_break = torch.isin(x.double(), torch.tensor(breaks, dtype=torch.float64, device=x.device))
    outputs = _outputs(forward, x, slices)
    cells = [(y.view(torch.uint16).to(torch.int64) + PATTERNS * _codes(code_of, x)).cpu().numpy() for y in outputs]
    aside = at_break.cpu().numpy()
    made = []
    for slope in slopes:
        derivative: Array = _finite(slope(x.double())).cpu().numpy()
        least, most = _extremes(sides * PATTERNS, [c[~aside] for c in cells], derivative[~aside])
        if aside.any():
            others = _extremes(sides * PATTERNS, [c[aside] for c in cells], derivative[aside])
            empty = least > most
            least[empty], most[empty] = others[0][empty], others[1][empty]
        values = _middles(least, most, fmt).reshape(sides, PATTERNS)
        _fill(values, fmt)
        _special(values, least <= most, forward, slope, code_of, fmt, x.device)
        made.append(torch.from_numpy(values.astype(np.float32)).to(device))
    return torch.stack(made)


def decode(table: Tensor, dy: Tensor, y: Tensor, codes: Tensor | None) -> Tensor:
    """dy times the table's derivative, rounded once to the dtype of dy; flat tensors of one 16-bit dtype."""
    return (dy.float() * look_up(table, y, codes)).to(dy.dtype)


def look_up(table: Tensor, y: Tensor, codes: Tensor | None) -> Tensor:
    """The derivative in float32 for outputs y of a 16-bit dtype and their side codes, both of shape (n,)."""
    index = y.view(torch.uint16).to(torch.int32)
    if codes is not None:
        index = index + (codes.to(torch.int32) << 16)
    return table.view(-1).index_select(0, index)


@dataclass(frozen=True, eq=False)
class Lowest:
    """What float32 outputs within a few ulp of a turning value decode to: values[side, ordinal - first]."""

    first: int
    values: Tensor

    def replace(self, g: Tensor, y: Tensor, codes: Tensor | None) -> Tensor:
        """g (n,) with the outputs y (n,) in the window decoded by table instead."""
        inside, values = self.find(y, codes)
        return torch.where(inside, values, g)

    def find(self, y: Tensor, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which outputs (n,) lie in the window, and what those decode to."""
        patterns = y.view(torch.int32)
        index = torch.where(patterns < 0, patterns ^ 0x7FFFFFFF, patterns) - self.first
        count = self.values.shape[1]
        inside = (index >= 0) & (index < count)
        index = index.clamp(0, count - 1)
        if codes is not None:
            index = index + codes.to(torch.int32) * count
        return inside, self.values.view(-1).index_select(0, index)


def astray(forward: Forward, turning_x: float, turning_y: float, device: torch.device | str = "cpu") -> float:
    """By how many ulp a float32 forward errs around the turning value, beside the same forward in float64."""
    fmt = FORMATS["float32"]
    x = _around(forward, fmt, turning_x, fmt.ordinal(turning_y), SPAN).to(device)
    errors = (forward(x).double() - forward(x.double())).abs()
    return float(errors.max()) / fmt.ulp(turning_y)


def lowest(
    forward: Forward,
    slope: Slope,
    code_of: CodeOf | None,
    sides: int,
    turning_x: float,
    turning_y: float,
    device: torch.device | str = "cpu",
    span: int = SPAN,
    slices: bool = True,
) -> Lowest:
    """The table for float32 outputs within `span` ulp of the turning value, from the float32 inputs around x*."""
    fmt = FORMATS["float32"]
    centre = fmt.ordinal(turning_y)
    x = _around(forward, fmt, turning_x, centre, 2 * span).to(device)
    slopes: Array = slope(x.double()).cpu().numpy()
    outputs = _outputs(forward, x, slices)
    count = 2 * span + 1
    codes = _codes(code_of, x).cpu()
    ranges = []
    for y in outputs:
        index = fmt.ordinals(y.cpu()) - (centre - span)
        inside = ((index >= 0) & (index < count)).numpy()
        cell = (index + codes * count).numpy()[inside]
        ranges.append(_extremes(sides * count, [cell], slopes[inside]))
    values = _shared(ranges).reshape(sides, count)
    for row in values:
        known = np.isfinite(row)
        if known.any():
            row[:] = np.interp(np.arange(count), np.flatnonzero(known), row[known])
        else:
            row[:] = 0.0
    return Lowest(centre - span, torch.from_numpy(values.astype(np.float32)).to(device))


def _outputs(forward: Forward, x: Tensor, slices: bool) -> tuple[Tensor, ...]:
    """The outputs of the vector code, and of the scalar tail where there is one.

    On one thread: threads that wait for each other would make thousands of short calls slow on a busy machine.
    """
    if not (slices and x.is_cpu):
        return (forward(x),)
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            return forward(x), torch.cat([forward(part) for part in x.split(PAIR // x.element_size() - 1)])
        finally:
            torch.set_num_threads(threads)


def _codes(code_of: CodeOf | None, x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.int64, device=x.device) if code_of is None else code_of(x).to(torch.int64)


def _finite(derivative: Tensor) -> Tensor:
    largest = float(np.finfo(np.float32).max)
    return derivative.clamp(-largest, largest)


def _extremes(size: int, cells: list[npt.NDArray[np.int64]], slopes: Array) -> tuple[Array, Array]:
    least, most = np.full(size, np.inf), np.full(size, -np.inf)
    for cell in cells:
        np.minimum.at(least, cell, slopes)
        np.maximum.at(most, cell, slopes)
    return least, most


def _shared(ranges: list[tuple[Array, Array]]) -> Array:
    """The middle of what vector code and scalar tail give each cell, nearer to the former, which serves nearly all."""
    least, most = np.minimum.reduce([low for low, _ in ranges]), np.maximum.reduce([high for _, high in ranges])
    with np.errstate(invalid="ignore"):
        middle, vector = (least + most) / 2, (ranges[0][0] + ranges[0][1]) / 2
        shift = np.clip(vector - middle, -1, 1).clip(-FAVOUR * (most - least) / 2, FAVOUR * (most - least) / 2)
        shifted: Array = middle + np.nan_to_num(shift)
    return shifted


def _middles(least: Array, most: Array, fmt: Format) -> Array:
    """The middle of each cell's range, NaN where it is empty.

    A range that reaches 0 (to below what the format holds) is a plateau or the tail of a limit 0, and decodes to 0 with
    its sign where that costs no more than the error floor does elsewhere, or nothing that counts.
    """
    largest = fmt.value(fmt.largest_ordinal)
    values = np.full(len(least), np.nan)
    filled = np.flatnonzero(least <= most)
    least, most = least[filled], most[filled]
    middle = np.clip(least / 2 + most / 2, -largest, largest)
    pattern = filled % PATTERNS
    overflowed = (pattern == fmt.pattern(fmt.largest_ordinal) + 1) | (pattern == fmt.pattern(fmt.first_ordinal) + 1)
    # Relative to the derivative where it is above 1, lest that of an unbounded activation makes everything small.
    half = (most / 2 - least / 2) / np.maximum(abs(middle), 1)
    floor = np.max(half[~overflowed], initial=NOTHING)
    closest, farthest = np.minimum(abs(least), abs(most)), np.maximum(abs(least), abs(most))
    tail = (closest <= fmt.ulp(0.0) / 2) & (farthest <= floor) & (least * most >= 0)
    values[filled] = np.where(tail, np.copysign(0.0, middle), middle)
    return values


def _fill(values: Array, fmt: Format) -> None:
    """Interpolates each side's empty cells in the order of the outputs they stand for."""
    patterns = np.arange(PATTERNS)
    ordinals = np.where(patterns >= PATTERNS // 2, PATTERNS // 2 - 1 - patterns, patterns)
    order = np.argsort(ordinals)
    for row in values:
        known = order[~np.isnan(row[order])]
        empty = np.flatnonzero(np.isnan(row))
        row[empty] = np.interp(ordinals[empty], ordinals[known], row[known]) if len(known) else 0.0
    # Patterns beyond the infinities are NaN.
    infinity = fmt.largest_ordinal + 1
    values[:, np.abs(ordinals + 0.5) > infinity + 0.5] = np.nan


def _special(
    values: Array,
    produced: npt.NDArray[np.bool_],
    forward: Forward,
    slope: Slope,
    code_of: CodeOf | None,
    fmt: Format,
    device: torch.device,
) -> None:
    """What inputs ±inf and NaN decode to, where no finite input gives the same code."""
    x = torch.tensor([np.inf, -np.inf, np.nan], dtype=fmt.dtype, device=device)
    # In vector code, and each alone in scalar code, which may differ at an infinity.
    outputs = torch.cat([forward(x.repeat_interleave(WIDEST))[::WIDEST], *(forward(part) for part in x.split(1))])
    patterns = outputs.view(torch.uint16).to(torch.int64).cpu().numpy()
    slopes, sides = slope(x.double()).repeat(2).cpu().numpy(), _codes(code_of, x).repeat(2).cpu().numpy()
    nans = np.flatnonzero(torch.arange(PATTERNS).to(torch.uint16).view(fmt.dtype).isnan().numpy())
    for pattern, g, code in zip(patterns, slopes, sides, strict=True):
        cells = nans if pattern in nans else np.array([pattern])
        values[code, cells[~produced.reshape(values.shape)[code, cells]]] = g


def _around(forward: Forward, fmt: Format, turning_x: float, centre: int, span: int) -> Tensor:
    """Inputs on both sides of x* out to where the output has left the window of `span` ulp."""
    width = fmt.ulp(turning_x)
    limit = max(1.0, abs(turning_x))
    while width < limit:
        ends = torch.tensor([turning_x - width, turning_x + width], dtype=torch.float64).float()
        if ((fmt.ordinals(forward(ends)) - centre).abs() > span).all():
            break
        width *= 1.5
    first, last = fmt.ordinal(turning_x - width), fmt.ordinal(turning_x + width)
    if last - first < MOST_INPUTS:
        return fmt.tensor(first, last - first + 1)
    left, right = turning_x - width, turning_x + width
    x: Tensor = torch.linspace(left, right, MOST_INPUTS, dtype=torch.float64).float().unique()
    return x
