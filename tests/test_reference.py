"""The reference's certificates are true when checked with more digits, also where the inverse is ill conditioned."""

import sys

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import invref
from invref import reference
from invref.engines import MPMATH, to_mpf
from invref.errors import FormulaError, RangeError
from invref.formulas import CATALOGUE, get
from invref.pieces import pieces, turning_points

NAMES = ["gelu", "gelu_tanh", "mish", "quick_gelu", "silu"]
SUBNORMAL = 5e-324


def shifted(name, exponent):
    """A y that lies 10^-exponent above the turning value."""
    with mpmath.workdps(150):
        return turning_points(name, 130)[0].y + mpmath.mpf(10) ** -exponent


def hard_outputs(name):
    yield from ((y, piece) for y in (-SUBNORMAL, -1e-300, -0.001, -0.1) for piece in (0, 1))
    yield from ((y, 1) for y in (0.0, SUBNORMAL, 1e-20, 2.5, 1e38, 1e308))
    yield from ((shifted(name, e), piece) for e in (3, 10, 30, 45) for piece in (0, 1))
    yield mpmath.mpf("-1e-4000"), 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("digits", [15, 50])
def test_an_inverse_brackets_the_truth_as_its_certificate_says(name, digits):
    formula, (turn,) = get(name), turning_points(name, 150)
    for y, piece in hard_outputs(name):
        got = reference.inverse(name, y, piece, digits)
        with mpmath.workdps(1000):
            assert got.error_bound <= abs(got.value) * mpmath.mpf(10) ** -digits * (1 + mpmath.mpf(10) ** -9)
            assert (got.value < turn.x) == (piece == 0) or abs(got.value - turn.x) < got.error_bound
            gaps = [formula.evaluate(got.value + s * got.error_bound, MPMATH) - y for s in (-1, 0, 1)]
            assert got.value == 0 or min(gaps) < 0 < max(gaps), (y, piece)
            # The residual was computed with more digits than asked: it is f(x̂) - y to well within |y| 10^-digits.
            assert abs(gaps[1] - got.residual) <= abs(y) * mpmath.mpf(10) ** (-digits)


@pytest.mark.parametrize("name", NAMES)
def test_a_derivative_from_output_is_within_its_error_bound(name):
    for y, piece in hard_outputs(name):
        got = reference.derivative_from_output(name, y, piece, 30)
        truth = reference.derivative_from_output(name, y, piece, 60)
        with mpmath.workdps(150):
            assert got.error_bound <= abs(got.value) * mpmath.mpf(10) ** -30
            assert abs(got.value - truth.value) <= got.error_bound + truth.error_bound, (y, piece)


