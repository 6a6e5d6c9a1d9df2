"""Turning points are isolated to the digits asked for, none is missed, and what cannot be isolated is refused."""

import random
import time
from itertools import pairwise

import mpmath
import pytest
import torch

from invref.engines import MPMATH, TORCH
from invref.errors import FormulaError, RangeError
from invref.formulas import CATALOGUE, get
from invref.pieces import ends, landmarks, limit, piece, pieces, prove, turning_points

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


UP, DOWN, FLAT = "up", "down", "plateau"
SHAPES = {
    "relu": ([0], [FLAT, UP]),
    "leaky_relu": ([0], [UP, UP]),
    "elu": ([0], [UP, UP]),
    "celu": ([0], [UP, UP]),
    "selu": ([0], [UP, UP]),
    "gelu": ([-0.7517915246935645], [DOWN, UP]),
    "gelu_tanh": ([-0.7524614220710162], [DOWN, UP]),
    "gelu_new": ([-0.7524614220710162], [DOWN, UP]),
    "gelu_fast": ([-0.7524614220], [DOWN, UP]),
    "silu": ([-1.2784645427610738], [DOWN, UP]),
    "mish": ([-1.1924312145154204], [DOWN, UP]),
    "quick_gelu": ([-0.7511542554], [DOWN, UP]),
    "softplus": ([20], [UP, UP]),
    "softsign": ([0], [UP, UP]),
    "tanh": ([], [UP]),
    "sigmoid": ([], [UP]),
    "logsigmoid": ([], [UP]),
    "laplace": ([], [UP]),
    "hardtanh": ([-1, 1], [FLAT, UP, FLAT]),
    "relu6": ([0, 6], [FLAT, UP, FLAT]),
    "hardsigmoid": ([-3, 3], [FLAT, UP, FLAT]),
    "hardswish": ([-3, -1.5, 3], [FLAT, DOWN, UP, UP]),
    "tanhshrink": ([0], [UP, UP]),
    "softshrink": ([-0.5, 0.5], [UP, FLAT, UP]),
    "hardshrink": ([-0.5, 0.5], [UP, FLAT, UP]),
    "threshold": ([1], [FLAT, UP]),
    "prelu": ([0], [UP, UP]),
    "relu2": ([0], [FLAT, UP]),
    "sqrtsoftplus": ([20], [UP, UP]),
    "xielu": ([-0.9808292530117262, -1e-6, 0], [DOWN, UP, DOWN, UP]),
    "gelu_10": ([-0.7517915246935645, 10], [DOWN, UP, FLAT]),
    "x*erf(log(1+exp(x)))": ([-1.19306], [DOWN, UP]),
    "x*tanh(exp(x))": ([-1.0788601], [DOWN, UP]),
    "x*log(1+1/(1+exp(-x)))": ([-1.3724541], [DOWN, UP]),
    "x*tanh(log(1+sigmoid(x)))": ([-1.3945193], [DOWN, UP]),
    "x*tanh(gelu(x))": ([-1.1954312, 0], [UP, DOWN, UP]),
    "x*sigmoid(1.702*x)": ([-0.7511542554], [DOWN, UP]),
    "x*(1/2+atan(x)/pi)": ([], [UP]),
    "x*exp(-x*x)": ([-(0.5**0.5), 0.5**0.5], [DOWN, UP, DOWN]),
    "x*exp(-x*x/2)": ([-1, 1], [DOWN, UP, DOWN]),
    "x**3*exp(-x*x)": ([-(1.5**0.5), 0, 1.5**0.5], [DOWN, UP, UP, DOWN]),
    "tanh(x)+x*exp(-x*x)": ([-2.4120836, -1.0404189, 1.0404189, 2.4120836], [UP, DOWN, UP, DOWN, UP]),
    "x**3": ([0], [UP, UP]),
    "x**4": ([0], [DOWN, UP]),
    "exp(x)": ([], [UP]),
    "exp(-x)": ([], [DOWN]),
    "exp(exp(x))": ([], [UP]),
    "x*exp(-exp(-x))": ([-0.5671432904], [DOWN, UP]),
    "where(x > 1, x*x, 2*x - 1)": ([1], [UP, UP]),
    "x*tanh(exp(x)) + relu(x)": ([-1.0788601, 0], [DOWN, UP, UP]),
    "sqrt(x*x + 1) - x": ([], [DOWN]),
}


@pytest.mark.parametrize("text", SHAPES)
def test_landmarks_and_directions_of_many_formulas(text):
    marks, shape = SHAPES[text]
    assert [float(mark.x) for mark in landmarks(text)] == pytest.approx(marks, rel=1e-7, abs=1e-15)
    assert [FLAT if p.plateau else UP if p.increasing else DOWN for p in pieces(text)] == shape
    for part, after in pairwise(pieces(text)):
        assert part.right == after.left and part.right_end == after.left_end == landmarks(text)[part.index].kind
        if part.right_end != "break":
            assert part.right_limit == after.left_limit and part.branch == after.branch
        else:
            assert after.branch == part.branch + 1
    for part in pieces(text):
        assert part.plateau == (part.left_limit == part.right_limit)
        assert part.plateau or part.increasing == (part.left_limit < part.right_limit)


