"""Numba's compiler with a cache on disk where there is a place for one, and without elsewhere.

Guarantees that machine code from other sources than these is never run: Numba looks at the file of a compiled function
alone, which takes its meaning from others too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from invref import cache

SOURCES = ("compiled.py", "floor.py", "lookup.py", "oracle.py", "scan.py", "sweep32.py", "window64.py")
"""What compiled code is made from: these modules and the constants that they take from each other."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `numba.njit` without the interpreter lock, cached on disk if a folder for that can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            made = numba.njit(nogil=True, cache=True, **options)(function)
            file = made._cache._cache_file
            file._source_stamp = (file._source_stamp, cache.hash_of("verify", SOURCES))
        except (RuntimeError, AttributeError):
            # RuntimeError is Numba's word for a read-only installation whose user has no cache folder, as in many
            # containers; where its cache looks otherwise than known, there is none.
            return numba.njit(nogil=True, **options)(function)
        return made

    return decorate
