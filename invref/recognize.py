"""Which layer of ours computes what a module computes: by its exact type, and then by its numbers.

Guarantees that a module is recognised only where `invref.trial` finds that it computes what our layer computes: one
with a patched forward, a straight-through gradient or another formula under a known name is not. Must not know models,
nor how modules are tried.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invref import functional
from invref import nn as ours
from invref.catalogue import NO_GAIN
from invref.errors import FormulaError
from invref.trial import bits_kept, differs, untried

TRANSFORMERS = "transformers.activations"
"""The module whose activation classes are known, by name: it is not imported for that."""
ALREADY = "inverted already"

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Known:
    """A type that is recognised: the class to take its place, and of a module the catalogue's name of its formula."""

    type: type[nn.Module]
    name: Callable[[Any], str]


@dataclass(frozen=True)
class Recognised:
    """What came of looking at one module: the class to take its place, or why there is none.

    formula: its name in the catalogue, with its arguments; bits: stored per element beside the output, None unknown.
    """

    type: type[nn.Module] | None
    formula: str
    bits: int | None
    why: str = ""


def _called(name: str) -> Callable[[Any], str]:
    return lambda _: name


def _gelu(module: Any) -> str:
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


_TORCH: dict[type[nn.Module], Known] = {
    nn.GELU: Known(ours.GELU, _gelu),
    **{
        own: Known(made, _called(name))
        for own, made, name in (
            (nn.SiLU, ours.SiLU, "silu"),
            (nn.Mish, ours.Mish, "mish"),
            (nn.Hardswish, ours.Hardswish, "hardswish"),
            (nn.ELU, ours.ELU, "elu"),
            (nn.SELU, ours.SELU, "selu"),
            (nn.CELU, ours.CELU, "celu"),
            (nn.Softplus, ours.Softplus, "softplus"),
            (nn.Softsign, ours.Softsign, "softsign"),
            (nn.LogSigmoid, ours.LogSigmoid, "logsigmoid"),
            (nn.Tanhshrink, ours.Tanhshrink, "tanhshrink"),
            (nn.LeakyReLU, ours.LeakyReLU, "leaky_relu"),
            (nn.Hardtanh, ours.Hardtanh, "hardtanh"),
            (nn.ReLU6, ours.ReLU6, "relu6"),
            (nn.Hardsigmoid, ours.Hardsigmoid, "hardsigmoid"),
            (nn.Hardshrink, ours.Hardshrink, "hardshrink"),
            (nn.Softshrink, ours.Softshrink, "softshrink"),
            (nn.Threshold, ours.Threshold, "threshold"),
            (nn.PReLU, ours.PReLU, "prelu"),
        )
    },
}
_KEPT = (nn.ReLU, nn.Tanh, nn.Sigmoid)

_CALLS: dict[str, tuple[str, Call]] = {
    "GELUActivation": ("gelu", lambda m, x: functional.gelu(x)),
    "GELUTanh": ("gelu_tanh", lambda m, x: functional.gelu(x, approximate="tanh")),
    "PytorchGELUTanh": ("gelu_tanh", lambda m, x: functional.gelu(x, approximate="tanh")),
    "NewGELUActivation": ("gelu_new", lambda m, x: functional.gelu_new(x)),
    "AccurateGELUActivation": ("gelu_new", lambda m, x: functional.gelu_new(x)),
    "FastGELUActivation": ("gelu_fast", lambda m, x: functional.gelu_fast(x)),
    "QuickGELUActivation": ("quick_gelu", lambda m, x: functional.quick_gelu(x)),
    "SiLUActivation": ("silu", lambda m, x: functional.silu(x)),
    "MishActivation": ("mish", lambda m, x: functional.mish(x)),
    "ClippedGELUActivation": ("gelu_10", lambda m, x: functional.gelu_10(x, m.min, m.max)),
    "LaplaceActivation": ("laplace", lambda m, x, *args, **named: functional.laplace(x, *args, **named)),
    "ReLUSquaredActivation": ("relu2", lambda m, x: functional.relu2(x)),
    "SqrtSoftplusActivation": ("sqrtsoftplus", lambda m, x: functional.sqrtsoftplus(x)),
    "XIELUActivation": (
        "xielu",
        lambda m, x: functional.xielu(x, m.alpha_p, m.alpha_n, m.beta, m.eps),
    ),
}
"""transformers' classes: the catalogue's name of what each computes, and the call in its place."""

