"""Runs of a CPU kernel over blocks of elements, on as many threads as torch uses.

They are the very threads of torch, those of its OpenMP, which are awake after torch's own operations and would be in
the way of others; without OpenMP, and in a forked child, where it does not work, threads of this module that wait for
work. Guarantees that an error of any run is the caller's, that what a run works on lives until it ends, that a forked
child has threads of its own, and that without any, as when the interpreter shuts down, the work is done all the same.
Must not know what kernels do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from torch import Tensor, get_num_threads

from invref.kernels.blocks import laid_out
from invref.kernels.calls import caller, openmp
from invref.kernels.machine import Code
from invref.kernels.sidebits import BLOCK

SERIAL = 1 << 15
"""Arrays up to this length run in the calling thread, as torch has it, too."""
Held = tuple[object, ...]
"""What arguments have the addresses of, so that it lives as long as any thread is at work."""
Job = tuple[Callable[[], None], threading.Lock, list[BaseException]]
"""What to run, a lock to release afterwards, and where errors go."""

_jobs: SimpleQueue[Job] = SimpleQueue()
_crew: list[threading.Thread] = []
_forked = False


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
    global _jobs, _forked
    _jobs, _forked = SimpleQueue(), True
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


def run(code: Code, x: Tensor, n: int, held: Held, *own: int) -> None:
    """Runs machine code over the n >= 1 elements of x, with its arguments from `blocks.FIRST_OWN` on.

    held: what those have the addresses of, beside x.
    """
    layout, axes = ((n, n, 1, 0, 0, 0), None) if x.is_contiguous() else laid_out(x, n)
    if n <= SERIAL or (threads := get_num_threads()) == 1:
        caller()(code, 0, 1, *layout, *own)
    elif not _forked and openmp():
        caller()(code, min(threads, -(-n // BLOCK)), 0, *layout, *own)
    else:
        threads = min(threads, -(-n // BLOCK))
        kept = (x, held, axes)
        _hand_out([partial(_one_of, code, i, threads, (*layout, *own), kept) for i in range(threads)])


def _one_of(code: Code, own: int, count: int, arguments: tuple[int, ...], held: Held) -> None:
    caller()(code, own, count, *arguments)
