"""The layers by name: what each activation with its arguments computes, keeps and decodes from.

A layer's key, its name followed by its arguments, makes the same layer in any process, so that a compiled or exported
program can carry it. Must not know autograd's rules, nor how users call a layer.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as own

from invref import native
from invref.decoders import load
from invref.decoding import Forward, Layer
from invref.decoding import Second as Decoded
from invref.errors import FormulaError
from invref.kernels import closed, gates, second, slopes
from invref.kernels.closed import Form
from invref.kernels.codes import Slope
from invref.kernels.scheme import CodeOf, Scheme
from invref.kernels.second import Dip, Second

MOST = 256
"""How many layers with different arguments are remembered."""
PROMOTED = {"softplus": ("cuda",), "sqrtsoftplus": ("cuda",), "gelu_new": ("cuda",), "relu2": ("cuda",)}
"""Layers that autocast computes in float32, by kind of device: those whose forward calls softplus or pow.

Source: the list AT_FORALL_FP32 in torch's aten/src/ATen/autocast_mode.h, for CUDA; that of the CPU, in
autocast_mode.cpp, has no activation.
"""
FORMULA = "formula"
"""The first word of keys that `invref.custom` reads."""

SchemeOf = Callable[[torch.dtype], Scheme]
SecondOf = Callable[[torch.dtype], Decoded | None]
Made = tuple[Forward, SchemeOf, SecondOf]


def key_of(name: str, arguments: tuple[float, ...] = ()) -> str:
    """The key of a layer: texts from which floats are read back to the bit, as `repr` gives them."""
    return " ".join([name, *[repr(float(argument)) for argument in arguments]])


def is_formula(key: str) -> bool:
    """Whether a key is that of a formula's layer."""
    return key.split(" ", 1)[0] == FORMULA


def of(key: str) -> tuple[str, tuple[float, ...]]:
    """The name and the arguments of a key; a formula's is a name as it is. FormulaError for arguments not numbers."""
    if is_formula(key):
        return key, ()
    name, *rest = key.split(" ", 1)
    try:
        return name, tuple([float(word) for text in rest for word in text.split()])
    except ValueError:
        raise FormulaError(f"{key[:60]!r} is no layer's key: its arguments must be numbers") from None


@lru_cache(maxsize=MOST)
def get(key: str) -> Layer:
    """The layer of a key; FormulaError for one that there is not, and for arguments that no decoder serves."""
    if is_formula(key):
        made: Layer = importlib.import_module("invref.custom").layer(key)
        return made
    name, arguments = of(key)
    if name not in _MAKERS:
        raise FormulaError(f"there is no layer {name[:60]!r}: use one of {', '.join(_MAKERS)}")
    taken = len(inspect.signature(_MAKERS[name]).parameters)
    if len(arguments) != taken:
        raise FormulaError(f"{key[:60]!r} is no layer's key: {name} takes {taken} arguments")
    forward, scheme, second_of = _MAKERS[name](*arguments)
    # One pair a dtype: schemes are the same on every device.
    schemes, seconds = lru_cache(maxsize=None)(scheme), lru_cache(maxsize=None)(second_of)
    promoted = PROMOTED.get(name, ())
    return Layer(key, forward, lambda dtype, _: schemes(dtype), lambda dtype, _: seconds(dtype), promoted)


def _formed(form: Form) -> Made:
    return form.forward, form.scheme, lambda _: _second(form)


def _second(form: Form) -> Second:
    assert form.bend is not None
    return Second(form.forward, form.curve, form.bend, form.bits, form.code_of, form.breaks, form.slices)


def _straight(forward: Forward, scheme: Scheme | SchemeOf) -> Made:
    """Piecewise linear: the second derivative is 0."""
    return forward, scheme if callable(scheme) else lambda _: scheme, lambda _: None


def _dip(
    name: str, forward: Forward, scheme: SchemeOf, value: Slope, slope: Slope, curve: Slope, top: float | None = None
) -> Made:
    """A gate with one minimum, that of decoder `name`; from an output of `top` on it is constant."""
    decoder = load(name)
    dip = Dip(value, slope, curve, float(decoder.turning_x))

    def decode(y: Tensor, side: Tensor | None) -> Tensor:
        return dip(y, side) if top is None else torch.where(y >= top, 0.0, dip(y, side))

    def clipped(x: Tensor) -> Tensor:
        return curve(x) if top is None else torch.where(x > top, 0.0, curve(x))

    def second_of(dtype: torch.dtype) -> Second:
        if dtype == torch.float64:
            from invref.kernels.newton import side_of
        else:
            from invref.kernels.naive import side_of
        code_of: CodeOf = partial(side_of, decoder)
        return Second(forward, clipped, decode, 1, code_of, () if top is None else (top,))

    return forward, scheme, second_of


