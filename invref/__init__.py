"""invref: activation layers that run backward from their output, and the proof of how exact their gradient is."""

from invref import functional as functional
from invref.nn import GELU as GELU
from invref.nn import SiLU as SiLU

__all__ = ["GELU", "SiLU", "functional"]