def test_the_shapes_cover_the_catalogue():
    assert set(CATALOGUE) <= set(SHAPES)


@pytest.mark.parametrize("text", SHAPES)
def test_the_slope_of_every_piece_has_its_sign_at_random_points(text):
    draw = random.Random(text)
    formula = get(text)
    for part in pieces(text):
        low, high = (float(mpmath.mpf(end)) if mpmath.isfinite(end) else None for end in (part.left, part.right))
        for _ in range(20):
            if low is not None and high is not None:
                x = low + (high - low) * draw.uniform(0.001, 0.999)
            elif low is None and high is None:
                x = draw.choice((-1, 1)) * 10 ** draw.uniform(-3, 2)
            else:
                x = high - 10 ** draw.uniform(-3, 2) if low is None else low + 10 ** draw.uniform(-3, 2)
            with mpmath.workdps(400):
                slope = formula.branches[part.branch].evaluate(mpmath.mpf(x), MPMATH, 1)
            assert (slope == 0) if part.plateau else (slope > 0) == part.increasing


@pytest.mark.parametrize(
    ("text", "kind", "order"),
    [
        ("tanhshrink", "flat", 3),
        ("x**3", "flat", 3),
        ("x**4", "turning", 4),
        ("(x - 1)**6", "turning", 6),
        ("tanhshrink(2*x - 1)", "flat", 3),
        ("x - x*exp(-x*x)", "flat", 3),
        ("sqrt(x*x + 1)", "turning", 2),
    ],
)
def test_the_order_of_an_exact_zero_of_the_slope_is_proved(text, kind, order):
    (mark,) = landmarks(text)
    assert (mark.kind, mark.order) == (kind, order) and mark.exact is not None
    assert [p.right_order for p in pieces(text)] == [order, 0]
    turns = turning_points(text)
    assert len(turns) == (kind == "turning")
    assert all((turn.curvature == 0) == (order > 2) for turn in turns)


def test_a_slope_that_vanishes_at_a_break_is_no_landmark_of_its_own():
    left, right = pieces("relu2")
    assert left.plateau and (right.left_end, right.left_order) == ("break", 2)
    assert [p.left_order for p in pieces("where(x > 0, x**3, x)")] == [0, 3]


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("exp(x)", (0, mpmath.inf)),
        ("x**3", (mpmath.inf, mpmath.inf)),
        ("relu2", (0, mpmath.inf)),
        ("xielu", (-0.3, mpmath.inf)),
        ("x*tanh(exp(x))", (0, 1)),
        ("x*(1/2+atan(x)/pi)", (0, 1)),
        ("sqrtsoftplus", (0, 0)),
        ("softsign", (0, 0)),
        ("selu", (0, 1.0507009873554805)),
        ("hardswish", (0, 1)),
    ],
)
def test_limits_of_the_slope(text, limits):
    assert tuple(float(limit(text, sign, 1)) for sign in (-1, 1)) == pytest.approx(limits)


def test_a_logarithm_has_no_limit_but_infinity():
    assert limit("log(1 + x*x)", 1) == mpmath.inf and limit("where(x > 0, log(1 + x), -log(1 - x))", -1) == -mpmath.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("log(x**2)", "not finite at x = 0"),
        ("x - x", "does not depend on x"),
        ("1 / (x*x - 2)", r"near x = -1.41421 is not finite"),
        ("x / (x + exp(x))", r"near x = -0.567143 is not finite"),
        ("x**17", "to more than order 16: use a lower power"),
        ("+".join(f"relu(x - {k})" for k in range(17)), "18 pieces: use a formula with at most 16"),
    ],
)
def test_a_formula_whose_landmarks_cannot_be_isolated_is_refused_with_the_remedy(text, message):
    with pytest.raises(FormulaError, match=message):
        pieces(text)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_a_row_is_proved_within_two_seconds(name):
    start = time.process_time()
    prove.__wrapped__(get(name))
    assert time.process_time() - start < 2


def test_a_plateau_has_no_ends_to_invert_from():
    with pytest.raises(RangeError, match=r"relu is 0\.0 on the whole of piece 0: the output does not tell x there"):
        ends("relu", 0)


def test_a_piece_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(RangeError, match="gelu has no piece 2: its pieces are 0 to 1"):
        piece("gelu", 2)
    with pytest.raises(RangeError, match="has no piece -1"):
        piece("gelu", -1)