_made: dict[type[nn.Module], type[nn.Module]] = {}
_mixed: dict[type[nn.Module], type[nn.Module]] = {}


def __getattr__(name: str) -> Any:
    """The class that takes the place of transformers' of the same name: pickles of converted models ask for it."""
    if name in _CALLS:
        return _inverted(getattr(importlib.import_module(TRANSFORMERS), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _inverted(own: type[nn.Module]) -> type[nn.Module]:
    """A subclass of one of transformers' classes, of the same name, that calls our layer."""
    if own not in _made:
        call = _CALLS[own.__name__][1]

        def forward(self: Any, *args: Any, **named: Any) -> Tensor:
            x, *rest = args or (named.pop("x" if "x" in named else "input"),)
            return call(self, x, *rest, **named)

        content = {"forward": forward, "__module__": __name__, "__doc__": f"{own.__doc__}\n\nRun backward by invref."}
        _made[own] = type(own.__name__, (own,), content)
    return _made[own]


def known(kind: type) -> Known | None:
    """What is known of a type, its subclasses not included."""
    if kind in _TORCH:
        return _TORCH[kind]
    if kind.__module__ == TRANSFORMERS and getattr(sys.modules.get(TRANSFORMERS), kind.__name__, None) is kind:
        found = _CALLS.get(kind.__name__)
        return None if found is None else Known(_inverted(kind), _called(found[0]))
    return None


def is_ours(module: nn.Module) -> bool:
    """Whether a module runs backward from its output already."""
    return _owner(type(module)).__module__ in (__name__, ours.__name__)


def _owner(kind: type) -> type:
    """The class whose forward instances of `kind` have."""
    return next(c for c in kind.__mro__ if "forward" in vars(c))


def recognised(module: nn.Module, subclasses: bool, dtype: torch.dtype) -> Recognised | None:
    """What takes the place of a module, or why nothing does; None where it is no activation that is known.

    subclasses: whether a subclass of a known type may be taken for it, if it computes the same. dtype: of the model's
    numbers, for the bits stored.
    """
    kind = type(module)
    if kind in _KEPT:
        return Recognised(None, kind.__name__.lower(), 0, NO_GAIN)
    if is_ours(module):
        return _already(module, dtype)
    found = known(kind)
    if found is None:
        base = next((b for b in kind.__mro__[1:] if known(b)), None)
        if base is None:
            return None
        if not subclasses:
            return Recognised(None, "", None, f"a subclass of {base.__name__}: convert(..., subclasses=True) tries it")
        if _owner(kind) is not _owner(base) or kind.__call__ is not base.__call__:
            return Recognised(None, "", None, f"a subclass of {base.__name__} with a forward of its own")
        found = _subclassed(kind)
    name = ""
    try:
        name = found.name(module)
        why = untried(module) or differs(module, found.type, name)
        bits = None if why else bits_kept(module, found.type, dtype)
    except FormulaError as error:
        return Recognised(None, name, None, str(error))
    except Exception as error:  # whatever a module's forward raises: it is not what it is taken for
        text = " ".join(str(error).split())
        return Recognised(None, name, None, f"could not be tried: {type(error).__name__}: {text}")
    if why:
        return Recognised(None, name, None, why)
    return Recognised(found.type, _with_arguments(module, found.type, name), bits)


def _already(module: nn.Module, dtype: torch.dtype) -> Recognised:
    owner = _owner(type(module))
    if owner.__name__ in _CALLS:
        name = _CALLS[owner.__name__][0]
    else:
        name = next(found.name(module) for found in _TORCH.values() if found.type is owner)
    return Recognised(None, _with_arguments(module, owner, name), None, ALREADY)


def _subclassed(kind: type[nn.Module]) -> Known:
    """What takes the place of a subclass of a known type: a class that is both, with our forward."""
    base = next(found for found in map(known, kind.__mro__[1:]) if found)
    if kind not in _mixed:

        def reduced(self: nn.Module, _protocol: Any) -> tuple[Any, ...]:
            return _rebuilt, (kind,), self.__dict__

        content = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduced}
        _mixed[kind] = type(kind.__name__, (base.type, kind), content)
    return Known(_mixed[kind], base.name)


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _subclassed(kind).type
    module: nn.Module = made.__new__(made)
    return module


def _with_arguments(module: nn.Module, kind: type[nn.Module], name: str) -> str:
    words = kind.extra_repr(module).split(", ")
    wanted = [word for word in words if word and "inplace" not in word and "approximate" not in word]
    return f"{name}({', '.join(wanted)})" if wanted else name
