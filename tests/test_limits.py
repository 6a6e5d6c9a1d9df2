"""Single inputs with an exact answer, where many inputs share one stored output."""

from dataclasses import replace

import pytest

from verify import foreign, sweep


@pytest.fixture(scope="module", params=["x*x", "x*tanh(x)"])
def target(request):
    return foreign.from_text(request.param)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_any_gradient_of_an_input_with_the_same_underflowed_output_is_right_at_zero(target, dtype):
    record = sweep.run(target, dtype)
    assert record.passed, record.failures
    zeros = {check.name: check for check in record.checks if check.name in ("gradient at +0", "gradient at -0")}
    assert {check.bound for check in zeros.values()} == {0.0}
    assert len(zeros) == 2


def test_a_gradient_at_zero_that_no_such_input_has_is_wrong(target):
    off = replace(target, layer=lambda x: target.layer(x) + 1e-3 * (x - x.detach()))
    assert {"gradient at +0", "gradient at -0"} <= {check.name for check in sweep.run(off, "bfloat16").failures}
