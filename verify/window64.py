"""Every float64 around a turning point: the error floor there, and the gradient's error against a proved polynomial.

Guarantees that the floor is exact over the window: f' is proved monotone across it, so the first and the last input of
each output give the width of f' between them. Must not know bounds or verdicts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from flint import arb
from numpy.typing import NDArray

from invref import formats
from invref.engines import ARB, coefficients, precision, to_arb, variable
from invref.errors import ProofError
from invref.formulas import Formula
from invref.pieces import TurningPoint
from verify import batches
from verify.compiled import compiled
from verify.ranges import cuts_of
from verify.targets import Target

FLOAT64 = formats.get("float64")
HALF = 1 << 28
"""Inputs on each side of the turning point: those of the first outputs above y*, which the most inputs share."""

CHUNK = 1 << 18
STRIDE = 32
"""One chunk in so many also runs backward: the gradient of the others' inputs is that of a stored pair already seen."""

BITS = 128
DEGREE = 3
_CODES = 256
_NO_CODE = np.iinfo(np.int64)


@dataclass
class Worst:
    """The largest of the numbers taken so far, NaN above all, and the ordinal of its input."""

    value: float = 0.0
    at: int | None = None

    def take(self, values: NDArray[np.float64], ordinals: NDArray[np.int64]) -> None:
        """Compare non-negative `values`, those of the inputs with these `ordinals`."""
        if values.size:
            # As integers, non-negative floats keep their order and NaN is the largest.
            i = int(np.abs(values).view(np.int64).argmax())
            self.merge(Worst(float(values[i]), int(ordinals[i])))

    def merge(self, other: Worst) -> None:
        """Take in what another has seen."""
        if not (other.value <= self.value or np.isnan(self.value)):
            self.value, self.at = other.value, other.at


class Window:
    """The inputs on both sides of one turning point; `run` fills the results."""

    def __init__(self, formula: Formula, point: TurningPoint) -> None:
        self.middle = cuts_of(formula, FLOAT64)[point.index][1]
        self.base = FLOAT64.ordinal(float(point.y)) - _CODES // 2
        self.high = float(point.x)
        self.low = float(point.x - self.high)
        self.terms = _polynomial(formula, point, self.middle)
        # First and last input (as ordinals) of each output, left and right of the turning point.
        self.first = np.full((2, _CODES), _NO_CODE.max)
        self.last = np.full((2, _CODES), _NO_CODE.min)
        self.error = Worst()
        self.different = Worst()
        self._lock = threading.Lock()

    def slopes(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """f'(x) inside the window, to a relative 1e-15."""
        h = (x - self.high) - self.low
        total = np.zeros_like(h)
        for term in self.terms[::-1]:
            total = total * h + term
        return total * h

    def run(self, target: Target, threads: int, step: Callable[[int], None]) -> None:
        """Run all inputs forward and one chunk in `STRIDE` backward; `step` is told how many more are done."""
        starts = [(side, k) for side in (0, 1) for k in range(HALF // CHUNK)]

        def work(job: tuple[int, int]) -> None:
            torch.set_num_threads(1)
            side, k = job
            start = self.middle + (side - 1) * HALF + k * CHUNK
            self._chunk(target, side, start, k % STRIDE == 0)
            step(CHUNK)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))

    def _chunk(self, target: Target, side: int, start: int, backward: bool) -> None:
        x = torch.from_numpy(_consecutive(start, CHUNK)).view(torch.float64)
        with torch.no_grad():
            native = target.native(x)
        first, last = np.full(_CODES, _NO_CODE.max), np.full(_CODES, _NO_CODE.min)
        _ends(native.numpy().view(np.int64), start, self.base, first, last)
        error, different = Worst(), Worst()
        if backward:
            y, dx = batches.together(target.layer, x)
            ordinals = np.arange(start, start + CHUNK)
            error.take(np.abs(dx.numpy() - self.slopes(x.numpy())), ordinals)
            different.take((y.view(torch.int64) != native.view(torch.int64)).double().numpy(), ordinals)
        with self._lock:
            np.minimum(self.first[side], first, out=self.first[side])
            np.maximum(self.last[side], last, out=self.last[side])
            self.error.merge(error)
            self.different.merge(different)

    @property
    def inputs(self) -> int:
        """How many inputs are run."""
        return 2 * HALF

    @property
    def extremes(self) -> NDArray[np.int64]:
        """Ordinals of the first and the last input of every output met."""
        met = self.first <= self.last
        return np.concatenate([self.first[met], self.last[met]])

    @property
    def floor(self) -> float:
        """Half the widest range of f' between inputs of one output and side; NaN if outputs leave the table."""
        met = self.first <= self.last
        if met[:, [0, -1]].any():
            return nan
        ends = (self.slopes(FLOAT64.from_ordinals(torch.from_numpy(o[met])).numpy()) for o in (self.first, self.last))
        first, last = ends
        return float(np.abs(last - first).max() / 2)


def _polynomial(formula: Formula, point: TurningPoint, middle: int) -> list[float]:
    """Taylor coefficients c_1 … of f'(x* + h) = Σ c_k h^k; ProofError unless they give f', and f' is monotone."""
    with precision(BITS, DEGREE + 2):
        ends = [arb(FLOAT64.value(middle + offset)) for offset in (-HALF, HALF - 1)]
        over = coefficients(formula.evaluate(variable(ends[0].union(ends[1]), DEGREE + 3), ARB).derivative())
        at = coefficients(formula.evaluate(variable(to_arb(point.x), DEGREE + 2), ARB).derivative())
        radius = (ends[1] - ends[0]).abs_upper()
        remainder = (over[DEGREE + 1] * radius ** (DEGREE + 1)).abs_upper()
        if over[1].contains(0) or not remainder < arb(2) ** -90:
            raise ProofError(f"{formula.name}: f' is not known to be monotone around {float(point.x)}")
        return [float(c.mid()) for c in at[1:]]


@compiled()
def _consecutive(first: int, count: int) -> NDArray[np.int64]:
    """Bit patterns of `count` float64 from ordinal `first` on."""
    patterns = np.empty(count, np.int64)
    for i in range(count):
        ordinal = first + i
        patterns[i] = ordinal ^ ((ordinal >> 63) & 0x7FFFFFFFFFFFFFFF)
    return patterns


@compiled()
def _ends(ybits: Any, start: int, base: int, first: Any, last: Any) -> None:
    """First and last input of each output code, for the inputs of consecutive ordinals from `start` on.

    Outputs beyond the table, half of which lies below y*, count as its first and last code.
    """
    codes = first.size
    for i in range(ybits.size):
        ordinal = ybits[i] ^ ((ybits[i] >> 63) & 0x7FFFFFFFFFFFFFFF)
        code = min(max(ordinal - base, 0), codes - 1)
        first[code] = min(first[code], start + i)
        last[code] = max(last[code], start + i)
