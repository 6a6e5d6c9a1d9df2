"""Float formats: bits, ordinals and values, and how many finite values there are.

An *ordinal* numbers the finite values of a format in increasing order: -1 is -0.0, 0 is +0.0, and
consecutive ordinals are consecutive floats, so a range of ordinals is an interval of the number line.
This module guarantees that every input can be named and counted; it must not know any activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from invref.errors import RangeError


@dataclass(frozen=True)
class Format:
    """An IEEE-style binary format of `bits` bits with `precision` significand bits (the hidden one included)."""

    name: str
    bits: int
    precision: int
    emax: int
    dtype: torch.dtype
    integer: torch.dtype

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.emax

    @property
    def largest_ordinal(self) -> int:
        """Ordinal of the largest finite value."""
        return (2 * self.emax + 1 << self.precision - 1) - 1

    @property
    def first_ordinal(self) -> int:
        """Ordinal of the most negative finite value."""
        return -self.largest_ordinal - 1

    @property
    def finite_count(self) -> int:
        """Number of finite bit patterns, -0.0 and +0.0 counted apart."""
        return 2 * (self.largest_ordinal + 1)

    def tensor(self, first: int, count: int) -> torch.Tensor:
        """The `count` consecutive values from ordinal `first` on, as a tensor of shape (count,)."""
        if first < self.first_ordinal or first + count - 1 > self.largest_ordinal:
            raise RangeError(
                f"ordinals {first} to {first + count - 1} leave {self.name}'s finite range: "
                f"stay within {self.first_ordinal} to {self.largest_ordinal}"
            )
        ordinals = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
        return self.from_ordinals(ordinals)

    def from_ordinals(self, ordinals: torch.Tensor) -> torch.Tensor:
        """Values of an int64 tensor of ordinals."""
        mask = (1 << self.bits - 1) - 1
        patterns = torch.where(ordinals < 0, ordinals ^ mask, ordinals)
        return patterns.to(self.integer).view(self.dtype)

    def ordinals(self, values: torch.Tensor) -> torch.Tensor:
        """Ordinals (int64) of a tensor of this format; infinities lie one past the ends, NaN beyond."""
        patterns = values.contiguous().view(self.integer).to(torch.int64)
        mask = (1 << self.bits - 1) - 1
        return torch.where(patterns < 0, patterns ^ mask, patterns)

    def value(self, ordinal: int) -> float:
        """The value with this ordinal, as a Python float (exact)."""
        return float(self.tensor(ordinal, 1).item())

    def ordinal(self, value: float) -> int:
        """Ordinal of `value` rounded to nearest even in this format."""
        return int(self.ordinals(torch.tensor([value], dtype=torch.float64, device="cpu").to(self.dtype)).item())

    def pattern(self, ordinal: int) -> int:
        """The bit pattern, as an unsigned integer."""
        mask = (1 << self.bits) - 1
        signed = ordinal ^ (mask >> 1) if ordinal < 0 else ordinal
        return signed & mask

    def ulp(self, value: float) -> float:
        """Unit in the last place at `value`: spacing of the binade that holds it (subnormals share the lowest)."""
        exponent = self.emin if value == 0 else max(int(np.frexp(abs(value))[1]) - 1, self.emin)
        return float(np.ldexp(1.0, exponent - self.precision + 1))


FORMATS = {
    f.name: f
    for f in (
        Format("bfloat16", 16, 8, 127, torch.bfloat16, torch.int16),
        Format("float16", 16, 11, 15, torch.float16, torch.int16),
        Format("float32", 32, 24, 127, torch.float32, torch.int32),
        Format("float64", 64, 53, 1023, torch.float64, torch.int64),
    )
}

BY_DTYPE = {f.dtype: f for f in FORMATS.values()}


def get(name: str) -> Format:
    """The format called `name`; raises RangeError that lists the names there are."""
    try:
        return FORMATS[name]
    except KeyError:
        raise RangeError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}") from None
