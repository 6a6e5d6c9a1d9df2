"""invref: activation layers that run backward from their output, and the proof of how exact their gradient is."""

import importlib
from types import ModuleType

from invref import functional as functional
from invref.nn import GELU as GELU
from invref.nn import SiLU as SiLU

__all__ = ["GELU", "SiLU", "enclosure", "functional", "reference"]


def __getattr__(name: str) -> ModuleType:
    # The exact engines load sympy, mpmath and flint: only when they are asked for.
    if name in ("enclosure", "reference"):
        return importlib.import_module(f"invref.{name}")
    raise AttributeError(f"module 'invref' has no attribute {name!r}")
