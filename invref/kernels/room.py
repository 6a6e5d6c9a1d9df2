"""Room for results. On Linux large ones lie in large pages, where the system has them and is asked for them.

A large tensor's memory comes fresh from the system, page by page at the first touch, which takes longer than the
kernels that write it. Must not know what is written.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from invref.errors import InputError

LARGE = 1 << 25
"""Bytes from which on memory is always fresh, by the allocator of GNU's C library."""
PAGE = 1 << 21


def room(like: Tensor) -> Tensor:
    """`torch.empty_like` on the CPU; InputError where a mode makes tensors without numbers of it."""
    new = with_numbers(torch.empty_like(like))
    if new.nbytes >= LARGE and (advise := _advise()):
        start = -(-new.data_ptr() // PAGE) * PAGE
        stop = (new.data_ptr() + new.nbytes) // PAGE * PAGE
        # No more than a wish: what it returns does not matter.
        advise(start, stop - start, mmap.MADV_HUGEPAGE)
    return new


def with_numbers(new: Tensor) -> Tensor:
    """A tensor that was made to be written to; InputError where a mode made it one without memory."""
    if type(new) is not Tensor:
        raise InputError(
            f"a tensor with numbers under a mode whose tensors are {type(new).__name__}: convert it to such a one first"
        )
    return new


def nowhere(x: Tensor) -> NoReturn:
    """InputError for a tensor of some elements whose address is 0: wrappers, and torch's zero tensors."""
    raise InputError(f"a kernel takes tensors with memory of their own, which a {x.dtype} {tuple(x.shape)} has not")


@cache
def _advise() -> Any:
    """The system's madvise; None where it knows no large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
