"""Fitting: minimax, clamps, and tables that regenerate byte for byte."""

from __future__ import annotations

import json
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flint import arb

from invref import calibrate, fit
from invref.formats import FORMATS
from invref.minimax import rational


def test_minimax_finds_the_known_best_constant_and_line() -> None:
    # The best line to x² on [0, 1] is x - 1/8 with error 1/8, reached at 0, 1/2 and 1 (Chebyshev).
    points = [arb(k) / 64 for k in range(65)]
    best = rational(points, [x * x for x in points], [arb(1)] * 65, (1, 0))
    # Reweighting converges to the best line from above; 40 rounds leave less than a hundredth of the error.
    assert 0.125 - 1e-9 <= best.error <= 0.125 * 1.01


def test_minimax_recovers_a_rational_function_exactly() -> None:
    points = [arb(k) / 64 for k in range(-64, 65)]
    target = [(1 + 2 * x) / (1 + x * x / 4) for x in points]
    best = rational([arb(x.mid()) for x in points], [arb(t.mid()) for t in target], [arb(1)] * 129, (1, 2))
    # The targets are rounded to the 53 bits of Arb's default precision; nothing else is lost.
    assert best.error <= 8 * 2.0**-53
    assert [float(v) for v in (*best.numerator, *best.denominator)] == pytest.approx([1, 2, 1, 0, 0.25], abs=1e-12)


def test_no_other_clamp_on_the_grid_serves_a_rounded_parabola_better() -> None:
    # f(x) = x² - 1/4 + 2^-13, outputs rounded to bfloat16: y* = -1/4 + ulp/8 rounds to the code -1/4, below y*.
    fmt = FORMATS["bfloat16"]
    offset = Fraction(-1, 4) + Fraction(1, 2**13)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return (x.double() ** 2 + float(offset)).to(x.dtype)

    chosen = calibrate.clamp(forward, (Fraction(0), offset), (0.0, 2.0), fmt)
    ulp = fmt.ulp(float(offset))
    x = fmt.tensor(0, fmt.ordinal(np.sqrt(12 * ulp)))
    distance = forward(x).double() - float(offset)

    def error(cut: float, base: float, slope: float = 0.0) -> float:
        low = base + slope * distance.clamp(min=0)
        decoded = 2 * torch.where(distance < cut, low, distance).clamp(min=0).sqrt()
        return (decoded - 2 * x.double()).abs().max().item()

    others = [
        error((k - 0.125) * ulp, v * ulp / 16, s / 4)
        for k in (0.5, 1.5, 2.5, 3.5)
        for v in range(1, 60)
        for s in range(5)
    ]
    # Equal up to the interpolation of g in calibrate: 2^14 intervals on a function that is straight in sqrt(d).
    assert error(chosen.cut, chosen.base, chosen.slope) <= min(others) + 1e-9
    assert error(chosen.cut, chosen.base, chosen.slope) < 0.6 * error(0.0, 0.0)


def fitted(text: str) -> dict[str, Any]:
    """A table without what is calibrated on the forward of the processor at hand, whose last bits torch leaves open."""
    data: dict[str, Any] = json.loads(text)
    del data["clamps"]["float32"], data["sha256"]
    return data


@pytest.mark.slow
@pytest.mark.parametrize("name", list(fit.LAYERS))
def test_the_tables_that_ship_regenerate(name: str, tmp_path: Path) -> None:
    fit.main([name], tmp_path)
    made, shipped = tmp_path / f"{name}.json", resources.files("invref") / "tables" / f"{name}.json"
    assert fitted(made.read_text()) == fitted(shipped.read_text())
