import json
import math
from dataclasses import fields, replace

import pytest

from invref import formats
from invref.errors import InputError
from verify.record import Check, Record, WorstInput

WORST = WorstInput(-0.75, (-0.75).hex(), "0xbf400000", 0)


GOOD = Record(
    activation="gelu",
    formula="x",
    target="t",
    forward="f",
    dtype="float32",
    device="cpu",
    inputs=3,
    coverage="all",
    verdict="exhausted",
    worst_error=1e-4,
    worst_input=WORST,
    error_floor=1e-4,
    excess_error=0.0,
    native_error=1e-7,
    nonfinite_gradients=0,
    bound=1.1e-4,
    seconds=1.0,
    reproduce="python -m verify",
    pieces=2,
    bits=1,
    decoder="closed form",
    forward_error_ulps=0.5,
    forward_worst=WORST,
    checks=[Check("count", 3.0, 3.0, True), Check.at_most("gradient error", 1e-4, 1.1e-4, WORST)],
)


def test_the_fields_of_a_record_come_in_the_documented_order():
    documented = (
        "activation, formula, target, forward, dtype, device, inputs, coverage, verdict, worst_error, worst_input, "
        "error_floor, excess_error, native_error, nonfinite_gradients, bound, seconds, reproduce, pieces, bits, "
        "decoder, gain, scale, overflowed, forward_error_ulps, forward_worst, checks"
    )
    assert [f.name for f in fields(Record)] == documented.split(", ") == list(GOOD.to_json())


@pytest.mark.parametrize("number", [0.1, math.inf, -math.inf, None])
def test_a_record_survives_strict_json_unchanged(number):
    before = replace(GOOD, worst_error=number, error_floor=number, checks=[Check("a", math.inf, number, False, WORST)])
    text = json.dumps(before.to_json(), allow_nan=False)
    assert Record.from_json(text) == Record.from_json(json.loads(text)) == before


def test_a_nan_survives_strict_json():
    text = json.dumps(replace(GOOD, worst_error=math.nan).to_json(), allow_nan=False)
    assert math.isnan(Record.from_json(text).worst_error)


def test_json_that_is_no_record_is_refused_with_the_field_that_is_wrong():
    data = GOOD.to_json()
    del data["bound"]
    with pytest.raises(InputError, match="bound"):
        Record.from_json(data)


@pytest.mark.parametrize(("measured", "bound"), [(math.nan, 1.0), (0.0, math.nan), (math.inf, 1.0), (1.5, 1.0)])
def test_nan_and_excess_never_hold(measured, bound):
    assert not Check.at_most("gradient error", measured, bound).holds


@pytest.mark.parametrize("verdict", ["unproved", "failed"])
def test_a_verdict_without_a_bound_does_not_pass(verdict):
    assert GOOD.passed
    assert not replace(GOOD, verdict=verdict).passed


def test_one_violated_check_fails_the_record():
    bad = Check.at_most("zero tail", 1.0, 0.0)
    assert replace(GOOD, checks=[bad]).failures == [bad]
    assert not replace(GOOD, checks=[bad]).passed


@pytest.mark.parametrize(("name", "value", "bits"), [("bfloat16", -0.0, "0x8000"), ("float32", -0.75, "0xbf400000")])
def test_a_worst_input_is_named_exactly(name, value, bits):
    fmt = formats.get(name)
    ordinal = int(fmt.ordinals(fmt.tensor(0, 1).new_tensor([value])))
    assert WorstInput.of(fmt, ordinal, 1) == WorstInput(value, value.hex(), bits, 1)
