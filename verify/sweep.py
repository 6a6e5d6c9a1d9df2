"""Verify one layer in one format: run its inputs, apply the checks, and write the record.

Guarantees that the record's count is the number of inputs that were run, that a verdict never claims more inputs than
that, that a check that does not hold makes it `failed`, and that a truth which cannot be bounded makes it `unproved`.
Must not know how the inputs are run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from math import nan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from invref import formats
from invref.errors import InputError, ProofError
from invref.formats import Format
from invref.formulas import Formula
from verify import batches, checks, findings, jumps, limits, sampling, shards, sweep32, sweep64
from verify.findings import Findings, Run
from verify.measure import Measured, measure
from verify.oracle import FLOAT32, Oracle
from verify.record import ABSOLUTE, RELATIVE, Check, Record
from verify.scan import Tally
from verify.targets import Layer, Target

Progress = Callable[[int, int], None]
"""Told (inputs done, inputs in all)."""

SPAN = 4096
"""Consecutive inputs on each side of a landmark in a sampled run."""


def oracle_of(formula: Formula, gradient: Formula | None = None) -> Oracle:
    """One oracle a formula (and gradient), kept: its boxes serve all formats."""
    return _oracle(formula, gradient)


@cache
def _oracle(formula: Formula, gradient: Formula | None) -> Oracle:
    return Oracle(formula, gradient)


def run(
    target: Target,
    dtype_name: str,
    *,
    shard: tuple[int, int] = (1, 1),
    samples: int | None = None,
    progress: Progress | None = None,
    state_dir: Path | None = None,
    keep: bool = False,
    inputs: Callable[[Format], Tensor] | None = None,
) -> Record:
    """Verify `target` on every finite input of the format, or on landmarks and `samples` random ones.

    float64 is always sampled, 16-bit formats never are: all of their inputs take a second. `shard` = (I, N) runs part
    I of N of the float32 inputs; other formats are not split, each part runs them whole.
    With `state_dir`, finished shards are kept there until a run has them all: an interrupted run resumes, and once
    every part has run, a run of all is their merger; it forgets them then, unless told to `keep` them.
    `inputs` replaces the inputs of a 16-bit format
    (for the verifier's own tests). Raises InputError for a bad shard or number of samples.
    """
    fmt = formats.get(dtype_name)
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"no part {shard[0]} of {shard[1]}: parts are numbered from 1")
    if samples is not None and samples < 1:
        raise InputError(f"cannot check {samples} samples: ask for 1 or more")
    start = time.perf_counter()
    report = progress or (lambda done, total: None)
    oracle = oracle_of(target.formula, target.gradient)
    try:
        with batches.one_thread() as threads:
            if fmt.bits == 64:
                found = sweep64.run(target, oracle, samples or sweep64.SAMPLES, threads, report)
            elif fmt.bits == 16:
                found = _sixteen(target, fmt, oracle, (inputs or all_inputs)(fmt), report)
            elif samples is not None:
                found = _sampled(target, oracle, samples, report)
            else:
                found = _float32(target, oracle, shard, state_dir, keep, threads, report)
            found.checks[:0] = [_count(found.run)]
            found.checks += [*jumps.checks(target, fmt, oracle), *limits.limits(target, fmt, oracle)]
    except ProofError as error:
        found = _unproved(error)
    verdict = found.run.verdict if all(check.holds for check in found.checks) else "failed"
    return Record(
        activation=target.name,
        formula=target.formula.text,
        target=target.label,
        forward=target.forward,
        dtype=fmt.name,
        device=target.device,
        inputs=found.run.inputs,
        coverage=found.run.coverage,
        verdict=verdict,
        worst_error=found.worst_error,
        worst_input=found.worst_input,
        error_floor=found.floor,
        excess_error=None if found.floor is None else found.worst_error - found.floor,
        native_error=found.native_error,
        nonfinite_gradients=found.nonfinite,
        bound=found.bound,
        seconds=time.perf_counter() - start,
        reproduce=_command(target, fmt, found),
        pieces=len(oracle.ranges),
        bits=target.bits(fmt.dtype),
        decoder=target.decoder(fmt.dtype),
        gain=target.gain,
        scale=RELATIVE if oracle.relative else ABSOLUTE,
        overflowed=found.overflowed,
        forward_error_ulps=found.forward_error,
        forward_worst=found.forward_worst,
        checks=found.checks,
    )


def all_inputs(fmt: Format) -> Tensor:
    """Every finite value of a 16-bit format."""
    return fmt.tensor(fmt.first_ordinal, fmt.finite_count)


def _unproved(error: ProofError) -> Findings:
    """What is left where the truth could not be bounded: no input counts."""
    run = Run(0, 0, f"none: {error}", "unproved")
    return Findings(run, nan, None, None, nan, 0, None, [])


def _sixteen(target: Target, fmt: Format, oracle: Oracle, x: Tensor, report: Progress) -> Findings:
    long = measure(target, fmt, oracle, x, batches.together)
    report(x.numel(), 2 * x.numel())
    short = measure(target, fmt, oracle, x, _in_slices(target))
    report(2 * x.numel(), 2 * x.numel())
    coverage = (
        f"all {fmt.finite_count:,} finite inputs, twice: as one tensor, and {batches.slice_on(target.device)} at a time"
    )
    # Neither inputs run twice nor inputs that no piece took may pass for others; those at jumps run by themselves.
    at_jumps = jumps.count(oracle, fmt)
    distinct = np.unique(fmt.ordinals(x).numpy()).size
    inputs = min(distinct, long.tally.inputs + at_jumps, short.tally.inputs + at_jumps)
    run = Run(inputs, fmt.finite_count, coverage, "exhausted")
    return findings.of_paths(target, fmt, oracle, [_path(target, fmt, long), _path(target, fmt, short, True)], run)


def _path(target: Target, fmt: Format, measured: Measured, scalar: bool = False) -> findings.Path:
    floor = measured.floor if target.held(fmt.dtype) else None
    return findings.Path(measured.tally, floor, checks.SCALAR if scalar else "")


def _sampled(target: Target, oracle: Oracle, samples: int, report: Progress) -> Findings:
    window = sweep32.around_turning_points(oracle)
    ordinals = sweep32.without_jumps(oracle, sampling.ordinals(FLOAT32, oracle, samples, SPAN))
    x = torch.cat([FLOAT32.from_ordinals(torch.from_numpy(ordinals)), window])
    x = FLOAT32.from_ordinals(FLOAT32.ordinals(x).unique())
    # Repeating the last input fills the last vector, so that none falls to the scalar tail.
    long = measure(
        target, FLOAT32, oracle, torch.cat([x, x[-1:].expand(-x.numel() % batches.VECTOR)]), batches.together
    )
    report(x.numel(), x.numel())
    coverage = f"{x.numel():,} inputs: {samples:,} random ones, landmarks, and {_around(window)}"
    paths = [_path(target, FLOAT32, long), *_scalar_path(target, oracle, window)]
    at_jumps = jumps.count(oracle, FLOAT32)
    tallied = long.tally.inputs - -x.numel() % batches.VECTOR + at_jumps
    run = Run(tallied, x.numel() + at_jumps, coverage, "sampled")
    return findings.of_paths(target, FLOAT32, oracle, paths, run)


def _float32(
    target: Target,
    oracle: Oracle,
    shard: tuple[int, int],
    state_dir: Path | None,
    keep: bool,
    threads: int,
    report: Progress,
) -> Findings:
    plan = shards.plan(oracle)
    chosen = shards.part_of(plan, shard)
    whole = len(chosen) == len(plan)
    at_jumps = jumps.count(oracle, FLOAT32)
    expected = FLOAT32.finite_count if whole else sum(s.stop - s.first for s in chosen) + at_jumps
    store = shards.Store(state_dir, target)
    done = 0

    def step(inputs: int) -> None:
        nonlocal done
        done += inputs
        report(done, expected)

    results = sweep32.run_shards(target, oracle, chosen, store, threads, step)
    tally = Tally()
    for piece in chosen:
        tally.add(results[piece.index].tally)
    window = sweep32.around_turning_points(oracle)
    if whole:
        floor = sweep32.whole_floor(target, oracle, plan, results) if target.held(FLOAT32.dtype) else None
        coverage = "all " + f"{expected:,} finite inputs"
    else:
        floor = _path(target, FLOAT32, measure(target, FLOAT32, oracle, window, batches.together)).floor
        coverage = f"part {shard[0]}/{shard[1]} of the finite inputs, error floor from {_around(window)}"
    scalar = _scalar_path(target, oracle, window)
    if scalar:
        coverage += f"; {_around(window)} also {batches.slice_on(target.device)} at a time"
    paths = [findings.Path(tally, floor), *scalar]
    run = Run(tally.inputs + at_jumps, expected, coverage, "exhausted" if whole else "sampled")
    found = findings.of_paths(target, FLOAT32, oracle, paths, run)
    if whole and not keep:
        store.clear()
    return found


def _scalar_path(target: Target, oracle: Oracle, window: Tensor) -> list[findings.Path]:
    """The inputs around the ends of pieces through the scalar tail, which may round y otherwise."""
    if not window.numel() or target.role == "native":
        return []
    return [_path(target, FLOAT32, measure(target, FLOAT32, oracle, window, _in_slices(target)), True)]


def _in_slices(target: Target) -> Callable[[Layer, Tensor], tuple[Tensor, Tensor]]:
    return partial(batches.in_slices, length=batches.slice_on(target.device))


def _around(window: Tensor) -> str:
    return f"the {window.numel():,} around turning points"


def _count(run: Run) -> Check:
    return Check("count", float(run.inputs), float(run.expected), run.inputs == run.expected)


def _command(target: Target, fmt: Format, found: Findings) -> str:
    """The command that reproduces the worst input, or the run where there is none."""
    command = f"python -m verify gradient {target.options or target.name} --dtype {fmt.name}"
    return command + (f" --input {found.worst_input.bits}" if found.worst_input else "")
