"""The curve g(t) of a formula with one smooth minimum: exact points of it, for fitting and certifying.

All numbers are exact balls (midpoints of Arb's), so that the same call gives the same bits on every machine. What
is proved about a fit between the points is proved in `certify`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flint import arb

from invref import enclosure
from invref.engines import ARB, coefficients, variable
from invref.formulas import Formula
from invref.minimax import middle

DIGITS = 60
POINTS = 200


@dataclass(frozen=True)
class Curve:
    """A formula with its turning point, and g(t) at chosen points."""

    formula: Formula

    @cached_property
    def turning(self) -> tuple[arb, arb]:
        """(x*, y*) as exact balls."""
        x, y = enclosure.turning_point(self.formula, 0, DIGITS)
        return middle(x), middle(y)

    def x_of(self, t: float) -> arb:
        """The input with signed root t."""
        y = self.turning[1] + arb(t) * arb(t)
        return middle(enclosure.inverse(self.formula, y, 0 if t < 0 else 1, DIGITS))

    def at(self, x: arb) -> tuple[arb, arb]:
        """(f, f') as exact balls."""
        f = coefficients(self.formula.evaluate(variable(x, 2), ARB))
        return middle(f[0]), middle(f[1])

    def between(self, a: arb, b: arb, count: int = POINTS) -> list[arb]:
        """Chebyshev points between two inputs."""
        return [middle(a + (b - a) * ((1 - (arb.pi() * (2 * k + 1) / (2 * count)).cos()) / 2)) for k in range(count)]
