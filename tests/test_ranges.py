"""Where pieces lie in a format, and what happens at their ends."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from invref import formats, formulas
from verify import jumps, ranges, sharing, sweep, targets
from verify.oracle import FLOAT32
from verify.sweep import oracle_of

NAMES = ["gelu", "relu", "elu", "hardswish", "hardshrink", "tanhshrink", "softplus", "xielu", "gelu_10", "sigmoid"]


@pytest.mark.parametrize("name", NAMES)
def test_every_input_is_in_one_range_or_at_one_jump(name):
    oracle = oracle_of(formulas.get(name))
    spans = sorted(
        [(part.first, part.stop) for part in oracle.ranges]
        + [(edge.first, edge.stop) for edge in oracle.edges(FLOAT32)]
    )
    assert spans[0][0] == FLOAT32.first_ordinal
    assert spans[-1][1] == FLOAT32.largest_ordinal + 1
    assert all(stop == first for (_, stop), (first, _) in pairwise(spans))


def test_both_zeros_are_at_a_jump_at_zero():
    (edge,) = ranges.edges_of(formulas.get("relu"), FLOAT32)
    assert (edge.first, edge.stop, edge.least, edge.largest) == (-1, 1, 0.0, 1.0)


def test_a_break_without_a_jump_belongs_to_the_piece_that_owns_it():
    formula = formulas.get("elu")
    assert ranges.edges_of(formula, FLOAT32) == ()
    left, right = ranges.ranges(formula)
    # where(x > 0, x, ...): zero is the left branch's.
    assert (left.stop, right.first) == (1, 1)


def test_a_break_between_two_floats_is_at_no_input():
    formula = formulas.define("where(x > 0.1, 2 * x, x)")
    assert ranges.edges_of(formula, formats.get("float32")) == ()


def test_no_output_of_a_plateau_counts_for_the_decoder():
    plateau, slope = ranges.ranges(formulas.get("relu"))
    assert plateau.low > plateau.high
    assert (plateau.slope, slope.slope) == (0.0, 1.0)


def test_the_boxes_hold_one_side_of_a_break_each():
    oracle = oracle_of(formulas.get("hardswish"))
    x = np.array([-3.0000002, -2.9999998, 2.9999998, 3.0000002], np.float32)
    assert oracle.derivative(x) == pytest.approx([0.0, -0.5, 1.5, 1.0], abs=1e-6)


def test_an_output_rounded_to_beyond_a_limit_decodes_to_the_slope_there():
    oracle = oracle_of(formulas.get("selu"))
    # -scale * alpha is no float: the nearest one below is beyond the limit.
    below = np.nextafter(np.float32(-1.7580993408473766), np.float32(-2))
    assert oracle.from_output(np.array([below], np.float32), 0)[0] == 0.0
    assert oracle.from_output(np.array([0.0], np.float32), 0)[0] == pytest.approx(1.7580993408473766)


def test_forward_values_are_right_to_far_below_an_ulp_everywhere():
    oracle = oracle_of(formulas.get("silu"))
    x = torch.tensor([-80.0, -20.0, -1e-30, 1e-40, 0.5, 3e38]).float().numpy()
    exact = [float(v) for v in (x.astype(np.longdouble) / (1 + np.exp(-x.astype(np.longdouble))))]
    assert oracle.value(x) == pytest.approx(exact, rel=1e-11)


def test_f_without_a_bound_on_its_slope_is_measured_relatively_and_overflows_apart():
    record = sweep.run(targets.TARGETS["relu2"], "bfloat16")
    assert record.passed, record.failures
    assert record.scale == "relative beyond 1"
    fmt = formats.get("bfloat16")
    y = torch.relu(fmt.tensor(fmt.first_ordinal, fmt.finite_count)) ** 2
    assert record.overflowed == int(y.isinf().sum()) > 0


def test_inputs_that_share_a_stored_pair_are_found_on_both_sides():
    target, fmt = targets.TARGETS["tanhshrink"], formats.get("bfloat16")
    found = sharing.sharing(0, target, fmt, oracle_of(target.formula))
    x = torch.tensor([fmt.value(o) for o in found], dtype=fmt.dtype)
    assert (target.native(x) == 0).all()
    assert float(x.max()) > 0.01
    assert float(x.min()) < -0.01


def test_a_gradient_between_the_slopes_is_right_at_a_jump_and_another_is_not():
    target, fmt = targets.torch_itself("leaky_relu"), formats.get("float32")
    oracle = oracle_of(target.formula)
    assert jumps.count(oracle, fmt) == 2
    (check,) = jumps.checks(target, fmt, oracle)
    assert check.holds


def test_a_limit_just_below_a_float_does_not_hold_that_float():
    clipped = ranges.ranges(formulas.get("gelu_10"))[1].piece
    # 10 Phi(10) is 10 less 8e-23: mpmath would round that away on every operation.
    assert ranges.FLOAT32.value(ranges.at_most(clipped.right_limit)) < 10
    assert ranges.FLOAT32.value(ranges.at_least(clipped.right_limit)) == 10
