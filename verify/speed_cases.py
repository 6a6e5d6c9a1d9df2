"""What is timed of a single layer: forward and backward as in a network, at one size and at a small one.

Guarantees that invref's layer, torch's and a plain copy see the same numbers, that outputs and gradients are freed
within the call that made them, and that nothing is held between visits but times. Must not know how time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from invref.catalogue import Row
from verify import speed_clock, speed_stats
from verify.speed_clock import Run, Times
from verify.speed_record import COPY, OURS, THEIRS, Kind, Timing

SMALL = 64
"""Elements of a small tensor, where only the cost of a call counts."""
VISITED = ("layer", "small")
VISITS = 4
"""In so many parts these are measured, with all others in between: a machine can be slow for seconds on end."""
Visits = Generator[None, None, list[Timing]]
"""Rests after each visit but the last, which returns the lines."""
PASSES = 5
"""Tensors that cross the memory bus in forward and backward: x, y, dy, what was kept, and dx. A copy has two."""


def inputs(n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x, which requires its gradient, and the incoming gradient: (n,) each, normal, the same every time."""
    generator = torch.Generator().manual_seed(n)
    x, dy = (torch.randn(n, generator=generator).to(device, dtype) for _ in range(2))
    return x.requires_grad_(), dy


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Run:
    """One call of a layer and of its backward."""

    def run() -> None:
        torch.autograd.grad(layer(x), x, dy)

    return run


def copy(x: Tensor) -> Run:
    """x read and as much written, once."""
    source, target = x.detach(), torch.empty_like(x.detach())
    return lambda: target.copy_(source)


def layer(row: Row, n: int, dtype: str, device: str, threads: int, seconds: float) -> Visits:
    """invref's layer, torch's, and a copy, in turns."""

    def visit(seconds: float, before: Times | None) -> Times:
        x, dy = inputs(n, getattr(torch, dtype), device)
        runs = {OURS: forward_backward(row.layer, x, dy), THEIRS: forward_backward(row.native, x, dy), COPY: copy(x)}
        return speed_clock.interleaved(runs, speed_clock.clock(device), seconds, before)

    times = yield from _visits(visit, seconds)
    return timings("layer", row.name, dtype, device, threads, n, times, getattr(torch, dtype).itemsize)


def small(row: Row, n: int, dtype: str, device: str, threads: int, seconds: float) -> Visits:
    """invref's layer and torch's on a small tensor, in turns; by the processor's clock on any device."""

    def visit(seconds: float, before: Times | None) -> Times:
        x, dy = inputs(n, getattr(torch, dtype), device)
        runs = {OURS: forward_backward(row.layer, x, dy), THEIRS: forward_backward(row.native, x, dy)}
        return speed_clock.interleaved(runs, speed_clock.HostClock(), seconds, before)

    times = yield from _visits(visit, seconds)
    return timings("small", row.name, dtype, device, threads, n, times, 0)


def _visits(visit: Callable[[float, Times | None], Times], seconds: float) -> Generator[None, None, Times]:
    found = [visit(seconds / VISITS, None)]
    while len(found) < VISITS:
        yield
        found.append(visit(seconds / VISITS, Times.joined(found)))
    return Times.joined(found)


def timings(
    kind: Kind, name: str, dtype: str, device: str, threads: int, n: int, times: Times, size: int
) -> list[Timing]:
    """A line per contestant, compared with torch's and, where that ran, the copy's; `size`: bytes an element, or 0."""
    theirs, copied = times.seconds[THEIRS], times.seconds.get(COPY)
    rows = []
    for contestant, taken in times.seconds.items():
        seconds = speed_stats.spread(taken)
        passes = 2 if contestant == COPY else PASSES
        rate = None if copied is None else passes * size * n / seconds.middle / 1e9
        copy_rate = None if copied is None else 2 * size * n / speed_stats.spread(copied).middle / 1e9
        rows.append(Timing(
            kind, name, dtype, device, threads, n, contestant, times.rounds, times.loops,
            seconds=seconds,
            ratio=speed_stats.ratio(taken, theirs),
            to_copy=None if copied is None else speed_stats.ratio(taken, copied),
            overhead=speed_stats.difference(taken, theirs),
            gigabytes=rate,
            share=None if rate is None or copy_rate is None else rate / copy_rate,
            others=times.others,
        ))  # fmt: skip
    return rows