def _gate(name: str, value: Callable[..., Tensor], curve: Callable[..., Tensor], scale: float | None = None) -> Made:
    """A gate of `gates`; value, curve: its f and f'' of float64 inputs, with a scale if they take one."""
    if scale is not None:
        value, curve = partial(value, scale=scale), partial(curve, scale=scale)
    forward, slope = gates.FORMS[name]
    return _dip(name, forward, partial(gates.gate, name), value, slope, curve)


def _clipped_gelu(low: float, high: float) -> Made:
    forward = partial(native.gelu_10, min=low, max=high)
    scheme = partial(gates.clipped_gelu, low, high)
    scheme(torch.float32)  # Refuses what no decoder serves before anything is computed.
    return _dip("gelu", forward, scheme, second.gelu_value, slopes.gelu, slopes.gelu_curve, top=high)


def _tanhshrink() -> Made:
    def bend(y: Tensor, _: Tensor | None) -> Tensor:
        slope = gates.tanhshrink(torch.float64).backward(torch.ones_like(y), y, None)
        return 2 * torch.sign(y) * torch.sqrt(slope) * (1 - slope)

    return own.tanhshrink, gates.tanhshrink, lambda _: Second(own.tanhshrink, slopes.tanhshrink_curve, bend)


def _laplace(mu: float, sigma: float) -> Made:
    form = closed.laplace(mu, sigma)
    return form.forward, partial(gates.laplace, mu, sigma), lambda _: _second(form)


def _hardtanh(low: float, high: float) -> Made:
    return _straight(partial(own.hardtanh, min_val=low, max_val=high), partial(closed.hardtanh, low, high))


def _threshold(threshold: float, value: float) -> Made:
    forward = partial(own.threshold, threshold=threshold, value=value)
    return _straight(forward, partial(closed.threshold, threshold, value))


_MAKERS: dict[str, Callable[..., Made]] = {
    "gelu": lambda: _gate("gelu", second.gelu_value, slopes.gelu_curve),
    "gelu_tanh": lambda: _gate("gelu_tanh", second.gelu_tanh_value, slopes.gelu_tanh_curve),
    "silu": lambda: _gate("silu", second.silu_value, slopes.silu_curve),
    "mish": lambda: _gate("mish", second.mish_value, slopes.mish_curve),
    "quick_gelu": lambda: _gate("quick_gelu", second.silu_value, slopes.silu_curve, gates.QUICK_SCALE),
    "gelu_new": lambda: _gate("gelu_new", second.gelu_tanh_value, slopes.gelu_tanh_curve),
    "gelu_fast": lambda: _gate("gelu_fast", second.gelu_tanh_value, slopes.gelu_tanh_curve, gates.TANH_SCALE),
    "gelu_10": _clipped_gelu,
    "hardswish": lambda: _formed(closed.hardswish()),
    "elu": lambda alpha: _formed(closed.elu(alpha)),
    "selu": lambda: _formed(closed.selu()),
    "celu": lambda alpha: _formed(closed.celu(alpha)),
    "softplus": lambda beta, threshold: _formed(closed.softplus(beta, threshold)),
    "sqrtsoftplus": lambda: _formed(closed.sqrtsoftplus()),
    "softsign": lambda: _formed(closed.softsign()),
    "logsigmoid": lambda: _formed(closed.logsigmoid()),
    "tanhshrink": _tanhshrink,
    "laplace": _laplace,
    "relu2": lambda: (native.relu2, closed.relu2, lambda dtype: _second(closed.relu2_form(dtype))),
    "leaky_relu": lambda negative_slope: _straight(
        partial(own.leaky_relu, negative_slope=negative_slope), closed.leaky_relu(negative_slope)
    ),
    "hardtanh": _hardtanh,
    "relu6": lambda: _straight(own.relu6, partial(closed.hardtanh, 0.0, 6.0)),
    "hardsigmoid": lambda: _straight(own.hardsigmoid, closed.hardsigmoid()),
    "hardshrink": lambda lambd: _straight(partial(own.hardshrink, lambd=lambd), closed.hardshrink(lambd)),
    "softshrink": lambda lambd: _straight(partial(own.softshrink, lambd=lambd), closed.softshrink(lambd)),
    "threshold": _threshold,
}
