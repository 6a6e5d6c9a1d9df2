"""float64: sampled inputs against Arb, and every input around the turning points for the error floor.

There is no running all of float64, so the verdict is `sampled`. Guarantees that what is sampled is the same on every
run. Must not know how a record is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray

from invref.pieces import turning_points
from verify import batches, sampling
from verify.findings import Findings
from verify.oracle import TAIL, Oracle, cuts_of, exact_errors, exact_slopes
from verify.record import Check, WorstInput
from verify.targets import Target
from verify.window64 import FLOAT64, STRIDE, Window, Worst

SAMPLES = 20_000
SPAN = 512
"""Consecutive inputs on each side of a landmark."""

FACTOR, ALLOWED = 1.1, 1e-12
"""The worst error may be the floor times the one plus the other."""

CLEAR = 1e-3
"""At least this far from turning points, no error may exceed `ALLOWED`."""

ZERO_TAIL_BOUND = 1e-5
SLACK = 2.0**-53
"""The window's f' is a polynomial evaluated in float64, and at most about 1."""


def run(target: Target, oracle: Oracle, samples: int, threads: int, report: Callable[[int, int], None]) -> Findings:
    """Findings of a float64 layer: `samples` random inputs, landmarks, and windows around the turning points."""
    windows = [Window(target.formula, point) for point in turning_points(target.formula)]
    _run_windows(windows, target, threads, report)
    chosen = np.concatenate([sampling.ordinals(FLOAT64, oracle, samples, SPAN), *(w.extremes for w in windows)])
    chosen = np.unique(chosen)
    coverage = f"{chosen.size:,} inputs: {samples:,} random ones and landmarks"
    if windows:
        around = sum(window.inputs for window in windows)
        coverage += f"; error floor from all {around:,} around turning points, one in {STRIDE} of them also backward"
    return _findings(target, oracle, chosen, windows, coverage)


def _run_windows(windows: list[Window], target: Target, threads: int, report: Callable[[int, int], None]) -> None:
    total = sum(window.inputs for window in windows)
    done = 0
    lock = threading.Lock()

    def step(inputs: int) -> None:
        nonlocal done
        with lock:
            done += inputs
            report(done, total)

    for window in windows:
        window.run(target, threads, step)


def _findings(
    target: Target, oracle: Oracle, ordinals: NDArray[np.int64], windows: list[Window], coverage: str
) -> Findings:
    # Repeating the last input fills the last vector, so that none falls to the scalar tail.
    padded = np.pad(ordinals, (0, -ordinals.size % batches.VECTOR), mode="edge")
    inputs = FLOAT64.from_ordinals(torch.from_numpy(padded))
    arrays = (inputs, *batches.together(target.layer, inputs), *batches.together(target.native, inputs))
    x, y, dx, native_y, native_dx = (array.numpy()[: ordinals.size] for array in arrays)
    slopes = exact_slopes(target.formula, x)
    error = exact_errors(target.formula, x, dx)
    cuts = cuts_of(target.formula, FLOAT64)
    piece = np.searchsorted(cuts, ordinals, side="right")
    rising = np.array([part.slope for part in oracle.ranges])[piece]
    points = np.array([float(point.x) for point in turning_points(target.formula)])
    clear = (np.abs(x[:, None] - points) >= CLEAR).all(axis=1)
    left, right = oracle.tails
    tail = (x < left) | (x > right)
    zero, one = tail & (np.abs(slopes) < TAIL), tail & (np.abs(1 - slopes) < TAIL)
    finite = np.isfinite(native_dx)
    floor = float(np.max([window.floor for window in windows], initial=0.0))

    def worst(values: NDArray[np.float64], where: NDArray[np.bool_], *others: Worst) -> Worst:
        found = Worst()
        found.take(values[where], ordinals[where])
        for other in others:
            found.merge(other)
        return found

    def check(name: str, found: Worst, bound: float, slack: float = 0.0) -> Check:
        at = (
            None
            if found.at is None
            else WorstInput.of(FLOAT64, found.at, int(np.searchsorted(cuts, found.at, "right")))
        )
        return Check.at_most(name, found.value + slack, bound, at)

    every = np.ones(x.size, bool)
    different = worst(
        (y.view(np.int64) != native_y.view(np.int64)).astype(float), every, *(w.different for w in windows)
    )
    gradient = worst(error, every, *(w.error for w in windows))
    bound = FACTOR * floor + ALLOWED
    against = np.maximum(-rising * dx, 0.0)
    overall = check("gradient error", gradient, bound, SLACK)
    checks = [
        check("forward identical", different, 0.0),
        check("finite gradients", worst((~np.isfinite(dx)).astype(float), every), 0.0),
        overall,
        check("gradient error away from turning points", worst(error, clear), ALLOWED),
        check("zero tail", worst(np.abs(dx), zero), ZERO_TAIL_BOUND),
        check("zero tail sign", worst(against, zero), 0.0),
        check("one tail", worst(error, one), FLOAT64.ulp(1.0)),
    ]
    if not finite.all():
        name, first = "non-finite gradients of the framework's own", worst((~finite).astype(float), ~finite)
        checks.append(replace(check(name, first, inf), measured=float((~finite).sum()), bound=None))
    return Findings(
        inputs=ordinals.size,
        expected=ordinals.size,
        coverage=coverage,
        verdict="sampled",
        worst_error=overall.measured,
        worst_input=overall.worst,
        floor=floor,
        native_error=worst(np.abs(native_dx - slopes), finite).value,
        nonfinite=int((~np.isfinite(dx)).sum()),
        bound=bound,
        checks=checks,
    )
