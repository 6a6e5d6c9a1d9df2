"""invref: activation layers that run backward from their output, and the proof of how exact their gradient is."""

import importlib
from typing import Any

from invref import functional as functional
from invref.errors import needing
from invref.nn import CELU as CELU
from invref.nn import ELU as ELU
from invref.nn import GELU as GELU
from invref.nn import SELU as SELU
from invref.nn import ClippedGELUActivation as ClippedGELUActivation
from invref.nn import FastGELUActivation as FastGELUActivation
from invref.nn import Hardshrink as Hardshrink
from invref.nn import Hardsigmoid as Hardsigmoid
from invref.nn import Hardswish as Hardswish
from invref.nn import Hardtanh as Hardtanh
from invref.nn import LaplaceActivation as LaplaceActivation
from invref.nn import LeakyReLU as LeakyReLU
from invref.nn import LogSigmoid as LogSigmoid
from invref.nn import Mish as Mish
from invref.nn import NewGELUActivation as NewGELUActivation
from invref.nn import PReLU as PReLU
from invref.nn import QuickGELUActivation as QuickGELUActivation
from invref.nn import ReLU as ReLU
from invref.nn import ReLU6 as ReLU6
from invref.nn import ReLUSquaredActivation as ReLUSquaredActivation
from invref.nn import Sigmoid as Sigmoid
from invref.nn import SiLU as SiLU
from invref.nn import Softplus as Softplus
from invref.nn import Softshrink as Softshrink
from invref.nn import Softsign as Softsign
from invref.nn import SqrtSoftplusActivation as SqrtSoftplusActivation
from invref.nn import Tanh as Tanh
from invref.nn import Tanhshrink as Tanhshrink
from invref.nn import Threshold as Threshold
from invref.nn import XIELUActivation as XIELUActivation

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "ClippedGELUActivation",
    "Conversion",
    "FastGELUActivation",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LaplaceActivation",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "NewGELUActivation",
    "PReLU",
    "Plan",
    "QuickGELUActivation",
    "ReLU",
    "ReLU6",
    "ReLUSquaredActivation",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "SqrtSoftplusActivation",
    "Tanh",
    "Tanhshrink",
    "Threshold",
    "XIELUActivation",
    "convert",
    "enclosure",
    "from_formula",
    "functional",
    "inverted",
    "plan",
    "reference",
]

_LATE = {
    "Conversion": "conversion", "Plan": "planning", "convert": "conversion", "from_formula": "custom",
    "inverted": "mode", "plan": "planning",
}  # fmt: skip
"""Names that few programs use, and where they are."""


def __getattr__(name: str) -> Any:
    # The exact engines load sympy, mpmath and flint: only when they are asked for.
    if name in ("enclosure", "reference"):
        with needing(f"invref.{name}"):
            return importlib.import_module(f"invref.{name}")
    if name in _LATE:
        with needing(f"invref.{name}"):
            return getattr(importlib.import_module(f"invref.{_LATE[name]}"), name)
    raise AttributeError(f"module 'invref' has no attribute {name!r}")
