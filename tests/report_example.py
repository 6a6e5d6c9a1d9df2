"""The data of one report, measured afresh, with records that need no run."""

from functools import cache

from invref import formats
from verify import pages_data, targets
from verify.oracle import Oracle
from verify.record import Check, Record, WorstInput

RUN = {"python": "3", "torch": "2", "cpu": "some", "tables": {"gelu": "ab" * 32}, "date": "2024-07-23", "seconds": 1.0}
GELU = targets.TARGETS["gelu"]
WORST = {"bfloat16": -0.75, "float16": -0.751953125, "float32": -0.7517935037612915}


def record(dtype, **changes):
    fmt = formats.get(dtype)
    worst = WorstInput.of(fmt, fmt.ordinal(WORST[dtype]), 1)
    checks = [Check.at_most("gradient error", 0.01, 0.011, worst), Check.at_most("decoder error", 4e-7, 9.5e-7)]
    fields = {
        "activation": "gelu", "formula": GELU.formula.text, "target": GELU.label, "forward": "kernel", "dtype": dtype,
        "device": "cpu",
        "inputs": fmt.finite_count, "coverage": "all", "verdict": "exhausted", "worst_error": 0.0106,
        "worst_input": worst, "error_floor": 0.01057, "excess_error": 3e-5, "native_error": 3.9e-3,
        "nonfinite_gradients": 0, "bound": 0.0111, "seconds": 1.5,
        "reproduce": f"python -m verify gradient gelu --dtype {dtype} --input {worst.bits}",
        "pieces": 2, "bits": 1, "decoder": "rational in the signed root", "checks": checks,
    }  # fmt: skip
    return Record(**{**fields, **changes})


def records():
    return [record(dtype) for dtype in WORST]


@cache
def example():
    return pages_data.build(GELU, Oracle(GELU.formula), records(), RUN)
