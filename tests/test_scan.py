from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from invref import cache, formats, formulas
from verify import batches, compiled, sampling, scan, targets
from verify.measure import arrays_of, frame_of, measure, tables_of
from verify.oracle import FLOAT32, TAIL, TOLERANCE
from verify.scan import BLOCK, NOWHERE, Tally
from verify.sweep import oracle_of

TARGET = targets.torch_itself("silu")
ORACLE = oracle_of(formulas.get("silu"))


def inputs(samples=2000, span=64):
    ordinals = sampling.ordinals(FLOAT32, ORACLE, samples, span)
    return FLOAT32.from_ordinals(torch.from_numpy(ordinals[: ordinals.size // 64 * 64]))


def tallied(change=None):
    """The tally of torch's SiLU on some inputs, after `change` was applied to the five arrays."""
    arrays = [array.copy() for array in arrays_of(TARGET, inputs(), batches.together)]
    if change:
        change(*arrays)
    tally = Tally()
    cuts = np.searchsorted(FLOAT32.ordinals(torch.from_numpy(arrays[0])).numpy(), ORACLE.ranges[1].first)
    for part, where in zip(ORACLE.ranges, (slice(0, cuts), slice(cuts, None)), strict=True):
        chosen = tuple(array[where] for array in arrays)
        scan.tally_up(chosen, *tables_of(ORACLE, part, FLOAT32, TARGET), frame_of(ORACLE, part, FLOAT32), tally)
    return tally


def naive():
    """What the kernel tallies, written out with numpy: the worst of every kind."""
    x, y, dx, _, native_dx = arrays_of(TARGET, inputs(), batches.together)
    dx, native_dx = dx.astype(float), native_dx.astype(float)
    slopes = ORACLE.derivative(x)
    ordinals = FLOAT32.ordinals(torch.from_numpy(x)).numpy()
    codes = FLOAT32.ordinals(torch.from_numpy(y)).numpy()
    right = ordinals >= ORACLE.ranges[1].first
    decoded = np.where(right, ORACLE.from_output(y, 1), ORACLE.from_output(y, 0))
    counted = codes >= ORACLE.ranges[0].low
    error = np.abs(dx - slopes)
    tail = (x < ORACLE.tails[0]) | (x > ORACLE.tails[1])
    zero, one = tail & (np.abs(slopes) < TAIL), tail & (np.abs(1 - slopes) < TAIL)
    worst = {
        scan.GRADIENT: error,
        scan.NATIVE: np.abs(native_dx - slopes),
        scan.DECODER: np.abs(dx - decoded)[counted],
        scan.BEYOND_STORED: (error - np.abs(decoded - slopes))[counted],
        scan.ZERO_TAIL: np.abs(dx)[zero],
        scan.WRONG_SIGN: np.where(right, -dx, dx)[zero],
        scan.ONE_TAIL: error[one],
    }
    return {slot: max(values.max(), 0.0) for slot, values in worst.items()}


def test_the_kernel_tallies_what_numpy_does():
    tally, expected = tallied(), naive()
    assert {slot: tally.worst[slot] for slot in expected} == pytest.approx(expected, abs=4 * TOLERANCE)
    assert tally.inputs == inputs().numel()
    assert not tally.counts.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1234, -1])
def test_a_gradient_that_is_not_finite_is_counted_and_is_the_worst(value, at):
    def change(x, y, dx, native_y, native_dx):
        dx[at] = value

    tally = tallied(change)
    ordinal = int(FLOAT32.ordinals(inputs())[at])
    assert tally.counts[scan.NONFINITE] == 1
    assert tally.counts_at[scan.NONFINITE] == tally.worst_at[scan.GRADIENT] == ordinal
    assert not tally.worst[scan.GRADIENT] < np.inf


def test_gradients_of_the_framework_that_are_not_finite_are_counted_but_are_no_native_error():
    def change(x, y, dx, native_y, native_dx):
        native_dx[[5, 500]] = np.nan, np.inf

    tally = tallied(change)
    assert tally.counts[scan.NATIVE_NONFINITE] == 2
    assert tally.counts_at[scan.NATIVE_NONFINITE] == int(FLOAT32.ordinals(inputs())[5])
    assert tally.worst[scan.NATIVE] < 1e-5


def test_an_output_with_another_bit_is_counted():
    def change(x, y, dx, native_y, native_dx):
        y.view(np.int32)[77] ^= 1

    tally = tallied(change)
    assert tally.counts[scan.FORWARD] == 1
    assert tally.counts_at[scan.FORWARD] == int(FLOAT32.ordinals(inputs())[77])


def test_of_two_tallies_the_worse_counts_and_nan_is_worst():
    total, small, bad = Tally(), Tally(), Tally()
    small.worst[0], small.worst_at[0] = 1.0, 7
    bad.worst[0], bad.worst_at[0], bad.counts[1], bad.counts_at[1] = np.nan, 9, 2, 9
    for tally in (small, bad, small):
        total.add(tally)
    assert np.isnan(total.worst[0])
    assert total.worst_at[0] == total.counts_at[1] == 9
    assert total.counts[1] == 2
    assert total.worst_at[1] == NOWHERE


def test_half_an_ulp_of_the_rounded_gradient_is_allowed_in_sixteen_bits():
    def rounded(x):
        # The exact derivative, rounded once: half an ulp off at most.
        class Exact(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return torch.nn.functional.silu(x)

            @staticmethod
            def backward(ctx, dy):
                (x,) = ctx.saved_tensors
                return torch.from_numpy(ORACLE.derivative(x.float().numpy())).to(x.dtype)

        return Exact.apply(x)

    fmt = formats.get("bfloat16")
    x = fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    target = replace(TARGET, layer=rounded)
    tally = measure(target, fmt, ORACLE, x, batches.together).tally
    assert tally.worst[scan.BEYOND_ROUNDING] <= TOLERANCE
    assert tally.worst[scan.GRADIENT] > 2.0**-10


def test_hulls_enclose_outputs_and_slopes_of_each_block():
    part = ORACLE.ranges[1]
    x = FLOAT32.tensor(part.first, 3 * BLOCK)
    arrays = arrays_of(TARGET, x, batches.together)
    y, slope = np.empty((3, 2), np.int32), np.empty((3, 2))
    tables = tables_of(ORACLE, part, FLOAT32, TARGET)
    scan.tally_up(arrays, *tables, frame_of(ORACLE, part, FLOAT32), Tally(), y, slope)
    codes = FLOAT32.ordinals(torch.from_numpy(arrays[1])).numpy().reshape(3, BLOCK)
    slopes = ORACLE.derivative(arrays[0]).reshape(3, BLOCK)
    assert (y == np.stack([codes.min(axis=1), codes.max(axis=1)], axis=1)).all()
    assert (slope == np.stack([slopes.min(axis=1), slopes.max(axis=1)], axis=1)).all()


def test_where_numba_finds_no_place_for_its_cache_it_compiles_all_the_same():
    # A function that stands in no file has no place for a cache, like one in a read-only installation.
    namespace = {}
    exec("def double(x):\n    return x + x\n", namespace)
    assert compiled.compiled()(namespace["double"])(21) == 42


def test_cached_machine_code_belongs_to_all_the_sources_it_is_made_from():
    assert scan.scan._cache._cache_file._source_stamp[1] == cache.hash_of("verify", compiled.SOURCES)
    users = [path for path in Path(compiled.__file__).parent.glob("*.py") if "@compiled(" in path.read_text()]
    assert {"compiled.py", *(path.name for path in users)} <= set(compiled.SOURCES)
