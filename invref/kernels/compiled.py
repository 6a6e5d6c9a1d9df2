"""Numba's compiler with a cache on disk where there is a place for one, and without elsewhere.

Guarantees that machine code from other sources than these is never run: Numba looks at the file of a compiled function
alone, which takes its meaning from others too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import numba

SOURCES = ("kernels", "decoders.py", "bins.py")
"""What compiled code is made from: files of the package, and all those of a folder."""


@cache
def sources() -> str:
    """A hash of the files that compiled code depends on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        place = resources.files("invref") / name
        files = sorted(place.iterdir(), key=lambda f: f.name) if place.is_dir() else [place]
        for file in files:
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `numba.njit` without the interpreter lock, cached on disk if a folder for that can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            made = numba.njit(nogil=True, cache=True, **options)(function)
            file = made._cache._cache_file
            file._source_stamp = (file._source_stamp, sources())
        except (RuntimeError, AttributeError):
            # RuntimeError is Numba's word for a read-only installation whose user has no cache folder, as in many
            # containers; where its cache looks otherwise than known, there is none.
            return numba.njit(nogil=True, **options)(function)
        return made

    return decorate
