"""The catalogue of layers: one row per activation, which the verifier and the reports read.

Guarantees that every layer of `invref.functional` has its row, with the formula it computes, the framework's own layer
beside it, and what it stores. Rows are made when they are asked for. Must not know how a layer is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as own

from invref import functional, layers, native
from invref.errors import needing
from invref.kernels import closed, sidebits, xielu
from invref.kernels.scheme import Scheme

if TYPE_CHECKING:
    from invref.formulas import Formula

Layer = Callable[[Tensor], Tensor]
SchemeOf = Callable[[torch.dtype], Scheme]

NO_GAIN = "torch keeps the output already: no gain, no harm"


@dataclass(frozen=True)
class _Own:
    """The framework keeps the output itself, and its gradient is used."""

    bits: int = field(default=0, init=False)
    keeps_output: bool = field(default=True, init=False)
    kind: str = field(default="torch's own", init=False)

    def pack(self, x: Tensor) -> None:
        """No side bits."""

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """Never asked: torch's own node has the gradient."""
        raise NotImplementedError("torch's own layer computes this gradient")


@dataclass(frozen=True, eq=False)
class Row:
    """A layer with its default arguments.

    native: the framework's own, bit-identical in its forward; call: how `layer` is called in `invref.functional`, the
    input left out; module: its class in `invref.nn`; origin: whose name and arguments it has; gain: what there is to
    say where nothing is gained; arguments: the numbers in its key, see `key`.
    """

    name: str
    layer: Layer
    native: Layer
    call: str
    module: str
    scheme: SchemeOf
    origin: Literal["torch", "transformers"] = "torch"
    gain: str = ""
    arguments: tuple[float, ...] = ()

    @property
    def key(self) -> str | None:
        """Its key in `invref.layers`; None where torch keeps the output itself and where parameters are learnt."""
        return None if self.gain or self.name in ("prelu", "xielu") else layers.key_of(self.name, self.arguments)

    @property
    def formula(self) -> Formula:
        """f, with these arguments."""
        # Loads the exact engines, which calling a layer does without.
        with needing("the formula of a layer"):
            from invref import formulas

        return formulas.get(self.name)

    @cached_property
    def codes(self) -> tuple[int, ...]:
        """The side code of each piece of the formula, from the left: what the layer itself stores inside it."""
        from invref import pieces

        inside = [_between(float(piece.left), float(piece.right)) for piece in pieces.pieces(self.formula)]
        scheme = self.scheme(torch.float64)
        packed = scheme.pack(torch.tensor(inside, dtype=torch.float64))
        if packed is None:
            return (0,) * len(inside)
        return tuple(sidebits.unpack(packed, len(inside), scheme.bits).tolist())


def _between(left: float, right: float) -> float:
    if math.isinf(left):
        return right - 1 if math.isfinite(right) else 0.0
    return left + 1 if math.isinf(right) else (left + right) / 2


def _alphas(x: Tensor) -> tuple[Tensor, ...]:
    """xIELU's first parameters, without axes so that they leave the dtype of x alone: slopes of 0.8 on both sides."""
    raw = (math.log(math.expm1(0.8)), math.log(math.expm1(0.3)), 0.5, -1e-6)
    dtype = torch.float64 if x.dim() else x.dtype
    return tuple(torch.tensor(value, dtype=dtype, device=x.device) for value in raw)


def _quarter(x: Tensor) -> Tensor:
    return torch.tensor([0.25], dtype=x.dtype, device=x.device)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _xielu_scheme(dtype: torch.dtype) -> Scheme:
    return xielu.form(xielu.Parameters(0.8, 0.8, 0.5, -1e-6)).scheme(dtype)


def _scheme(name: str, arguments: tuple[float, ...]) -> SchemeOf:
    return lambda dtype: layers.get(layers.key_of(name, arguments)).scheme(dtype, torch.device("cpu"))


def _torch(name: str, module: str, *arguments: float) -> Row:
    scheme = _scheme(name, arguments)
    return Row(name, getattr(functional, name), getattr(own, name), name, module, scheme, arguments=arguments)


