"""A formula's value or slope in float64, checked against Arb, and replaced by polynomials where float64 is not enough.

How a formula is written decides where float64 cancels or overflows: x * (1/2 + atan(x)/pi) loses all its digits on the
far left. So it is compared with balls at points in every binade of float32; binades that miss the tolerance get
polynomials in x, fitted and checked in exact points. FormulaError where neither will do. What is guaranteed is
guaranteed at the points looked at: this is a test, not a proof. Must not know decoders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flint import arb
from torch import Tensor

from invref.engines import ARB, TORCH, precision
from invref.errors import FormulaError
from invref.formulas import Formula

Array = npt.NDArray[np.float64]

BITS, MORE_BITS = 160, 1600
ACCURATE, ACCURATE_RADIUS = 60, 2.0**-200
"""A ball of fewer bits, and of a larger radius, is computed again with more."""
LOWEST, HIGHEST = -149, 128
"""Binades of float32, subnormals included."""
POINTS = 8
TOLERANCE = 1 / 16
"""Largest error in ulp of float32 at the value; slopes: in units of 2^-24 max(1, |f'|)."""
TERMS = 14
MOST_HALVINGS = 7
LARGEST = 2.0**128


@dataclass(frozen=True)
class Patch:
    """Polynomials for the inputs sign * [2^binade, 2^(binade + 1)), split into equal parts; rows: one a part."""

    sign: int
    binade: int
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Checked:
    """f (order 0) or f' (order 1) of a formula on float64 tensors, for inputs that are float32 numbers."""

    formula: Formula
    order: int
    patches: tuple[Patch, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Values at float64 inputs of any shape."""
        value = self.formula.evaluate(x, TORCH, self.order)
        value = value if isinstance(value, Tensor) else torch.full_like(x, value)
        return self._patched(x, value) if self.patches else value

    def _patched(self, x: Tensor, value: Tensor) -> Tensor:
        starts, parts, rows = (t.to(x.device) for t in self._tables)
        size, exponent = torch.frexp(x.abs())
        binade = (exponent.long() - 1 - LOWEST).clamp(0, HIGHEST - LOWEST)
        index = torch.where(x < 0, binade, binade + HIGHEST - LOWEST + 1)
        count = parts[index]
        here = (count > 0) & x.isfinite() & (x != 0)
        # size is in [1/2, 1): its place in the binade, then in the part.
        place = (2 * size - 1) * count
        part = place.floor()
        z = torch.where(here, place - part - 0.5, 0.0)
        row = torch.where(here, starts[index] + part.long(), 0)
        polynomial = rows[row, TERMS - 1]
        for k in range(TERMS - 2, -1, -1):
            polynomial = polynomial * z + rows[row, k]
        return torch.where(here, polynomial, value)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        binades = HIGHEST - LOWEST + 1
        starts, parts = torch.zeros(2 * binades, dtype=torch.int64), torch.zeros(2 * binades, dtype=torch.int64)
        rows: list[tuple[float, ...]] = []
        for patch in self.patches:
            index = patch.binade - LOWEST + (0 if patch.sign < 0 else binades)
            starts[index], parts[index] = len(rows), len(patch.rows)
            rows += patch.rows
        return starts, parts, torch.tensor(rows, dtype=torch.float64)


def checked(formula: Formula, order: int = 0) -> Checked:
    """The formula's value or slope in float64, with patches wherever the check asks for them."""
    plain = Checked(formula, order, ())
    samples = [(sign, binade, t) for sign in (-1, 1) for binade in range(LOWEST, HIGHEST) for t in _places(binade)]
    x = np.array([sign * 2.0**binade * (1 + t) for sign, binade, t in samples])
    with precision(BITS):
        exact = [_exact(formula, order, v) for v in x.tolist()]
        bad = _errors(plain, x, exact, order) > TOLERANCE
        found = sorted({samples[i][:2] for i in np.flatnonzero(bad)})
        return Checked(formula, order, tuple(_patch(formula, order, sign, binade) for sign, binade in found))


def _places(binade: int) -> list[float]:
    """Points in [0, 1) that are multiples of what float32 resolves in that binade."""
    digits = min(23, binade - LOWEST)
    golden = [(k + 1) * 0.6180339887498949 % 1 for k in range(POINTS - 2)]
    return sorted({math.floor(t * 2.0**digits) / 2.0**digits for t in (0.0, *golden, 1 - 2.0**-23)})


def _exact(formula: Formula, order: int, x: float) -> arb:
    value = arb(formula.evaluate(arb(x), ARB, order))
    if value.rel_accuracy_bits() < ACCURATE and value.rad() > ACCURATE_RADIUS:
        with precision(MORE_BITS):
            value = arb(formula.evaluate(arb(x), ARB, order))
    return value


def _errors(function: Checked, x: Array, exact: list[arb], order: int) -> Array:
    """Errors in units of the tolerance; infinite where the value is not finite and should be."""
    got = function(torch.from_numpy(x)).numpy()
    errors = np.zeros(len(x))
    for i, (value, truth) in enumerate(zip(got.tolist(), exact, strict=True)):
        size = float(abs(truth).mid()) if truth.is_finite() else math.inf
        if size >= LARGEST or not math.isfinite(size):
            continue
        unit = _ulp(size) if order == 0 else 2.0**-24 * max(1.0, size)
        errors[i] = float(abs(truth - value).mid()) / unit if math.isfinite(value) else math.inf
    return errors


def _ulp(value: float) -> float:
    return 2.0 ** max(math.frexp(value)[1] - 24, LOWEST)


def _patch(formula: Formula, order: int, sign: int, binade: int) -> Patch:
    for halvings in range(MOST_HALVINGS + 1):
        parts = 1 << halvings
        start, width = sign * 2.0**binade, sign * 2.0**binade / parts
        rows = [_row(formula, order, start + part * width, width) for part in range(parts)]
        if all(row is not None for row in rows):
            return Patch(sign, binade, tuple(row for row in rows if row is not None))
    raise FormulaError(
        f"{formula.name[:60]} cannot be evaluated well enough near x = {sign * 2.0**binade:.6g} in float64: "
        "write it so that nothing cancels there"
    )


def _row(formula: Formula, order: int, start: float, width: float) -> tuple[float, ...] | None:
    """Coefficients in z in [-1/2, 1/2] of the polynomial through exact points; None when it misses the tolerance."""
    nodes = [-0.5 * math.cos(math.pi * (2 * i + 1) / (2 * TERMS)) for i in range(TERMS)]
    values = [_exact(formula, order, start + width * (z + 0.5)) for z in nodes]
    if not all(v.is_finite() for v in values):
        return None
    differences: list[Any] = list(values)
    for k in range(1, TERMS):
        for i in range(TERMS - 1, k - 1, -1):
            differences[i] = (differences[i] - differences[i - 1]) / arb(nodes[i] - nodes[i - k])
    row = [arb(0)] * TERMS
    for node, difference in zip(nodes[::-1], differences[::-1], strict=True):
        row = [difference - node * row[0], *(a - node * b for a, b in pairwise(row))]
    coefficients = tuple(float(c.mid()) for c in row)
    for z in (-0.499, -0.37, -0.11, 0.05, 0.29, 0.43, 0.499):
        got = 0.0
        for c in reversed(coefficients):
            got = got * z + c
        truth = _exact(formula, order, start + width * (z + 0.5))
        size = float(abs(truth).mid())
        unit = _ulp(size) if order == 0 else 2.0**-24 * max(1.0, size)
        if not float(abs(truth - got).mid()) <= TOLERANCE / 4 * unit:
            return None
    return coefficients