@pytest.mark.parametrize("name", NAMES)
@given(st.floats(-60, 60))
@settings(max_examples=50, deadline=None)
def test_inverting_a_value_gives_back_its_argument_and_its_slope(name, x):
    (turn,) = turning_points(name)
    assume(abs(x - float(turn.x)) > 1e-6)
    piece = int(x > turn.x)
    # y carries 120 digits, so that the roundtrip loses at most those that x² and the turning point cost: about 20.
    y = reference.value(name, x, 120).value
    with mpmath.workdps(100):
        assert abs(reference.inverse(name, y, piece).value - mpmath.mpf(x)) <= abs(x) * mpmath.mpf(10) ** -50
        slope = reference.derivative(name, x, 60).value
        assert abs(reference.derivative_from_output(name, y, piece).value - slope) <= abs(slope) * mpmath.mpf(10) ** -49


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [-1e5, -3.4e38, -40.0, 1e-300, 3.4e38])
@pytest.mark.parametrize("function", [reference.value, reference.derivative, reference.second_derivative])
def test_values_keep_their_relative_accuracy_in_the_tails(name, x, function):
    got, truth = function(name, x, 20), function(name, x, 60)
    with mpmath.workdps(100):
        assert (
            got.value != 0 and abs(got.value - truth.value) <= got.error_bound <= abs(got.value) * mpmath.mpf(10) ** -20
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_keeps_its_digits_beside_the_turning_point(name):
    (turn,) = turning_points(name, 100)
    with mpmath.workdps(100):
        x = turn.x + mpmath.mpf(10) ** -40
    got = reference.derivative(name, x, 50)
    with mpmath.workdps(100):
        # f' = f''(x*) h + O(h²), so that 39 digits of this ratio are known.
        assert abs(got.value / (turn.curvature * mpmath.mpf(10) ** -40) - 1) < mpmath.mpf(10) ** -39


@pytest.mark.parametrize("name", NAMES)
def test_the_turning_value_itself_decodes_to_the_turning_point(name):
    (turn,) = turning_points(name, 50)
    for piece in (0, 1):
        with mpmath.workdps(70):
            below = turn.y - mpmath.mpf(10) ** -53
        for y in (turn.y, below):
            got = reference.inverse(name, y, piece)
            # y* is known to 65 digits, so its inverse is known to half of them.
            assert abs(got.value - turn.x) < mpmath.mpf(10) ** -32
            assert abs(reference.derivative_from_output(name, y, piece).value) < mpmath.mpf(10) ** -32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", [reference.inverse, reference.derivative_from_output])
def test_an_output_outside_the_range_is_an_error_that_states_the_range(name, function):
    low = mpmath.nstr(turning_points(name)[0].y, 20)[:12]
    for y, piece in ((0.0, 0), (0.1, 0), (-1.0, 0), (-1.0, 1), (float(low) - 1e-9, 1)):
        with pytest.raises(RangeError, match=rf"outside the range of {name} on piece {piece}, \({low}"):
            function(name, y, piece)
    for y in (float("nan"), float("inf")):
        with pytest.raises(RangeError, match="not a finite number"):
            function(name, y, 1)


def test_names_formulas_and_texts_are_accepted_and_bad_ones_explained():
    assert reference.value("x*sigmoid(x)", 1.5) == reference.value(CATALOGUE["silu"], 1.5)
    assert reference.value("silu", "0.1").value != reference.value("silu", 0.1).value
    with pytest.raises(FormulaError, match="use one of"):
        reference.value("mich", 1.0)
    with pytest.raises(FormulaError, match="not finite at x = 0"):
        reference.value("x*log(x)", -1)


def test_pieces_between_two_turning_points_are_inverted_too():
    # x/(1+x²) on its middle piece: x = (1 - sqrt(1 - 4y²)) / (2y).
    got = reference.inverse("x / (1 + x**2)", 0.25, 1)
    with mpmath.workdps(60):
        assert abs(got.value - 2 * (1 - mpmath.sqrt(3) / 2)) < mpmath.mpf(10) ** -50


def test_a_certified_value_prints_the_digits_that_it_certifies() -> None:
    printed, bound = str(invref.reference.inverse("gelu", "0.3", 1, digits=60)).split(" ± ")
    assert len(printed.removeprefix("0.")) == 60
    # Its last digit is worth 10^-60: printing rounds by half of that, on top of the bound.
    with mpmath.workdps(80):
        assert abs(invref.reference.value("gelu", printed, 70).value - mpmath.mpf("0.3")) <= mpmath.mpf(10) ** -60
        assert mpmath.mpf(bound) <= mpmath.mpf(10) ** -60


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [sys.float_info.max, -sys.float_info.max, 1e35, -1e35, -(2.0**100), -(2.0**101)])
def test_the_engines_agree_out_to_the_ends_of_float64(name: str, x: float) -> None:
    for function in ("value", "derivative", "second_derivative"):
        exact = getattr(invref.reference, function)(name, x, 40)
        ball = getattr(invref.enclosure, function)(name, x, 40)
        # Both are good to a relative 1e-40; exp(-x²) of the two engines is compared as exact numbers.
        difference = abs(to_mpf(ball) - exact.value)
        with mpmath.workdps(60):
            assert difference <= 3 * mpmath.mpf(10) ** -40 * abs(exact.value)


def test_few_digits_do_not_turn_a_small_derivative_into_an_exact_zero() -> None:
    rough = invref.reference.derivative_from_output("gelu", -0.1699712074799036, 0, digits=7)
    truth = invref.reference.derivative_from_output("gelu", -0.1699712074799036, 0, digits=40)
    assert truth.value != 0
    assert abs(rough.value - truth.value) <= rough.error_bound + truth.error_bound


@pytest.mark.parametrize("engine", [invref.reference, invref.enclosure])
@pytest.mark.parametrize("digits", [1, 2, 7, 50])
def test_a_y_below_the_turning_value_is_refused_at_any_number_of_digits(engine, digits: int) -> None:
    for y in (-0.18, -0.171, -0.17 - 1e-4):
        with pytest.raises(RangeError, match="outside the range"):
            engine.inverse("gelu", y, 0, digits=digits)


def test_a_value_lost_at_every_precision_is_not_certified_as_zero() -> None:
    # log(1 + exp(-400)) is 1.9e-174: 1 + exp(-400) rounds to 1 at fewer than 174 digits.
    found = invref.reference.value("log(1 + exp(x))", -400)
    exact = invref.enclosure.value("log(1 + exp(x))", -400)
    with mpmath.workdps(60):
        assert abs(found.value - to_mpf(exact)) <= mpmath.mpf(10) ** -49 * abs(found.value)


def test_bad_numbers_and_digits_are_one_clear_error() -> None:
    for digits in (0, -20, 10**9):
        with pytest.raises(RangeError, match="ask for 1 to"):
            invref.reference.value("gelu", 1.0, digits)
    for number in (None, "one", [1.0]):
        with pytest.raises(RangeError, match="is not a number"):
            invref.reference.value("gelu", number)
    assert invref.reference.value("gelu", np.float32(0.5)) == invref.reference.value("gelu", 0.5)


