"""Intervals enclose what they should, and a sign that is stated is the sign at every point of the box."""

import mpmath
import pytest
import sympy
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st

from invref.engines import ARB, INTERVALS, MPMATH, evaluate, precision
from invref.formulas import X, define
from invref.intervals import FUNCTIONS, Interval, reciprocal
from invref.signs import Box, tidy
from invref.symbols import ODD

EXPRESSIONS = {
    text: define(text).expression
    for text in (
        "x*erf(log(1+exp(x)))",
        "x*tanh(exp(x))",
        "x*log(1+sigmoid(x))",
        "x*tanh(gelu(x))",
        "x*(1/2+atan(x)/pi)",
        "x - tanh(x)",
        "sqrt(softplus(x))",
        "x*exp(-x*x/2)",
        "exp(-exp(-x))*x",
        "x/(1+x*x)",
        "tanh(x)+x*exp(-x*x)",
    )
}
ENDS = st.one_of(
    st.floats(-50, 50), st.tuples(st.sampled_from([-1, 1]), st.floats(-300, 308)).map(lambda p: p[0] * 10 ** p[1])
)


def contains(interval, number):
    return bool(interval.low <= number.upper() and number.lower() <= interval.high)


@given(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_sums_products_and_reciprocals_hold_those_of_their_points(ends, share, other):
    (a, b), (c, d) = sorted(ends[:2]), sorted(ends[2:])
    with precision(200):
        p, q = ((low + (arb(high) - low) * s).mid() for low, high, s in ((arb(a), b, share), (arb(c), d, other)))
        x, y = Interval(arb(a), arb(b)), Interval(arb(c), arb(d))
        assert contains(x + y, p + q) and contains(x * y, p * q) and contains(-x, -p)
        assert p == 0 or contains(reciprocal(x), 1 / p)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(ENDS, ENDS, st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_a_function_of_an_interval_holds_its_values(name, a, b, share):
    low, high = sorted((a, b))
    if name in ("log", "log1p", "log1px"):
        low, high = abs(low) + 1e-9, abs(low) + abs(high) + 1
    with precision(128):
        over = FUNCTIONS[name](Interval(arb(low), arb(high)))
        for x in (low, high, min(max(low + (high - low) * share, low), high)):
            if abs(x) < 1e4:
                point = FUNCTIONS[name](Interval(arb(x), arb(x)))
                assert point.low <= point.high and over.low <= point.high and point.low <= over.high


@pytest.mark.parametrize("name", ["exp", "expm1", "erf", "erfc", "tanh", "sigmoid", "softplus", "atan", "atanc"])
@given(ENDS)
@settings(max_examples=80, deadline=None)
def test_a_function_of_a_point_agrees_with_the_ball_engine(name, x):
    with precision(200):
        value, ball = FUNCTIONS[name](Interval(arb(x), arb(x))), ARB.functions[name](arb(x))
        assert not ball.is_finite() or contains(value, ball)


@pytest.mark.parametrize("function", ODD)
def test_each_function_is_its_argument_times_its_ratio(function):
    ratio = ODD[function]
    for x in (-0.9, -1e-30, 1e-300, 0.3, 2.5, 40.0):
        with precision(200):
            point = Box(arb(x), arb(x))
            assert contains(point.interval(X * ratio(X)), ARB.functions[function.__name__](arb(x)))


@pytest.mark.parametrize("text", EXPRESSIONS)
@given(ENDS, st.floats(1e-6, 4), st.floats(0, 1), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_a_stated_sign_holds_at_the_points_of_the_box(text, start, width, share, order):
    expression = define(text).derivative(order)
    low, high = sorted((start, start + width * max(1, abs(start)) / 2))
    with precision(128):
        sign = Box(arb(low), arb(high)).sign(expression)
        assert sign == 0 or Box(arb(low), arb(high)).sign(tidy(expression)) in (0, sign)
    x = min(max(low + (high - low) * share, low), high)
    if sign and abs(x) < 1e3:
        with mpmath.workdps(1000):
            value = evaluate(expression, mpmath.mpf(x), MPMATH)
        assert value == 0 or mpmath.sign(value) == sign


@pytest.mark.parametrize("text", EXPRESSIONS)
@given(ENDS, st.floats(1e-6, 4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_bounds_hold_the_values_at_the_points_of_the_box(text, start, width, share):
    expression = define(text).derivative(1)
    low, high = sorted((start, start + width * max(1, abs(start)) / 2))
    x = min(max(low + (high - low) * share, low), high)
    with precision(128):
        bounds = Box(arb(low), arb(high)).bounds(expression)
    if abs(x) < 1e3:
        with precision(4000):
            value = evaluate(expression, arb(x), ARB)
            assert bounds.low <= value.upper() and value.lower() <= bounds.high


@pytest.mark.parametrize("text", EXPRESSIONS)
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("octave", [5, 12, 100, 1023])
def test_signs_are_known_far_out_in_both_tails(text, side, octave):
    slope, curvature = (define(text).derivative(order) for order in (1, 2))
    with precision(128):
        box = Box(*sorted((side * arb(2) ** octave, side * arb(2) ** (octave + 1))))
        assert box.sign(slope) or box.sign(tidy(curvature))


def test_what_is_not_defined_somewhere_is_not_said_to_be():
    box = Box(arb(-1), arb(1))
    for expression in (1 / X, sympy.sqrt(X), sympy.log(X), X ** sympy.Rational(-1, 2), sympy.exp(1 / X)):
        assert not box.defined(expression)
    for expression in (1 / (1 + X**2), sympy.sqrt(2 + X), sympy.log(1 + X**2), sympy.sqrt(sympy.exp(X)), X**3):
        assert box.defined(expression)


def test_an_interval_keeps_the_sign_over_many_octaves_and_an_overflow():
    with precision(128):
        tiny = evaluate(sympy.exp(X), Interval(-(arb(2) ** 1000), arb(-1)), INTERVALS)
        assert tiny.low >= 0 and tiny.high < 0.4
        large = evaluate(sympy.exp(X), Interval(arb(2) ** 100, arb(2) ** 1000), INTERVALS)
        assert large.low > arb(2) ** 1000 and not large.is_finite
