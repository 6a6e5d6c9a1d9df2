"""Two independent engines hold each other, and signed roots and sup-norms enclose what they should."""

import random
from functools import cache

import mpmath
import pytest
from flint import arb, arb_series
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from invref import enclosure, reference
from invref.engines import ARB, SERIES, coefficients, precision, to_arb, variable
from invref.errors import ProofError, RangeError
from invref.formulas import get
from invref.pieces import turning_points

NAMES = ["gelu", "gelu_tanh", "mish", "quick_gelu", "silu"]
CHECK_BITS = 2000
"""Enough to compare balls and certificates without further rounding."""


def ball(certified):
    return arb(to_arb(certified.value), to_arb(certified.error_bound).abs_upper())


@cache
def outputs(name):
    """About 700 (y, piece) per formula: down to subnormals, up to 1e308, and within 1e-30 of the turning value."""
    draw = random.Random(name)
    with mpmath.workdps(100):
        y = turning_points(name, 80)[0].y
        near = [(y + mpmath.mpf(10) ** -e * draw.uniform(0.1, 1), s) for e in range(1, 41) for s in (0, 1)]
        between = [(y * mpmath.mpf(draw.random()), s) for _ in range(100) for s in (0, 1)]
    tails = [(-(10.0 ** draw.uniform(-323.3, -1)), s) for _ in range(100) for s in (0, 1)]
    large = [(10.0 ** draw.uniform(-323.3, 308), 1) for _ in range(200)]
    edges = [(-5e-324, 0), (-5e-324, 1), (5e-324, 1), (0.0, 1), (-0.0, 1), (1.7e308, 1)]
    return near + between + tails + large + edges


@pytest.mark.parametrize("name", NAMES)
def test_the_two_engines_hold_each_other_at_the_inverse(name):
    assert len(outputs(name)) > 650
    for y, piece in outputs(name):
        proved, found = enclosure.inverse(name, y, piece), ball(reference.inverse(name, y, piece))
        with precision(CHECK_BITS):
            assert proved.overlaps(found), (y, piece)
            assert proved.rad() <= abs(proved).upper() * arb(10) ** -49, (y, piece)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_engines_hold_each_other_at_the_derivative_from_output(name):
    for y, piece in outputs(name)[::2]:
        proved = enclosure.derivative_from_output(name, y, piece)
        found = ball(reference.derivative_from_output(name, y, piece))
        with precision(CHECK_BITS):
            assert proved.overlaps(found), (y, piece)
            assert proved.rad() <= abs(proved).upper() * arb(10) ** -49, (y, piece)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_engines_hold_each_other_at_values_and_derivatives(name):
    draw = random.Random(name)
    for x in [draw.uniform(-60, 60) for _ in range(200)] + [0.0, -1e5, 1e-300, 3.4e38]:
        for function in ("value", "derivative", "second_derivative"):
            proved, found = getattr(enclosure, function)(name, x), ball(getattr(reference, function)(name, x))
            with precision(CHECK_BITS):
                assert proved.overlaps(found), (function, x)


@pytest.mark.parametrize("name", NAMES)
def test_a_turning_point_is_enclosed_and_another_is_refused(name):
    for digits in (15, 50, 120):
        x, y = enclosure.turning_point(name, 0, digits)
        (turn,) = turning_points(name, digits + 30)
        with precision(CHECK_BITS):
            for found, truth in ((x, turn.x), (y, turn.y)):
                assert found.rad() < arb(10) ** -digits
                assert found.overlaps(arb(to_arb(truth), arb(10) ** -(digits + 30)))
    with pytest.raises(RangeError, match="no turning point 1: it has 1"):
        enclosure.turning_point(name, 1)