CASES = {
    "elu": [(0, -0.5), (0, -0.999999), (0, -1e-30), (1, 1e-30), (1, 7.0)],
    "softplus": [(0, 1e-30), (0, 3.0), (0, 19.5), (1, 21.0)],
    "softsign": [(0, -0.9999), (0, -1e-20), (1, 0.5), (1, 1 - 2**-40)],
    "hardswish": [(1, -0.3), (1, -1e-20), (2, -0.3), (2, 2.9), (3, 3.5)],
    "tanhshrink": [(0, -5.0), (0, -1e-30), (1, 5e-324), (1, 1e-3), (1, 1e30)],
    "relu2": [(1, 5e-324), (1, 1e-10), (1, 1e30)],
    "sqrtsoftplus": [(0, 1e-30), (0, 4.0), (1, 5.0)],
    "xielu": [(0, -0.2), (0, 3.0), (1, -0.1), (2, -6e-7), (3, 1e-30), (3, 1e30)],
    "gelu_10": [(0, -0.1), (1, 9.9)],
    "x*tanh(exp(x))": [(0, -0.1), (0, -1e-20), (1, 2.0), (1, 1e30)],
    "x*(1/2+atan(x)/pi)": [(0, -0.3), (0, -0.3183098861), (0, 0.1), (0, 1e20)],
    "x**3*exp(-x*x)": [(0, -0.3), (1, -1e-40), (2, 1e-40), (3, 0.01)],
    "(x - 1)**4": [(0, 1e-60), (1, 3.0)],
}


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("digits", [20, 50])
def test_both_engines_invert_every_piece_of_piecewise_and_flat_formulas(text, digits):
    for piece, y in CASES[text]:
        part = pieces(text)[piece]
        got, proved = (engine.inverse(text, y, piece, digits) for engine in (reference, invref.enclosure))
        with mpmath.workdps(400):
            assert part.left - got.error_bound <= got.value <= part.right + got.error_bound
            assert got.error_bound <= abs(got.value) * mpmath.mpf(10) ** -digits * (1 + mpmath.mpf(10) ** -9)
            branch = get(text).branches[part.branch]
            gaps = [branch.evaluate(got.value + s * got.error_bound, MPMATH) - mpmath.mpf(y) for s in (-1, 1)]
            assert min(gaps) <= 0 <= max(gaps)
            assert abs(to_mpf(proved) - got.value) <= 2 * abs(got.value) * mpmath.mpf(10) ** -digits
        slope = reference.derivative_from_output(text, y, piece, digits)
        ball = invref.enclosure.derivative_from_output(text, y, piece, digits)
        with mpmath.workdps(400):
            assert abs(to_mpf(ball) - slope.value) <= 3 * abs(slope.value) * mpmath.mpf(10) ** -digits


@pytest.mark.parametrize(
    ("name", "y", "piece", "x", "slope"),
    [
        ("elu", 0.0, 0, 0, 1),
        ("leaky_relu", 0.0, 0, 0, 0.01),
        ("leaky_relu", 0.0, 1, 0, 1),
        ("hardswish", 0.0, 1, -3, -0.5),
        ("hardswish", -0.375, 2, -1.5, 0),
        ("tanhshrink", 0.0, 0, 0, 0),
        ("relu2", 0.0, 1, 0, 0),
        ("hardtanh", 1.0, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("engine", [invref.reference, invref.enclosure])
def test_the_value_at_an_end_that_is_known_exactly_is_inverted_exactly(engine, name, y, piece, x, slope):
    found, derivative = engine.inverse(name, y, piece), engine.derivative_from_output(name, y, piece)
    if engine is invref.reference:
        assert float(found.value) == x and float(derivative.value) == pytest.approx(slope, rel=1e-15)
    else:
        assert float(found.mid()) == x and float(derivative.mid()) == pytest.approx(slope, rel=1e-15)


@pytest.mark.parametrize("engine", [invref.reference, invref.enclosure])
@pytest.mark.parametrize("function", ["inverse", "derivative_from_output"])
def test_a_plateau_is_refused_because_its_output_does_not_tell_the_input(engine, function):
    for name, piece, y in (("relu", 0, 0.0), ("hardtanh", 2, 1.0), ("gelu_10", 2, 10.0)):
        with pytest.raises(RangeError, match=f"on the whole of piece {piece}: the output does not tell x there"):
            getattr(engine, function)(name, y, piece)


def test_values_at_a_break_are_the_owners_on_both_engines():
    for name, x, slope in (("relu", 0.0, 0), ("relu6", 6.0, 0), ("hardswish", 3.0, 1), ("leaky_relu", 0.0, 0.01)):
        assert float(reference.derivative(name, x).value) == pytest.approx(slope, rel=1e-15)
        assert float(invref.enclosure.derivative(name, x).mid()) == pytest.approx(slope, rel=1e-15)
