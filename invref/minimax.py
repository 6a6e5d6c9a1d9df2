"""Weighted rational minimax approximation on a finite set of points, in exact-enough arithmetic.

The arithmetic is that of Arb's ball midpoints, integer arithmetic inside: the same inputs give the same bits on every
machine, which float64 linear algebra does not. Guarantees nothing about the error between the points: the caller
certifies it. Must not know activations.

Source: Lawson's iteratively reweighted least squares (C. L. Lawson, 1961) on the linearised rational problem of
Sanathanan and Koerner (1963).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import arb, arb_mat

ROUNDS = 40
SHARPNESS = 0.8
"""Exponent of the reweighting: 1 is Lawson's own rule, a little less keeps the weights from oscillating."""
SMALLEST_WEIGHT = 1e-9


@dataclass(frozen=True)
class Rational:
    """P(z)/Q(z) with Q(0) = 1, coefficients in ascending powers, and its largest weighted error on the points."""

    numerator: tuple[Any, ...]
    denominator: tuple[Any, ...]
    error: float


def middle(ball: Any) -> Any:
    """The midpoint of a ball, as an exact ball."""
    return arb(ball.mid())


def rational(z: list[Any], target: list[Any], weight: list[Any], degrees: tuple[int, int]) -> Rational:
    """The P/Q of the given degrees that makes max |weight * (P/Q - target)| over the points small.

    z, target, weight: exact balls (`middle`), one per point. Q is positive on all points. Raises ArithmeticError when
    no round found such a Q.
    """
    top, bottom = degrees
    size = top + bottom + 1
    powers = [[arb(1)] for _ in z]
    for row, value in zip(powers, z, strict=True):
        for _ in range(max(degrees)):
            row.append(middle(row[-1] * value))
    rows = [
        [*row[: top + 1], *(middle(-h * power) for power in row[1 : bottom + 1])]
        for row, h in zip(powers, target, strict=True)
    ]
    system = arb_mat(rows)
    right = arb_mat([[h] for h in target])
    emphasis = np.ones(len(z))
    q_values = [arb(1)] * len(z)
    best: Rational | None = None
    for _ in range(ROUNDS):
        scales = [middle(w * w * arb(e) / (q * q)) for w, e, q in zip(weight, emphasis.tolist(), q_values, strict=True)]
        scaled = arb_mat([[middle(s * entry) for entry in row] for s, row in zip(scales, rows, strict=True)])
        normal = _midpoints(system.transpose() * scaled)
        solution = normal.solve(_midpoints(scaled.transpose() * right))
        c = [middle(solution[i, 0]) for i in range(size)]
        p_values = (system * arb_mat([[v] for v in c[: top + 1]] + [[arb(0)]] * bottom)).entries()
        q_values = [middle(1 + sum((c[top + k] * row[k] for k in range(1, bottom + 1)), arb(0))) for row in powers]
        errors = np.array(
            [abs(float((w * (p / q - h)).mid())) for w, p, q, h in zip(weight, p_values, q_values, target, strict=True)]
        )
        worst = float(errors.max())
        if all(q > 0 for q in q_values) and (best is None or worst < best.error):
            best = Rational(tuple(c[: top + 1]), (arb(1), *c[top + 1 :]), worst)
        # Only +, * and / of IEEE floats here: the power is left to Arb so that every machine rounds it alike.
        factors = [float((arb(float(e) / worst + 1e-6) ** arb(SHARPNESS)).mid()) for e in errors]
        emphasis = emphasis * np.array(factors)
        emphasis = np.maximum(emphasis / emphasis.max(), SMALLEST_WEIGHT)
    if best is None:
        raise ArithmeticError(f"no pole-free rational function of degrees {degrees} found: use other degrees")
    return best


def _midpoints(matrix: Any) -> Any:
    return arb_mat([[middle(matrix[i, j]) for j in range(matrix.ncols())] for i in range(matrix.nrows())])