@pytest.mark.parametrize("name", NAMES)
@given(st.floats(-0.16, -0.01), st.floats(0, 0.004), st.floats(0, 1), st.integers(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_inverse_of_a_ball_holds_the_inverse_of_its_points(name, y, radius, share, piece):
    try:
        wide = enclosure.inverse(name, arb(y, radius), piece)
    except ProofError:
        reject()  # f' may vanish on so wide a ball: no enclosure is the right answer
    with precision(CHECK_BITS):
        # Exactly inside: in float64 the sum could round to a point outside of a narrow ball.
        point = arb(y) + arb(radius) * (2 * arb(share) - 1)
    inside = enclosure.inverse(name, point, piece)
    with precision(CHECK_BITS):
        assert wide.overlaps(inside)


@pytest.mark.parametrize("function", [enclosure.inverse, enclosure.derivative_from_output])
def test_an_output_outside_the_range_is_an_error_that_states_the_range(function):
    for y, piece in ((0.0, 0), (-1.0, 0), (-1.0, 1), (-0.1699713, 1), (float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(RangeError, match=rf"outside the range of gelu on piece {piece}, \(-0.16997120747990"):
            function("gelu", y, piece)
    with pytest.raises(RangeError, match="its pieces are 0 to 1"):
        function("gelu", -0.1, 2)


def root_at(name, x):
    """The signed root at a number, straight from its definition."""
    (turn,) = turning_points(name, 80)
    gap = get(name).evaluate(x, ARB) - to_arb(turn.y)
    return gap.sqrt() if x > to_arb(turn.x) else -gap.sqrt()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", [-3.0, -0.3, -0.03126, -0.03, -1e-3, 1e-6, 0.02, 0.0313, 1.0, 5.0])
def test_the_signed_root_is_tight_and_its_series_is_that_of_the_function(name, distance):
    with precision(200, 12):
        x = (enclosure.turning_point(name, 0)[0] + distance).mid()
        series = coefficients(enclosure.signed_root(name, 0, variable(x, 6)))
        assert series[0].overlaps(root_at(name, x)) and series[0].rad() < 1e-22
        # t² = f - y*, coefficient by coefficient.
        square = coefficients(arb_series(series, prec=6) * arb_series(series, prec=6))
        truth = coefficients(get(name).evaluate(variable(x, 6), SERIES) - enclosure.turning_point(name, 0)[1])
        assert all(s.overlaps(t) for s, t in zip(square, truth, strict=True))
        assert all(c.rad() < 1e-12 for c in series)


@pytest.mark.parametrize("name", NAMES)
@given(st.floats(-4, 3), st.floats(1e-6, 0.3), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_the_signed_root_over_a_ball_encloses_that_at_its_points(name, low, width, share):
    with precision(128, 12):
        point = (arb(low) + arb(width) * arb(share)).mid()
        wide = coefficients(enclosure.signed_root(name, 0, variable(arb(low).union(arb(low) + arb(width)), 8)))
        inside = coefficients(enclosure.signed_root(name, 0, variable(point, 8)))
        assert all(not w.is_finite() or w.overlaps(p) for w, p in zip(wide, inside, strict=True))


def test_the_signed_root_over_a_ball_around_the_turning_point_is_useful():
    for name in NAMES:
        with precision(128, 12):
            x, _ = enclosure.turning_point(name, 0)
            series = coefficients(enclosure.signed_root(name, 0, variable(arb(x.mid(), 0.05), 8)))
            assert series[0].contains(0) and series[0].rad() < 0.05
            assert series[1] > 0.2 and all(c.abs_upper() < 1 for c in series)


def test_the_signed_root_of_an_inner_series_is_the_composition():
    with precision(128, 12):
        inner = arb_series([arb("-0.6"), 2, 1], prec=5)
        composed = enclosure.signed_root("silu", 0, inner)
        t = enclosure.signed_root("silu", 0, variable(arb("-0.6"), 5))
        expected = t(arb_series([0, 2, 1], prec=5))
        assert all(a.overlaps(b) for a, b in zip(coefficients(composed), coefficients(expected), strict=True))


def test_the_sup_norm_of_a_known_function_is_enclosed():
    def chebyshev(x):  # 1e-7 T8: nine extrema, all of size 1e-7
        square = x * x
        return 1e-7 * ((((128 * square - 256) * square + 160) * square - 32) * square + 1)

    lower, upper = enclosure.sup_norm(chebyshev, -1, 1, 0.01)
    assert lower <= 1e-7 <= upper <= 1.01 * lower
    lower, upper = enclosure.sup_norm(lambda x: x.exp() - 1, -2.0, 0.5)
    assert lower <= 1 - mpmath.exp(-2) <= upper <= 1.05 * lower


def test_the_sup_norm_sees_a_small_error_between_terms_of_size_one():
    # t² + y* - f vanishes; what is left is the 1e-7 that is added.
    (turn,) = turning_points("gelu", 60)

    def error(x):
        t = enclosure.signed_root("gelu", 0, x)
        return t * t + to_arb(turn.y) - get("gelu").evaluate(x, SERIES) + 1e-7 * x

    lower, upper = enclosure.sup_norm(error, -2.0, 1.0)
    assert lower <= 2e-7 <= upper <= 2.1e-7


def test_a_sup_norm_that_does_not_exist_is_not_proved():
    with pytest.raises(ProofError, match="split the interval"):
        enclosure.sup_norm(lambda x: 1 / x, -1.0, 1.0)


def test_outputs_close_to_a_finite_limit_are_inverted_by_both_engines():
    # atanh(1 - 10^-70) = (70 log 10 + log(2 - 10^-70)) / 2
    with mpmath.workdps(200):  # so that 1 - y keeps 130 digits
        y = 1 - mpmath.mpf(10) ** -70
        truth = (70 * mpmath.log(10) + mpmath.log(2 - mpmath.mpf(10) ** -70)) / 2
        proved, found = enclosure.inverse("tanh(x)", y, 0), reference.inverse("tanh(x)", y, 0)
        assert abs(found.value - truth) <= found.error_bound
    with precision(CHECK_BITS):
        assert proved.overlaps(arb(to_arb(truth), arb(10) ** -100)) and proved.rad() < arb(10) ** -47
