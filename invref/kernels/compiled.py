"""Numba's compiler with a cache on disk where there is a place for one, and without elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `numba.njit` without the interpreter lock, cached on disk if a folder for that can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            # Numba's word for a read-only installation whose user has no cache folder, as in many containers.
            return numba.njit(nogil=True, **options)(function)

    return decorate
