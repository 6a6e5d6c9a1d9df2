"""Axes: from numbers to positions between 0 and 1, and the ticks along them.

Linear, logarithmic, and symmetric-logarithmic, where x goes to sign(x) log(1 + |x| / bend): both tails and the
neighbourhood of 0 in one picture. Must not know pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; `kind` is "linear", "log" or "symlog" (with `bend`)."""

    low: float
    high: float
    kind: str = "linear"
    bend: float = 0.03

    def __call__(self, value: float) -> float:
        """Where `value` stands: 0 at `low`, 1 at `high`; not positive values of a log axis lie far below 0."""
        first, last = self.bent(self.low), self.bent(self.high)
        return (self.bent(value) - first) / (last - first)

    def bent(self, value: float) -> float:
        """The number whose spacing the axis shows."""
        if self.kind == "log":
            return math.log10(value) if value > 0 else -1e4
        if self.kind == "symlog":
            return math.copysign(math.log1p(abs(value) / self.bend), value)
        return value

    def unbent(self, number: float) -> float:
        """The inverse of `bent`."""
        if self.kind == "log":
            return math.pow(10.0, number)
        if self.kind == "symlog":
            return math.copysign(math.expm1(abs(number)) * self.bend, number)
        return number

    def ticks(self, most: int = 7) -> list[tuple[float, str]]:
        """Values and their labels, at most about `most`."""
        if self.kind == "log":
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, -(-(last - first) // most))
            return [(10.0**k, _power(k)) for k in range(first, last + 1) if k % step == 0]
        if self.kind == "symlog":
            lowest = math.ceil(math.log10(self.bend))
            tens = [10.0**k for k in range(lowest, math.floor(math.log10(max(-self.low, self.high)) + 1e-9) + 1)]
            values = [*(-t for t in reversed(tens)), 0.0, *tens]
            return [(v, _plain(v)) for v in values if self.low <= v <= self.high]
        apart = _round_step((self.high - self.low) / most)
        before, after = math.ceil(self.low / apart - 1e-9), math.floor(self.high / apart + 1e-9)
        return [(k * apart, _plain(k * apart)) for k in range(before, after + 1)]


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else "10" if exponent == 1 else "10" + str(exponent).translate(_SUPERSCRIPT)


def _plain(value: float) -> str:
    size = abs(value)
    text = _power(round(math.log10(size))) if size >= 1e4 else f"{size:.6g}"
    return f"−{text}" if value < 0 else text


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
