import numpy as np
import pytest
import torch
from mpmath import mpf

from invref import formulas, reference
from invref.pieces import turning_points
from verify import sampling
from verify.oracle import CLEARANCE, FLOAT32, TAIL, TOLERANCE, exact_slopes
from verify.sweep import oracle_of

NAMES = ["gelu", "gelu_tanh", "silu"]


@pytest.fixture(params=NAMES)
def oracle(request):
    return oracle_of(formulas.get(request.param))


def some_inputs(oracle, samples, span):
    ordinals = torch.from_numpy(sampling.ordinals(FLOAT32, oracle, samples, span))
    return FLOAT32.from_ordinals(ordinals).numpy()


def test_the_derivative_is_within_its_bound_of_arb_everywhere(oracle):
    x = some_inputs(oracle, samples=2000, span=32)
    # The exact slope is rounded to float64 once, and is less than 2.
    assert (
        np.abs(oracle.derivative(x) - exact_slopes(oracle.formula, x.astype(np.float64))).max() <= TOLERANCE + 2.0**-53
    )


def test_the_derivative_does_not_depend_on_the_order_of_the_inputs(oracle):
    x = some_inputs(oracle, samples=3000, span=16)
    order = np.random.default_rng(0).permutation(x.size)
    # Both orders evaluate the same polynomial, one of them possibly with fused operations.
    assert np.abs(oracle.derivative(x)[order] - oracle.derivative(x[order])).max() <= 2 * TOLERANCE


def test_derivative_from_output_is_within_its_bound_of_the_reference(oracle):
    random = np.random.default_rng(1)
    for part in oracle.ranges:
        piece = part.piece
        last = min(part.high, FLOAT32.ordinal(float(max(piece.left_limit, piece.right_limit))) - 1)
        ordinals = np.unique(np.r_[part.low + np.arange(40), random.integers(part.low, last, 40)])
        y = FLOAT32.from_ordinals(torch.from_numpy(ordinals)).numpy()
        y = y[np.abs(y) < 1e30]
        exact = [float(reference.derivative_from_output(oracle.formula, float(v), piece.index, 20).value) for v in y]
        assert np.abs(oracle.from_output(y, piece.index) - exact).max() <= TOLERANCE + 2.0**-53


def test_an_output_that_has_underflowed_on_the_left_decodes_to_zero(oracle):
    assert abs(oracle.from_output(np.array([-0.0], np.float32), 0)[0]) <= TOLERANCE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_no_box_holds_is_nan(oracle, value):
    values = np.array([1.0, value, 2.0], np.float32)
    assert np.isnan(oracle.derivative(values)).tolist() == [False, True, False]
    assert np.isnan(oracle.from_output(values, 1)).tolist() == [False, True, False]


def test_an_output_below_the_clear_range_is_nan(oracle):
    point = turning_points(oracle.formula)[0]
    assert np.isnan(oracle.from_output(np.array([point.y], np.float32), 0))


def test_the_pieces_hold_every_finite_input_once_and_meet_at_the_turning_point(oracle):
    left, right = oracle.ranges
    assert left.first == FLOAT32.first_ordinal
    assert left.stop == right.first
    assert right.stop == FLOAT32.largest_ordinal + 1
    assert FLOAT32.value(left.stop - 1) < turning_points(oracle.formula)[0].x < FLOAT32.value(right.first)


def test_outputs_count_from_the_first_that_is_clear_of_the_turning_value(oracle):
    y = turning_points(oracle.formula)[0].y
    clearance = CLEARANCE * mpf(FLOAT32.ulp(float(y)))
    for part in oracle.ranges:
        assert FLOAT32.value(part.low - 1) < y + clearance <= FLOAT32.value(part.low)


def test_in_a_tail_the_derivative_stays_nearer_its_limit_than_at_the_end_of_the_tail(oracle):
    x = some_inputs(oracle, samples=4000, span=64)
    left, right = oracle.tails
    edges = oracle.derivative(np.array([left, right], np.float32))
    assert np.abs(oracle.derivative(x[x < left])).max() <= abs(edges[0]) + TOLERANCE
    assert np.abs(1 - oracle.derivative(x[x > right])).max() <= abs(1 - edges[1]) + TOLERANCE
    # The ends are the last bfloat16 values that have not settled: the next ones have.
    inner = torch.tensor([left, right]).bfloat16()
    outer = torch.nextafter(inner, inner * torch.inf).float().numpy()
    assert np.abs(oracle.derivative(outer) - [0, 1]).max() < TAIL <= np.abs(edges - [0, 1]).min()
