"""What a run found, in the record's terms: the tallies of all paths put together.

Guarantees that the worst of all paths is what is reported, NaN before any number. Must not know how inputs are run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from invref.formats import Format
from verify import checks
from verify.oracle import FLOAT32, TOLERANCE, Oracle
from verify.record import Check, WorstInput
from verify.scan import GRADIENT, NATIVE, NONFINITE, NOWHERE, Tally


@dataclass(frozen=True)
class Path:
    """One way through the layer: its tally, the error floor's maximum of its forward, and a suffix for its checks."""

    tally: Tally
    floor: float
    suffix: str = ""


@dataclass
class Findings:
    """A run's part of the record; `inputs` were run where `expected` should have been."""

    inputs: int
    expected: int
    coverage: str
    verdict: str
    worst_error: float
    worst_input: WorstInput | None
    floor: float
    native_error: float
    nonfinite: int
    bound: float
    checks: list[Check]


def of_paths(
    fmt: Format, oracle: Oracle, paths: list[Path], inputs: int, expected: int, coverage: str, verdict: str
) -> Findings:
    """Findings of a 16- or 32-bit format; `verdict` is what holds if every check does."""
    total = Tally()
    for path in paths:
        total.add(path.tally)
    at = int(total.worst_at[GRADIENT])
    floor = float(np.max([path.floor for path in paths]))
    bound = checks.floor_factor(fmt) * floor
    if fmt.bits == 16 and at != NOWHERE:
        # The gradient is rounded to the format, too.
        slope = oracle.derivative(np.array([FLOAT32.value(at)], np.float32))
        bound += fmt.ulp(float(slope[0])) / 2
    return Findings(
        inputs,
        expected,
        coverage,
        verdict,
        float(total.worst[GRADIENT]) + TOLERANCE,
        checks.worst_input(oracle, fmt, at),
        floor,
        float(total.worst[NATIVE]),
        max(int(path.tally.counts[NONFINITE]) for path in paths),
        bound,
        [check for path in paths for check in checks.of_tally(path.tally, fmt, oracle, path.floor, path.suffix)],
    )
