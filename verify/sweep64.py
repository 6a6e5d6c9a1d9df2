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

from invref.pieces import landmarks, turning_points
from verify import batches, jumps, sampling
from verify.checks import FOREIGN_FACTOR
from verify.findings import Findings, Run
from verify.oracle import TAIL, Oracle, exact_errors
from verify.record import Check, WorstInput
from verify.sharing import zero_tail
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
    smooth = turning_points(target.formula) if oracle.gradient is None else ()
    windows = [Window(target.formula, point) for point in smooth if point.curvature]
    _run_windows(windows, target, threads, report)
    chosen = np.concatenate([sampling.ordinals(FLOAT64, oracle, samples, SPAN), *(w.extremes for w in windows)])
    chosen = np.unique(chosen)
    for edge in oracle.edges(FLOAT64):
        chosen = chosen[(chosen < edge.first) | (chosen >= edge.stop)]
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
    slopes = oracle.exact(x)
    error = exact_errors(target.formula, x, dx) if oracle.gradient is None else np.abs(dx - slopes)
    native_error = np.abs(native_dx - slopes)
    measured = np.ones(x.size, bool)
    if oracle.relative:
        measured = ~np.isinf(y)
        scale = np.maximum(1.0, np.abs(slopes))
        error, native_error = error / scale, native_error / scale
    piece = np.searchsorted([start for _, start in oracle.cuts(FLOAT64)], ordinals, side="right")
    marks = landmarks(target.formula) if oracle.gradient is None else ()
    points = np.array([float(mark.x) for mark in marks])
    clear = measured & (np.abs(x[:, None] - points) >= CLEAR).all(axis=1)
    left, right = oracle.tails
    tail = measured & ((x < left) | (x > right))
    zero, one = tail & (np.abs(slopes) < TAIL), tail & (np.abs(1 - slopes) < TAIL)
    finite = measured & np.isfinite(native_dx)
    floor = float(np.max([window.floor for window in windows], initial=0.0))
    held, own = target.held(FLOAT64.dtype), target.own(FLOAT64.dtype)

    def worst(values: NDArray[np.float64], where: NDArray[np.bool_], *others: Worst) -> Worst:
        found = Worst()
        found.take(values[where], ordinals[where])
        for other in others:
            found.merge(other)
        return found

    def check(name: str, found: Worst, bound: float, slack: float = 0.0, told: bool = False) -> Check:
        at = None if found.at is None else WorstInput.of(FLOAT64, found.at, oracle.piece_at(FLOAT64, found.at))
        if told:
            return Check(name, found.value + slack, None, True, at)
        return Check.at_most(name, found.value + slack, bound, at)

    def unequal(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
        same: NDArray[np.bool_] = (ours.view(np.int64) == theirs.view(np.int64)) | (np.isnan(ours) & np.isnan(theirs))
        return np.where(same, 0.0, 1.0)

    every = np.ones(x.size, bool)
    native = worst(native_error, finite)
    gradient = worst(error, measured, *(w.error for w in windows))
    bound = FACTOR * floor + ALLOWED if held else FOREIGN_FACTOR * native.value + ALLOWED
    told = not held and not target.foreign
    overall = check("gradient error", gradient, bound, SLACK, told)
    checks = [check("finite gradients", worst((~np.isfinite(dx)).astype(float), measured), 0.0, told=told), overall]
    if target.role == "row":
        different = worst(unequal(y, native_y), every, *(w.different for w in windows))
        checks.insert(0, check("forward identical", different, 0.0))
    if own:
        checks.append(check("gradient identical", worst(unequal(dx, native_dx), every), 0.0))
    if oracle.gradient is None:
        rising = np.array([part.slope for part in oracle.ranges])[piece]
        against = np.where(rising == 0, np.abs(dx), np.maximum(-rising * dx, 0.0))
        lost = max(ZERO_TAIL_BOUND, zero_tail(target, FLOAT64, oracle) if held else 0.0)
        checks += [
            check("gradient error away from turning points", worst(error, clear), ALLOWED, told=not held),
            check("zero tail", worst(np.abs(dx), zero), lost, told=not held),
            check("zero tail sign", worst(against, zero), 0.0, told=not held),
            check("one tail", worst(error, one), FLOAT64.ulp(1.0), told=not held),
        ]
    missing = measured & ~finite
    if missing.any():
        first = worst(missing.astype(float), missing)
        name = "non-finite gradients of the framework's own"
        checks.append(replace(check(name, first, inf, told=True), measured=float(missing.sum())))
    count = ordinals.size + jumps.count(oracle, FLOAT64)
    return Findings(
        Run(count, count, coverage, "sampled"),
        worst_error=overall.measured,
        worst_input=overall.worst,
        floor=floor if held else None,
        native_error=native.value,
        nonfinite=int((measured & ~np.isfinite(dx)).sum()),
        bound=None if told else bound,
        checks=checks,
        overflowed=int((~measured).sum()),
    )
