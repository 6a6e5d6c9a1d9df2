"""Timing several contestants in turns: one sample of each a round, in orders that are fair to all.

Guarantees that every contestant has run before the first sample (so nothing is compiled inside one), that all have as
many samples, of as many calls each, and that there are at least `LEAST`. A sample lasts `FINEST` at least, so that
reading the clock costs less than a thousandth of it; and memory freed is kept (`settle`). Must not know what is timed.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from verify.speed_stats import Floats

Run = Callable[[], object]
LEAST, MOST = 6, 2000
"""Rounds: six are the fewest whose 20/80 percentiles leave out the fastest and the slowest, and all orders of three."""
FINEST = 2e-4
"""Seconds; two readings of the clock take 1e-7 or so."""
WARM = 3
"""Calls of each contestant before the first sample."""
STAT = Path("/proc/stat")
"""Where Linux says what its cores have done, man 5 proc_stat."""
HEAP = (1 << 25) - (1 << 16)
"""Bytes, next to the most that GNU's C library takes for the size of a heap's tensor: 32 MiB with its own few bytes."""
FLUSH = 1 << 28
"""Bytes written between samples on a GPU: more than any second-level cache holds."""


class Clock(Protocol):
    """Times calls on one device."""

    def __call__(self, run: Run, loops: int) -> float:
        """Seconds that `loops` calls of `run` take."""


class HostClock:
    """The processor's."""

    def __call__(self, run: Run, loops: int) -> float:
        """Seconds that `loops` calls of `run` take."""
        start = time.perf_counter()
        for _ in range(loops):
            run()
        return time.perf_counter() - start


class EventClock:
    """A GPU's own: events on its stream, with the second-level cache emptied before every call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
        self._flush = torch.empty(max(FLUSH, 2 * cache), dtype=torch.uint8, device=device)

    def __call__(self, run: Run, loops: int) -> float:
        """Seconds that `loops` calls of `run` keep the device busy."""
        with torch.cuda.device(self._device):
            pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(loops)]
            for start, stop in pairs:
                # Also gives the processor time to hand out the whole run before the device gets to it.
                self._flush.zero_()
                start.record()
                run()
                stop.record()
            torch.cuda.synchronize(self._device)
            return float(sum(start.elapsed_time(stop) for start, stop in pairs)) / 1e3


def clock(device: str) -> Clock:
    """The clock of a device, "cpu" or a CUDA device."""
    return HostClock() if device == "cpu" else EventClock(torch.device(device))


@dataclass(frozen=True)
class Times:
    """Seconds a call (rounds,) of each contestant, one round beside the other; `loops` calls a sample.

    others: how many cores were busy with something else, on average; None where the system does not say.
    """

    seconds: Mapping[str, Floats]
    loops: int
    others: float | None = None

    @property
    def rounds(self) -> int:
        """How many samples each has."""
        return len(next(iter(self.seconds.values())))

    @classmethod
    def joined(cls, visits: Sequence[Times]) -> Times:
        """What several visits took, of the same contestants with as many calls a sample; the busiest one's others."""
        first, *_ = visits
        seconds = {name: np.concatenate([visit.seconds[name] for visit in visits]) for name in first.seconds}
        others = [visit.others for visit in visits if visit.others is not None]
        return cls(seconds, first.loops, max(others, default=None))


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who comes when in a round: odd ones are the ones before them, turned round.

    In twice as many rounds as there are names everyone has every place equally often, and comes as often after anyone
    else: who runs after a copy finds other things in the caches than who runs after itself.
    Source: E. J. Williams, Australian Journal of Scientific Research A 2 (1949) 149, on residual effects.
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    row = [names[(step + turn // 2) % count] for step in zigzag]
    return row if turn % 2 == 0 else row[::-1]


def settle() -> None:
    """Has the C library keep what is freed for the next call, as in any program that has freed a large tensor before.

    GNU's returns the end of its heap to the system where that is more than twice the largest tensor freed so far. With
    two tensors of the largest size alive, a few bytes decide on that, and every page that is returned faults when it is
    asked for again, which can take longer than what is timed. Source: mallopt(3), M_MMAP_THRESHOLD, M_TRIM_THRESHOLD.
    """
    torch.empty(HEAP, dtype=torch.uint8)


def interleaved(
    runs: Mapping[str, Run],
    clock: Clock,
    seconds: float,
    before: Times | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Times:
    """Rounds until `seconds` are spent, `LEAST` at least and `MOST` at most, after a warm-up that does not count.

    before: an earlier visit, or several, with whose number of calls a sample and order of turns it goes on.
    """
    settle()
    for run in runs.values():
        for _ in range(WARM):
            run()
    if before is None:
        fastest = min(clock(run, 1) for run in runs.values())
        first, loops = 0, max(1, int(np.ceil(FINEST / max(fastest, 1e-9))))
    else:
        first, loops = before.rounds, before.loops
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start, busy = now(), _Busy.read()
    with _uncollected():
        for turn in range(MOST):
            for name in order(list(runs), first + turn):
                samples[name].append(clock(runs[name], loops) / loops)
            if turn + 1 >= LEAST and now() - start >= seconds:
                break
    others = _Busy.read().others(busy)
    return Times({name: np.array(values) for name, values in samples.items()}, loops, others)


@dataclass(frozen=True)
class _Busy:
    """Seconds since the start of the system or the process: of the wall clock, of all cores at work, of our share."""

    wall: float
    cores: float | None
    own: float

    @classmethod
    def read(cls) -> _Busy:
        return cls(time.monotonic(), _cores_at_work(), time.process_time())

    def others(self, before: _Busy) -> float | None:
        """Cores at work for others since `before`."""
        if self.cores is None or before.cores is None:
            return None
        return max(0.0, (self.cores - before.cores - self.own + before.own) / max(self.wall - before.wall, 1e-9))


def _cores_at_work() -> float | None:
    try:
        words = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _wait, irq, soft, steal = map(int, words[1:9])
        return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with `count` threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, whose turns would fall on whoever comes then."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
