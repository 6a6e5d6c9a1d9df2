"""Turning points are isolated to the digits asked for, none is missed, and what cannot be isolated is refused."""

from itertools import pairwise

import mpmath
import pytest
import torch

from invref.engines import MPMATH, TORCH
from invref.errors import FormulaError, RangeError
from invref.formulas import CATALOGUE, get
from invref.pieces import limit, piece, pieces, turning_points

NAMES = ["gelu", "gelu_tanh", "mish", "quick_gelu", "silu"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("digits", [20, 50, 200])
def test_the_one_turning_point_is_a_minimum_accurate_to_the_digits_asked_for(name, digits):
    (turn,) = turning_points(name, digits)
    assert turn.minimum and turn.curvature > 0
    with mpmath.workdps(2 * digits + 20):
        step = abs(turn.x) * mpmath.mpf(10) ** -digits
        assert get(name).evaluate(turn.x - step, MPMATH, 1) < 0 < get(name).evaluate(turn.x + step, MPMATH, 1)
        # f is flat there: the value misses y* by the square of the step only, and by its own rounding.
        assert abs(get(name).evaluate(turn.x, MPMATH) - turn.y) < mpmath.mpf(10) ** -digits


def test_the_turning_point_of_silu_satisfies_its_closed_form():
    # x* = -1 - W(1/e) and y* = x* + 1.
    (turn,) = turning_points("silu", 50)
    with mpmath.workdps(60):
        assert abs(turn.x + 1 + mpmath.lambertw(mpmath.exp(-1)).real) < mpmath.mpf(10) ** -50
        assert abs(turn.y - turn.x - 1) < mpmath.mpf(10) ** -50


@pytest.mark.parametrize("name", NAMES)
def test_the_pieces_fall_then_rise_and_their_limits_are_known(name):
    left, right = pieces(name)
    (turn,) = turning_points(name)
    assert (left.left, left.right, right.left, right.right) == (-mpmath.inf, turn.x, turn.x, mpmath.inf)
    assert not left.increasing and right.increasing
    assert (left.left_limit, left.right_limit, right.left_limit, right.right_limit) == (0, turn.y, turn.y, mpmath.inf)
    assert limit(name, -1, 1) == 0 and limit(name, +1, 1) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_has_its_pieces_sign_on_a_fine_grid(name):
    (turn,) = turning_points(name)
    # Left of -5 the slope in float64 is smaller than its rounding.
    x = torch.linspace(-5, 50, 20_001, dtype=torch.float64)
    slope = get(name).evaluate(x, TORCH, 1)
    away = (x - float(turn.x)).abs() > 1e-9
    assert torch.equal((slope > 0)[away], (x > float(turn.x))[away])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tanh(x)", []),
        ("exp(-x**2)", [0]),
        ("x**4 - x**2", [-(0.5**0.5), 0, 0.5**0.5]),
        ("x / (1 + x**2)", [-1, 1]),
        ("(x - 1)**2 * (x - 1.0009765625)**2", [1, 1.00048828125, 1.0009765625]),
    ],
)
def test_all_turning_points_of_other_formulas_are_found(text, expected):
    found = [float(turn.x) for turn in turning_points(text)]
    assert found == pytest.approx(expected, abs=1e-15)
    assert len(pieces(text)) == len(expected) + 1
    directions = [p.increasing for p in pieces(text)]
    assert all(a != b for a, b in pairwise(directions))


@pytest.mark.parametrize("text", ["x**3", "sqrt(x)", "log(x**2)", "x - x"])
def test_a_formula_whose_turning_points_cannot_be_isolated_is_refused_with_the_remedy(text):
    with pytest.raises(FormulaError, match=r"use a formula|write a formula"):
        pieces(text)


def test_a_piece_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(RangeError, match="gelu has no piece 2: its pieces are 0 to 1"):
        piece("gelu", 2)
    with pytest.raises(RangeError, match="has no piece -1"):
        piece("gelu", -1)
