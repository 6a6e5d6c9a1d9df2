"""float32: every finite input, shard by shard on all cores, then the error floor over all of them.

Guarantees that every input of the shards asked for is run once through the vector body, and those around each turning
point through the scalar tail as well. Must not know bounds or verdicts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from verify import batches, floor
from verify.compiled import compiled
from verify.measure import WINDOW, arrays_of, frame_of, measures_forward, side_of, tables_of
from verify.oracle import FLOAT32, Oracle
from verify.scan import BLOCK, Tally, tally_up
from verify.shards import Result, Shard, Store
from verify.targets import Target

CHUNK = 1 << 18
"""Inputs at a time: small enough for the cache, large enough that a call's overhead does not count."""

NEAR_BREAK = 1 << 12
"""Inputs on each side of a break or flat point that also run through the scalar tail: few share an output there."""


def inputs_at(ordinals: NDArray[np.int64]) -> Tensor:
    """The float32 values with these ordinals; the largest value for those beyond."""
    clipped = ordinals.clip(max=FLOAT32.largest_ordinal).astype(np.int32)
    return torch.from_numpy(clipped ^ ((clipped >> 31) & 0x7FFFFFFF)).view(torch.float32)


@compiled()
def _consecutive(first: int, count: int, last: int) -> NDArray[np.int32]:
    """Bit patterns of `count` float32 from ordinal `first` on, the last one repeated beyond ordinal `last`."""
    patterns = np.empty(count, np.int32)
    for i in range(count):
        ordinal = min(first + i, last)
        patterns[i] = ordinal ^ ((ordinal >> 63) & 0x7FFFFFFF)
    return patterns


def run_shard(target: Target, oracle: Oracle, shard: Shard, step: Callable[[int], None]) -> Result:
    """Run and tally one shard; `step` is told the number of inputs done since it was last called."""
    count = -(-(shard.stop - shard.first) // BLOCK)
    result = Result(Tally(), np.empty((count, 2), np.int32), np.empty((count, 2), np.float64))
    frame = frame_of(oracle, shard.part, FLOAT32, target)
    tables = tables_of(oracle, shard.part, FLOAT32, target)
    for first in range(shard.first, shard.stop, CHUNK):
        size = min(CHUNK, shard.stop - first)
        blocks = slice((first - shard.first) // BLOCK, (first - shard.first + size - 1) // BLOCK + 1)
        # A whole number of vectors runs, so that nothing falls to the scalar tail; only `size` inputs count.
        patterns = _consecutive(first, -(-size // BLOCK) * BLOCK, FLOAT32.largest_ordinal)
        arrays = arrays_of(target, torch.from_numpy(patterns).view(torch.float32), batches.together)
        inputs = tuple(array[:size] for array in arrays)
        tally_up(inputs, *tables, frame, result.tally, result.hull_y[blocks], result.hull_slope[blocks])
        step(size)
    return result


def run_shards(
    target: Target, oracle: Oracle, chosen: list[Shard], store: Store, threads: int, step: Callable[[int], None]
) -> dict[int, Result]:
    """The results of the chosen shards by index, from the store where they are there."""
    lock = threading.Lock()

    def locked_step(inputs: int) -> None:
        with lock:
            step(inputs)

    def work(shard: Shard) -> Result:
        torch.set_num_threads(1)
        result = run_shard(target, oracle, shard, locked_step)
        store.save(shard, result)
        return result

    results: dict[int, Result] = {}
    # Built before the threads start: both would build them otherwise.
    _ = oracle.slopes, oracle.tails, oracle.relative, measures_forward(target) and oracle.values
    _ = target.role == "native" or oracle.outputs
    pool = ThreadPoolExecutor(threads)
    try:
        futures = {}
        for shard in chosen:
            found = store.load(shard)
            if found:
                results[shard.index] = found
                locked_step(found.tally.inputs)
            else:
                futures[pool.submit(work, shard)] = shard
        for future in as_completed(futures):
            results[futures[future].index] = future.result()
    finally:
        # An error or an interruption ends the run once the shards under way are done and stored.
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def whole_floor(target: Target, oracle: Oracle, plan: list[Shard], results: dict[int, Result]) -> float:
    """The error floor's maximum over all inputs of all shards, by branch and bound, one side code after the other."""
    sides: dict[int, list[Shard]] = {}
    for shard in plan:
        sides.setdefault(side_of(target, shard.part.piece.index), []).append(shard)
    return float(np.max([side_floor(target, oracle, shards, results) for shards in sides.values()]))


def side_floor(target: Target, oracle: Oracle, plan: list[Shard], results: dict[int, Result]) -> float:
    """The error floor's maximum over the inputs of some shards, all of pieces with one side code, from the left."""
    hulls = floor.Hulls(
        np.concatenate([np.arange(s.first, s.stop, BLOCK, dtype=np.int64) for s in plan]),
        np.concatenate([results[s.index].hull_y for s in plan]),
        np.concatenate([results[s.index].hull_slope for s in plan]),
    )
    firsts, stops = np.array([shard.first for shard in plan]), np.array([shard.stop for shard in plan])

    def inputs(first: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        ordinals = first[:, None] + np.arange(BLOCK)
        real = ordinals < stops[np.searchsorted(firsts, first, side="right") - 1, None]
        x = inputs_at(ordinals.ravel())
        y, _ = batches.together(target.layer, x)
        slopes = oracle.derivative(x.numpy())
        if oracle.relative:
            slopes[np.isinf(y.numpy())] = 0.0
        return FLOAT32.ordinals(y).numpy()[real.ravel()], slopes[real.ravel()]

    return floor.search(hulls, inputs, oracle.relative)


def around_turning_points(oracle: Oracle) -> Tensor:
    """`WINDOW` inputs on each side of every end of a piece, without those at jumps."""
    spans = [(part.first, WINDOW if part.piece.left_end == "turning" else NEAR_BREAK) for part in oracle.ranges[1:]]
    windows = [np.arange(first - span, first + span) for first, span in spans]
    if not windows:
        return torch.empty(0)
    ordinals = np.unique(np.concatenate(windows))
    return inputs_at(without_jumps(oracle, ordinals))


def without_jumps(oracle: Oracle, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the float32 `ordinals` that lie in a range."""
    kept = np.zeros(ordinals.size, bool)
    for part in oracle.ranges:
        kept |= (part.first <= ordinals) & (ordinals < part.stop)
    return ordinals[kept]
