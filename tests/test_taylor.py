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
from invref.formulas import CATALOGUE, get
from invref.pieces import limit, pieces, turning_points

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


CLEARANCE = 8
"""Ulps that are left out around a turning value: no tolerance is met there."""
SHAPES = sorted(set(CATALOGUE) - set(NAMES))


def least_at_or_above(bound):
    ordinal = max(SINGLE.ordinal(float(bound)), SINGLE.first_ordinal)
    ordinal += SINGLE.value(min(ordinal, SINGLE.largest_ordinal)) < bound
    return -1 if ordinal == 0 else ordinal


def output_span(part):
    """First and last-plus-one ordinal of the float32 outputs of a piece, away from turning values."""
    ends = [(part.left_limit, part.left_end), (part.right_limit, part.right_end)]
    (low, at_low), (high, at_high) = ends if part.increasing else ends[::-1]
    with mpmath.workdps(60):
        if at_low == "turning":
            low += CLEARANCE * SINGLE.ulp(float(low))
        if at_high == "turning":
            high -= CLEARANCE * SINGLE.ulp(float(high))
        return least_at_or_above(low), -least_at_or_above(-high)


def scale(name):
    return any(mpmath.isinf(limit(name, side, 1)) for side in (-1, 1))


@pytest.mark.parametrize("name", SHAPES)
def test_every_row_has_boxes_of_its_slope_values_and_outputs(name):
    relative = scale(name)
    whole = SINGLE.first_ordinal, SINGLE.largest_ordinal + 1
    kinds = [
        ("derivative", 0, taylor.derivative_boxes(name, SINGLE, *whole, relative=relative), 1.0 if relative else None),
        ("value", 0, taylor.value_boxes(name, SINGLE, *whole, relative=True), 2.0**SINGLE.emin),
    ]
    for part in pieces(name):
        if not part.plateau:
            made = taylor.output_boxes(name, SINGLE, part.index, *output_span(part), relative=relative)
            kinds.append(("output", part.index, made, 1.0 if relative else None))
    draw = random.Random(name)
    for kind, index, made, floor in kinds:
        assert np.array_equal(made.first[1:], made.stop[:-1])
        for _ in range(25):
            i = draw.randrange(len(made))
            low, high = int(made.first[i]), int(made.stop[i]) - 1
            ordinal = draw.choice((low, high, draw.randint(low, high)))
            value = SINGLE.value(ordinal)
            if kind == "output" and value in known_ends(name, index):
                continue
            exact = exactly(kind, name, value, index)
            got = made.evaluate(np.array([ordinal]), np.array([value]))[0]
            with mpmath.workdps(60):
                assert abs(mpmath.mpf(float(got)) - exact) <= made.bounds[i], (kind, index, value)
                allowed = taylor.TOLERANCE * (1 if floor is None else max(abs(exact), floor))
                assert made.bounds[i] <= allowed * (1 + 1e-9), (kind, index, value)


def known_ends(name, index):
    part = pieces(name)[index]
    return {float(part.left_limit), float(part.right_limit)}


def exactly(kind, name, value, index):
    if kind != "output":
        return getattr(reference, kind)(name, value, 25).value
    return reference.derivative_from_output(name, value, index, 25).value


def test_outputs_at_an_exact_end_decode_to_the_slope_there():
    zero = SINGLE.ordinal(0.0)
    for name, piece, slope in (("elu", 0, 1.0), ("tanhshrink", 1, 0.0), ("relu2", 1, 0.0), ("leaky_relu", 1, 1.0)):
        made = taylor.output_boxes(name, SINGLE, piece, zero, zero + 1, relative=name == "relu2")
        assert made.evaluate(np.array([zero]), np.array([0.0]))[0] == slope
    at = SINGLE.ordinal(10.0)
    assert taylor.output_boxes("gelu_10", SINGLE, 1, at, at + 1).evaluate(np.array([at]), np.array([10.0]))[0] == 1


def test_no_box_holds_values_from_both_sides_of_a_break():
    for name in ("relu6", "hardshrink", "xielu"):
        made = taylor.value_boxes(name, SINGLE, SINGLE.ordinal(-1.0), SINGLE.ordinal(8.0))
        for first, stop in zip(made.first, made.stop, strict=True):
            assert get(name).branch_of(SINGLE.value(int(first))) == get(name).branch_of(SINGLE.value(int(stop) - 1))


def test_the_value_at_a_break_is_that_of_its_owner():
    for x, slope in ((0.0, 0.0), (-0.0, 0.0), (6.0, 0.0), (3.0, 1.0)):
        ordinal = SINGLE.ordinal(x)
        made = taylor.derivative_boxes("relu6", SINGLE, -5, SINGLE.ordinal(7.0))
        assert made.evaluate(np.array([ordinal]), np.array([x]))[0] == slope


def test_outputs_of_a_plateau_are_refused():
    with pytest.raises(RangeError, match="the output does not tell x there"):
        taylor.output_boxes("relu", SINGLE, 0, 0, 1)
