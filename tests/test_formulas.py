"""The catalogue says what it should, text is parsed safely, and the engines agree."""

import time

import mpmath
import pytest
import torch
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st

from invref import formulas
from invref.engines import ARB, MPMATH, SERIES, TORCH, coefficients, precision, to_arb, variable
from invref.errors import FormulaError
from invref.formulas import CATALOGUE

NAMES = sorted(CATALOGUE)
POINTS = [-38.5, -7.25, -1.2784, -0.7518, -1e-8, 0.0, 1e-300, 0.5, 3.0, 41.0]
TEXTBOOK = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: (
        x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(44715) / 10**6 * x**3)))
    ),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
}
MALICIOUS = [
    "__import__('os').system('true')",
    "x.__class__",
    "(lambda: x)()",
    "[x for x in (1,)]",
    "x if x else 1",
    "9**9**9",
    "((((9**64)**64)**64)**64)**64",
    "((x**64)**64)**64",
    "*".join(["(9**64)"] * 1000),
    "x**x",
    "1e999999999",
    "1" * 9000,
    "-" * 9000 + "x",
    "(" * 4000 + "x" + ")" * 4000,
    "x" + "+x" * 4000,
    "exp(" * 150 + "x" + ")" * 150,
    "x" * 20_000,
    "exp(x, x)",
    "exp(z=x)",
    "exp(*x)",
    "1j * x",
    "True * x",
    "'x'",
    "f'{x}'",
    "0x10 * x",
    "1 / 0 + x",
    "sqrt(-1) * x",
    "log(0) * x",
    "x; x",
    "x\n+ 1",
    "х",  # a Cyrillic letter
    "",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [-30.0, -0.7, 0.1, 5.0])
def test_the_catalogue_is_the_textbook_formula(name, x):
    with mpmath.workdps(1000):  # enough for the cancellation in 1 + tanh at x = -30
        truth = TEXTBOOK[name](mpmath.mpf(x))
        value = CATALOGUE[name].evaluate(mpmath.mpf(x), MPMATH)
        assert abs(value - truth) <= abs(truth) * mpmath.mpf(10) ** -40


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_those_of_the_textbook_formula(name, order):
    with mpmath.workdps(60):
        for x in (-2.5, -0.3, 1.75):
            # mpmath's difference quotient at twice the precision is good to half the digits at least.
            truth = mpmath.diff(TEXTBOOK[name], mpmath.mpf(x), order)
            assert abs(CATALOGUE[name].evaluate(mpmath.mpf(x), MPMATH, order) - truth) < mpmath.mpf(10) ** -30


@pytest.mark.parametrize("text", MALICIOUS, ids=lambda text: repr(text[:20]))
def test_a_malicious_text_is_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(FormulaError) as caught:
        formulas.get(text)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 400


def test_the_error_names_the_offending_piece_and_the_remedy():
    with pytest.raises(FormulaError, match=r"'sin\(x\)' is not allowed in a formula: use numbers, x, pi"):
        formulas.get("x + sin(x)")
    with pytest.raises(FormulaError, match="write a\\*\\*b as exp"):
        formulas.get("2**x")
    with pytest.raises(FormulaError, match="unknown activation 'gellu': use one of gelu, gelu_tanh, silu"):
        formulas.get("gellu")
    with pytest.raises(FormulaError, match="does not depend on x"):
        formulas.get("2 + pi")


def test_decimal_numbers_are_exact():
    assert formulas.parse("0.044715").p == 8943 and formulas.parse("0.044715").q == 200_000
    assert formulas.parse("0.1 + 0.2 - 0.3") == 0
    assert formulas.parse("1.00000000000000000000000000001") != 1


def test_a_row_a_name_and_a_text_are_all_accepted():
    silu = CATALOGUE["silu"]
    assert formulas.get("silu") is silu and formulas.get(silu) is silu
    assert formulas.get(" x*sigmoid( x ) ").expression == silu.expression


@given(st.text(alphabet="x0123456789.+-*/() epilogsqrtfanhmd", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_formula_or_a_formula_error(text):
    try:
        formulas.parse(text)
    except FormulaError:
        return
    assert set(text) <= set("x0123456789.+-*/() eplogsqrtfanhmdi")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_engines_agree(name, order):
    formula = CATALOGUE[name]
    doubles = formula.evaluate(torch.tensor(POINTS, dtype=torch.float64), TORCH, order)
    for x, double in zip(POINTS, doubles.tolist(), strict=True):
        with precision(400), mpmath.workdps(100):
            number = to_arb(formula.evaluate(mpmath.mpf(x), MPMATH, order))
            # 100 digits, less 4 for the squared exponent at x = -38.5.
            ball = formula.evaluate(to_arb(x), ARB, order)
            assert (number - ball).abs_upper() <= ball.abs_upper() * arb(10) ** -95
            series = coefficients(formula.evaluate(variable(x, 4), SERIES))
            assert (series[order] * (1, 1, 2)[order]).overlaps(ball)
        # About 20 roundings in terms no larger than 8 (1 + |x|), each relative 2^-53.
        assert abs(double - float(number)) <= 160 * (1 + abs(x)) * 2**-53


@pytest.mark.parametrize("name", NAMES)
@given(st.floats(-50, 50), st.floats(0, 3), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_series_over_a_wide_ball_encloses_the_series_at_its_points(name, low, width, share):
    formula = CATALOGUE[name]
    with precision(200):
        point = arb(low) + arb(width) * arb(share)
        wide = coefficients(formula.evaluate(variable(arb(low).union(arb(low) + arb(width)), 8), SERIES))
        inside = coefficients(formula.evaluate(variable(point, 8), SERIES))
        assert all(w.is_finite() and w.overlaps(p) for w, p in zip(wide, inside, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", [3.4e38, 1.7e308])
def test_enclosures_stay_finite_and_tight_in_the_far_tails(name, end):
    formula = CATALOGUE[name]
    with precision(128):
        left = coefficients(formula.evaluate(variable(arb(-end).union(arb(-end / 2)), 6), SERIES))
        assert all(c.abs_upper() < 1e-300 for c in left)
        right = coefficients(formula.evaluate(variable(arb(end / 2).union(arb(end)), 6), SERIES))
        # The series' value carries the width of the ball; its slope is 1 up to what a ball's 30-bit radius costs.
        assert (right[1] - 1).abs_upper() < 1e-8
        assert all(c.abs_upper() < 1e-300 for c in right[2:])


def test_every_function_of_the_language_has_the_same_series_as_its_derivatives():
    # sympy's derivatives against the differential equations, at a point where all functions are defined.
    for text in (
        "exp(x)",
        "log(x)",
        "sqrt(x)",
        "erf(x)",
        "erfc(x)",
        "tanh(x)",
        "sigmoid(x)",
        "x**(-2)",
        "x**(3/2)",
        "pi*x",
    ):
        formula = formulas.get(text)
        with precision(200):
            series = coefficients(formula.evaluate(variable(arb("0.7"), 6), SERIES))
            factorial = 1
            for k, coefficient in enumerate(series):
                factorial *= max(k, 1)
                assert (coefficient * factorial).overlaps(formula.evaluate(arb("0.7"), ARB, k)), (text, k)
                assert coefficient.rad() < 1e-50