def _transformers(name: str, module: str, *arguments: float) -> Row:
    layer, composed = getattr(functional, name), getattr(native, name)
    return Row(name, layer, composed, name, module, _scheme(name, arguments), "transformers", arguments=arguments)


def _kept(name: str, module: str) -> Row:
    return Row(name, getattr(functional, name), getattr(torch, name), name, module, lambda _: _Own(), gain=NO_GAIN)


_ROWS: dict[str, Callable[[str], Row]] = {
    "relu": lambda n: _kept(n, "ReLU"),
    "leaky_relu": lambda n: _torch(n, "LeakyReLU", 0.01),
    "elu": lambda n: _torch(n, "ELU", 1.0),
    "celu": lambda n: _torch(n, "CELU", 1.0),
    "selu": lambda n: _torch(n, "SELU"),
    "gelu": lambda n: _torch(n, "GELU"),
    "gelu_tanh": lambda n: Row(
        n,
        _gelu_tanh,
        native.gelu_tanh,
        'gelu(approximate="tanh")',
        'GELU(approximate="tanh")',
        _scheme(n, ()),
    ),
    "silu": lambda n: _torch(n, "SiLU"),
    "mish": lambda n: _torch(n, "Mish"),
    "softplus": lambda n: _torch(n, "Softplus", 1.0, 20.0),
    "softsign": lambda n: _torch(n, "Softsign"),
    "tanh": lambda n: _kept(n, "Tanh"),
    "sigmoid": lambda n: _kept(n, "Sigmoid"),
    "logsigmoid": lambda n: _torch(n, "LogSigmoid"),
    "hardtanh": lambda n: _torch(n, "Hardtanh", -1.0, 1.0),
    "relu6": lambda n: _torch(n, "ReLU6"),
    "hardsigmoid": lambda n: _torch(n, "Hardsigmoid"),
    "hardswish": lambda n: _torch(n, "Hardswish"),
    "tanhshrink": lambda n: _torch(n, "Tanhshrink"),
    "softshrink": lambda n: _torch(n, "Softshrink", 0.5),
    "hardshrink": lambda n: _torch(n, "Hardshrink", 0.5),
    "threshold": lambda n: Row(
        n,
        partial(functional.threshold, threshold=1.0, value=0.0),
        partial(own.threshold, threshold=1.0, value=0.0),
        "threshold(threshold=1, value=0)",
        "Threshold(1, 0)",
        _scheme(n, (1.0, 0.0)),
        arguments=(1.0, 0.0),
    ),
    "prelu": lambda n: Row(
        n,
        lambda x: functional.prelu(x, _quarter(x)),
        lambda x: own.prelu(x, _quarter(x)),
        "prelu(weight=0.25)",
        "PReLU",
        lambda _: closed.leaky_relu(0.25),
    ),
    "quick_gelu": lambda n: _transformers(n, "QuickGELUActivation"),
    "relu2": lambda n: _transformers(n, "ReLUSquaredActivation"),
    "laplace": lambda n: _transformers(n, "LaplaceActivation", 0.707107, 0.282095),
    "sqrtsoftplus": lambda n: _transformers(n, "SqrtSoftplusActivation"),
    "xielu": lambda n: Row(
        n,
        lambda x: functional.xielu(x, *_alphas(x)),
        lambda x: native.xielu(x, *_alphas(x)),
        n,
        "XIELUActivation",
        _xielu_scheme,
        "transformers",
    ),
    "gelu_10": lambda n: _transformers(n, "ClippedGELUActivation(-10, 10)", -10.0, 10.0),
    "gelu_fast": lambda n: _transformers(n, "FastGELUActivation"),
    "gelu_new": lambda n: _transformers(n, "NewGELUActivation"),
}


class _Rows(Mapping[str, Row]):
    """Rows by name, each made once, when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Row] = {}

    def __getitem__(self, name: str) -> Row:
        if name not in self._made:
            self._made[name] = _ROWS[name](name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_ROWS)

    def __len__(self) -> int:
        return len(_ROWS)


ROWS: Mapping[str, Row] = _Rows()
