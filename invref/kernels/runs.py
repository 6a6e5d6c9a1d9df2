"""Runs of a CPU kernel over blocks of elements, on as many threads as torch uses: threads that wait for work.

Guarantees that an error of any run is the caller's, that what a run works on lives until it ends, that a forked child
has threads of its own, and that without any, as when the interpreter shuts down, the work is done all the same. Must
not know what kernels do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from invref.kernels.sidebits import BLOCK

SERIAL, SERIAL_LIGHT = 1 << 15, 1 << 18
"""Arrays up to this length, of quick kernels to the second, run in the calling thread: handing out costs 20 µs."""
Job = tuple[Callable[[], None], threading.Lock, list[BaseException]]
"""What to run, a lock to release afterwards, and where errors go."""

_jobs: SimpleQueue[Job] = SimpleQueue()
_crew: list[threading.Thread] = []


def _work(jobs: SimpleQueue[Job]) -> None:
    while True:
        run, done, errors = jobs.get()
        try:
            run()
        except BaseException as error:  # the caller's to raise
            errors.append(error)
        finally:
            # What it holds must not live until the next job comes.
            del run, errors
            done.release()


def _forget() -> None:
    """A child process has none of its parent's threads."""
    global _jobs
    _jobs = SimpleQueue()
    _crew.clear()


os.register_at_fork(after_in_child=_forget)


def _manned(count: int) -> bool:
    """Whether so many threads wait for work; not once the interpreter shuts down, and starts none any more."""
    try:
        while len(_crew) < count:
            thread = threading.Thread(target=_work, args=(_jobs,), name=f"invref-{len(_crew)}", daemon=True)
            thread.start()
            _crew.append(thread)
    except RuntimeError:
        return False
    return True


def _hand_out(runs: list[Callable[[], None]]) -> None:
    """Runs the first in this thread, the others in threads that wait for work: a fifth of an executor's delay."""
    if not _manned(len(runs) - 1):
        for run in runs:
            run()
        return
    errors: list[BaseException] = []
    locks = []
    for run in runs[1:]:
        locks.append(threading.Lock())
        locks[-1].acquire()
        _jobs.put((run, locks[-1], errors))
    runs[0]()
    for lock in locks:
        lock.acquire()
    if errors:
        raise errors[0]


def in_runs(
    kernel: Callable[..., None], fixed: tuple[Any, ...], n: int, held: tuple[Tensor, ...] = (), serial: int = SERIAL
) -> None:
    """Calls kernel(*fixed, first, stop) for blocks that cover n elements, on as many threads as torch uses.

    held: tensors of which `fixed` has no more than addresses; they live as long as any thread is at work. serial: up to
    how many elements one thread is quicker.
    """
    blocks = -(-n // BLOCK)
    if n <= serial or (threads := min(torch.get_num_threads(), blocks)) == 1:
        kernel(*fixed, 0, blocks)
        return

    def run(first: int, stop: int, _held: tuple[Tensor, ...] = held) -> None:
        kernel(*fixed, first, stop)

    cuts = [blocks * i // threads for i in range(threads + 1)]
    _hand_out([partial(run, a, b) for a, b in pairwise(cuts)])
