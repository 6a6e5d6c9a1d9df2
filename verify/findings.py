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
from verify.scan import FORWARD_ULPS, GRADIENT, NATIVE, NONFINITE, NOWHERE, OVERFLOWED, Tally
from verify.sharing import zero_tail
from verify.targets import Target


@dataclass(frozen=True)
class Path:
    """One way through the layer: its tally, the error floor's maximum of its forward, and a suffix for its checks."""

    tally: Tally
    floor: float | None
    suffix: str = ""


@dataclass(frozen=True)
class Run:
    """How many inputs were run where `expected` should have been, in words, and what holds if every check does."""

    inputs: int
    expected: int
    coverage: str
    verdict: str


@dataclass
class Findings:
    """A run's part of the record."""

    run: Run
    worst_error: float
    worst_input: WorstInput | None
    floor: float | None
    native_error: float
    nonfinite: int
    bound: float | None
    checks: list[Check]
    overflowed: int = 0
    forward_error: float | None = None
    forward_worst: WorstInput | None = None


def of_paths(target: Target, fmt: Format, oracle: Oracle, paths: list[Path], run: Run) -> Findings:
    """Findings of a 16- or 32-bit format."""
    total = Tally()
    for path in paths:
        total.add(path.tally)
    floors = [path.floor for path in paths if path.floor is not None]
    floor = float(np.max(floors)) if floors else None
    shared = zero_tail(target, fmt, oracle) if target.held(fmt.dtype) else 0.0
    # The framework's gradients that are not finite are counted; its worst error is that of the others.
    slot = NATIVE if target.role == "native" else GRADIENT
    findings = Findings(
        run,
        float(total.worst[slot]) + TOLERANCE,
        checks.worst_input(oracle, fmt, int(total.worst_at[slot])),
        floor,
        float(total.worst[NATIVE]),
        max(int(path.tally.counts[NONFINITE]) for path in paths),
        _bound(target, fmt, oracle, total, floor),
        [
            check
            for path in paths
            # One decoder serves all paths, so it is held to the floor of the path that rounds worst.
            for check in checks.of_tally(path.tally, fmt, oracle, target, floor, shared, path.suffix)
        ],
        overflowed=max(int(path.tally.counts[OVERFLOWED]) for path in paths),
    )
    if target.role != "row" and target.known:
        findings.forward_error = float(total.worst[FORWARD_ULPS]) + checks.ulps_slack(fmt)
        findings.forward_worst = checks.worst_input(oracle, fmt, int(total.worst_at[FORWARD_ULPS]))
    return findings


def _bound(target: Target, fmt: Format, oracle: Oracle, total: Tally, floor: float | None) -> float | None:
    """What the worst error was held to, with the gradient's rounding to a 16-bit format."""
    at = int(total.worst_at[GRADIENT])
    slope = 0.0 if at == NOWHERE else float(oracle.derivative(np.array([FLOAT32.value(at)], np.float32))[0])
    size = max(1.0, abs(slope))
    half = 0.0 if at == NOWHERE else fmt.ulp(slope) / 2 / (size if oracle.relative else 1.0)
    if target.held(fmt.dtype) and floor is not None:
        return checks.floor_bound(fmt, floor) + (half if fmt.bits == 16 else 0.0)
    if target.by_formula:
        return checks.FLOAT32_KERNEL * max(oracle.typical, size) / (size if oracle.relative else 1.0) + half
    return checks.native_bound(float(total.worst[NATIVE])) if target.foreign else None
