"""Taylor boxes keep their proved bound at the ends of boxes and at random floats, on every function and format."""

import random
from dataclasses import replace
from functools import cache

import mpmath
import numpy as np
import pytest

from invref import reference, taylor
from invref.errors import ProofError, RangeError
from invref.formats import FORMATS
from invref.formulas import CATALOGUE
from invref.pieces import turning_points

NAMES = ["gelu", "gelu_tanh", "mish", "quick_gelu", "silu"]
SINGLE = FORMATS["float32"]
KINDS = ["value", "derivative", "left", "right"]


def first_above(name, fmt):
    """Ordinal of the first float strictly above the turning value."""
    y = turning_points(name)[0].y
    ordinal = fmt.ordinal(float(y))
    while fmt.value(ordinal) <= y:
        ordinal += 1
    return ordinal


def span(name, kind, fmt):
    """First and last-plus-one ordinal that the boxes of this kind cover; the left piece ends with -0.0."""
    first = fmt.first_ordinal if kind in ("value", "derivative") else first_above(name, fmt)
    return first, 0 if kind == "left" else fmt.largest_ordinal + 1


@cache
def boxes(name, kind, fmt=SINGLE):
    first, stop = span(name, kind, fmt)
    if kind == "value":
        return taylor.value_boxes(name, fmt, first, stop)
    if kind == "derivative":
        return taylor.derivative_boxes(name, fmt, first, stop)
    return taylor.output_boxes(name, fmt, int(kind == "right"), first, stop)


def truth(name, kind, value):
    if kind in ("value", "derivative"):
        return getattr(reference, kind)(name, value, 25).value
    if kind == "left" and value == 0:
        return mpmath.mpf(0)
    return reference.derivative_from_output(name, value, int(kind == "right"), 25).value


def violations(name, kind, fmt, made, count):
    """Ordinals, of `count` drawn from random boxes and their ends, where the true error exceeds the box's bound."""
    draw = random.Random(f"{name} {kind} {fmt.name}")
    found = []
    for _ in range(count):
        i = draw.randrange(len(made))
        low, high = int(made.first[i]), int(made.stop[i]) - 1
        ordinal = draw.choice((low, high, draw.randint(low, high)))
        value = fmt.value(ordinal)
        got = made.evaluate(np.array([ordinal]), np.array([value]))[0]
        with mpmath.workdps(60):
            if not abs(mpmath.mpf(float(got)) - truth(name, kind, value)) <= made.bounds[i]:
                found.append(ordinal)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_boxes_cover_the_asked_ordinals_without_gap_and_within_the_tolerance(name, kind):
    made, (first, stop) = boxes(name, kind), span(name, kind, SINGLE)
    assert made.first[0] == first and made.stop[-1] == stop
    assert np.array_equal(made.first[1:], made.stop[:-1]) and (made.first < made.stop).all()
    assert 0 < made.bound <= taylor.TOLERANCE
    assert len(made) < 600


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_at_box_ends_and_at_random_floats(name, kind):
    assert violations(name, kind, SINGLE, boxes(name, kind), 250) == []


@pytest.mark.parametrize("format_name", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_bound_holds_in_the_other_formats(format_name, kind):
    fmt = FORMATS[format_name]
    assert violations("silu", kind, fmt, boxes("silu", kind, fmt), 100) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_coefficient_that_is_off_by_more_than_the_bound_is_noticed(kind):
    made = boxes("gelu", kind)
    wrong = made.coefficients.copy()
    wrong[:, 0] += 3 * taylor.TOLERANCE
    assert len(violations("gelu", kind, SINGLE, replace(made, coefficients=wrong), 40)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_negative_zero_on_the_left_piece_decodes_to_the_limit(name):
    made = boxes(name, "left")
    assert abs(made.evaluate(np.array([-1]), np.array([-0.0]))[0]) <= made.bounds[-1]
    alone = taylor.output_boxes(name, SINGLE, 0, -1, 0)
    assert len(alone) == 1 and alone.evaluate(np.array([-1]), np.array([-0.0]))[0] == 0


@pytest.mark.parametrize("name", NAMES)
def test_far_tails_take_few_boxes(name):
    # From 64 to the largest float32 there are 122 octaves; each is a constant to 1e-12.
    first = SINGLE.ordinal(64.0)
    assert len(taylor.derivative_boxes(name, SINGLE, first, SINGLE.largest_ordinal + 1)) <= 122
    assert len(taylor.derivative_boxes(name, SINGLE, SINGLE.first_ordinal, -first)) <= 122


def test_large_arguments_have_exact_values():
    made = boxes("gelu", "value")
    for value in (3.4028234663852886e38, 1e10, 1024.0):
        assert made.evaluate(np.array([SINGLE.ordinal(value)]), np.array([value]))[0] == pytest.approx(
            value, rel=2**-24
        )
    exact = SINGLE.value(SINGLE.ordinal(1e10))
    assert made.evaluate(np.array([SINGLE.ordinal(1e10)]), np.array([exact]))[0] == exact


def test_a_tolerance_out_of_reach_and_ordinals_that_do_not_exist_are_refused():
    with pytest.raises(ProofError, match="allow a larger tolerance"):
        taylor.derivative_boxes("gelu", SINGLE, 0, 2**30, 1e-18)
    with pytest.raises(RangeError, match="no range of float32's"):
        taylor.derivative_boxes("gelu", SINGLE, 0, 2**31)
    with pytest.raises(RangeError, match="outside the range of gelu on piece 1"):
        taylor.output_boxes("gelu", SINGLE, 1, first_above("gelu", SINGLE) - 1, 0)
