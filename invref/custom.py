"""Any formula as an activation: `from_formula` reads it, proves its pieces, fits and certifies its decoder, keeps it.

What comes back is callable on tensors of every float dtype and has a module. Forward is computed in float64 from the
stably written formula and rounded once; backward decodes the output and the side bits. Results are cached on disk.
This module must not know how decoders are made or how they work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cache as remembered
from importlib import resources
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from invref import binfit, bins, cache, formulas, functional, layers, operators, stable, tracing
from invref.autograd import inverted
from invref.bins import Bins, Edge
from invref.decoding import Layer
from invref.engines import TORCH
from invref.errors import FormulaError, InputError, ProofError, TableError, TwiceError
from invref.formats import BY_DTYPE
from invref.formulas import Formula
from invref.inputs import checked, into_graph, recording
from invref.kernels import binned, binscheme, closed
from invref.kernels.scheme import Scheme
from invref.kernels.second import Second
from invref.order import flat, memory_order
from invref.placements import is_split, locally
from invref.stable import Checked, Patch

CHUNK = 1 << 14
"""Elements of the forward at a time on the CPU: float64 temporaries then stay in the cache."""
LOST = 0.05
"""An error floor above this share of max(1, |f'|) means that the output does not determine the gradient."""
SAMPLED = 1 << 16
WINDOW = 4096
Parameter = float | int | str | Fraction


class Activation:
    """An activation made from a formula: call it on tensors, or take `module()` for a model.

    Keeps its output and `bits` side bits per element for backward, instead of its input. Tensors of any shape, in
    bfloat16, float16, float32 and float64; strides are preserved as torch preserves them. Two equal calls give equal
    bits. Differentiating three times raises TwiceError.
    """

    def __init__(self, formula: Formula, decoder: Bins, value: Checked, slope: Checked) -> None:
        self.formula, self.bins = formula, decoder
        self._value, self._slope = value, slope
        self._schemes: dict[tuple[torch.dtype, torch.device], Scheme] = {}
        self._curve: Checked | None = None
        self._seconds: dict[torch.dtype, Second] = {}
        arguments = [formula.text, formula.name, [[key, str(value)] for key, value in formula.parameters]]
        self.key = f"{layers.FORMULA} {json.dumps(arguments)}"
        self._layer = Layer(self.key, self.forward, self.scheme, self._second)
        _MADE[self.key] = self

    @property
    def name(self) -> str:
        """The formula's name."""
        return self.formula.name

    @property
    def codes(self) -> tuple[int, ...]:
        """The side code of each piece of the formula, from the left."""
        return self.bins.codes

    @property
    def bits(self) -> int:
        """Side bits per element."""
        return self.bins.bits

    def __call__(self, x: Tensor) -> Tensor:
        """f of a tensor; InputError for other types, and where a dtype is too coarse for the formula."""
        if recording(x):
            y: Tensor = handle_torch_function(functional.of_key, (x,), x, self.key)
            return y
        checked(self.name, x)
        if is_split(x):
            return locally(self.name, self, x)
        if into_graph():
            return operators.inverted(x, None, self.key)
        return inverted(x, self.forward, self._layer)

    def forward(self, x: Tensor) -> Tensor:
        """f computed in float64 and rounded once to the dtype of x, without a gradient."""
        with torch.no_grad():
            if x.device.type != "cpu" or x.numel() <= CHUNK:
                return self._value(x.double()).to(x.dtype)
            y = torch.empty_like(x)
            order = memory_order(y)
            for source, target in zip(flat(x, order).split(CHUNK), flat(y, order).split(CHUNK), strict=True):
                target.copy_(self._value(source.double()))
            return y

    def scheme(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Scheme:
        """What is stored for a dtype on a device, and how it is decoded; made at first use, in milliseconds."""
        place = dtype, torch.device(device)
        if place not in self._schemes:
            with closed.plainly(place[1]):
                self._schemes[place] = self._made(*place)
        return self._schemes[place]

    def _made(self, dtype: torch.dtype, device: torch.device) -> Scheme:
        if dtype not in (torch.float32, torch.float64):
            floor, x = _floor(self._value, self._slope, self.bins.edges, dtype)
            if not floor <= LOST:
                name = BY_DTYPE[dtype].name
                raise InputError(
                    f"{self.name[:60]} loses its gradient in {name} near x = {x:.6g}: the stored output leaves an "
                    f"error of {floor:.2g} there; use float32"
                )
        return binscheme.scheme(self.bins, self.forward, self._value, self._slope, dtype, device)

    def _second(self, dtype: torch.dtype, _: torch.device) -> Second:
        """How f'' is decoded; made at first use, in seconds. TwiceError where float64 does not give it."""
        if dtype in self._seconds:
            return self._seconds[dtype]
        if self._curve is None:
            try:
                with _refusing(self.name):
                    self._curve = stable.checked(self.formula, 2)
            except FormulaError as error:
                raise TwiceError(f"{self.name[:60]} has no second derivative here: {error}") from error
        curve, solved = self._curve, binscheme.Solved(self.bins, self._value, self._slope)
        edges = binned.thresholds(self.bins, dtype)
        breaks = tuple(float(edge.at) for edge in self.bins.edges)

        def decode(y: Tensor, side: Tensor | None) -> Tensor:
            return solved.at_input(curve, y, side)

        code_of = binscheme.sides_of(edges)
        self._seconds[dtype] = Second(self.forward, curve, decode, self.bits, code_of, breaks, slices=False)
        return self._seconds[dtype]

    def native(self, x: Tensor) -> Tensor:
        """The same formula by plain autograd in the dtype of x: what a user has without invref."""
        y = self.formula.evaluate(x, TORCH)
        return y if isinstance(y, Tensor) else torch.full_like(x, y)

    def module(self) -> nn.Module:
        """The activation as a module, which can be copied and pickled."""
        return FormulaModule(self)

    def __repr__(self) -> str:
        bits = f"{self.bits} side bit{'s' if self.bits != 1 else ''}"
        bound = f"|decoder - f'| <= {self.bins.bound:.1e} in exact arithmetic"
        return f"Activation({self.name}: {self.formula.text}, {bits}, {bound})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Activation, (self.formula, self.bins, self._value, self._slope)


_MADE: WeakValueDictionary[str, Activation] = WeakValueDictionary()
"""Activations by key: one that is still in use is not made again."""


def activation(key: str) -> Activation:
    """The activation of a key, in whatever process that was made."""
    # By way of the layer, which is remembered: another of that key may have come and gone meanwhile.
    made: Activation = layers.get(key).forward.__self__  # type: ignore[attr-defined]
    return made


def layer(key: str) -> Layer:
    """The layer of the key of an activation, in whatever process that was made."""
    made = _MADE.get(key)
    if made is None:
        try:
            text, name, parameters = json.loads(key.split(" ", 1)[1])
        except (ValueError, IndexError):
            raise FormulaError(f"{key[:60]!r} is no formula's key: it holds no text of one") from None
        parameters = {parameter: Fraction(value) for parameter, value in parameters}
        made = from_formula(text, None if name == text else name, parameters or None)
    return made._layer


class FormulaModule(nn.Module):
    """A formula's activation as a module without parameters."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The activation of a tensor of any shape."""
        return self.activation(input)

    def extra_repr(self) -> str:
        """The name and the formula."""
        return f"{self.activation.name}: {self.activation.formula.text}"


def from_formula(
    formula: str | Callable[..., Any],
    name: str | None = None,
    parameters: Mapping[str, Parameter] | None = None,
) -> Activation:
    """An activation from the text of f(x), or from a Python function of one variable (see `invref.tracing`).

    Takes seconds the first time and then comes from the cache. FormulaError, in one line, says what cannot be used
    and why.
    """
    if not isinstance(formula, str):
        if not callable(formula):
            raise FormulaError(f"{type(formula).__name__} is no formula: give text like 'x * tanh(x)', or a function")
        name = name or getattr(formula, "__name__", None)
        formula = tracing.trace(formula)
    with _refusing(formula):
        found = formulas.define(formula, None if name == "<lambda>" else name, parameters)
    key = cache.key(found.text, repr(found.parameters), _version())
    made = _read(found, cache.load(key))
    if made is None:
        with _refusing(found.name):
            made = _made(found)
        cache.store(key, _written(made))
    return made


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turns what goes wrong with numbers while an activation is made into a FormulaError that names the formula.

    Numbers are the CPU's, whatever torch's default device is.
    """
    try:
        with np.errstate(all="ignore"), torch.device("cpu"):
            yield
    except FormulaError:
        raise
    except (ArithmeticError, ValueError, RuntimeError, ProofError) as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise FormulaError(
            f"{name[:60]} could not be tabulated ({why}): use a formula whose values and slopes float32 holds"
        ) from error


def _made(formula: Formula) -> Activation:
    """The activation from scratch."""
    _, edges = binfit.sides(formula)
    value, slope = stable.checked(formula, 0), stable.checked(formula, 1)
    floor, x = _floor(value, slope, edges, torch.float32)
    if not floor <= LOST:
        raise FormulaError(
            f"{formula.name[:60]} loses its gradient near x = {x:.6g}: its output, rounded to float32, leaves an error "
            f"of {floor:.2g} there; use a formula that is not that flat, or a smaller constant term"
        )
    return Activation(formula, binfit.fit(formula), value, slope)


def _floor(value: Checked, slope: Checked, edges: tuple[Edge, ...], dtype: torch.dtype) -> tuple[float, float]:
    """The largest error floor, relative above 1, met among inputs of a dtype (all of them in 16 bit), and where."""
    fmt = BY_DTYPE[dtype]
    if fmt.bits == 16:
        ordinals = torch.arange(fmt.first_ordinal, fmt.largest_ordinal + 1)
    else:
        spread = torch.linspace(fmt.first_ordinal, fmt.largest_ordinal, SAMPLED, dtype=torch.float64).long()
        marks = [fmt.ordinal(float(edge.at)) for edge in edges]
        ordinals = torch.cat([spread, *(torch.arange(mark - WINDOW, mark + WINDOW) for mark in marks)]).unique()
    x = fmt.from_ordinals(ordinals)
    x = x[~torch.isin(x.double(), torch.tensor([float(edge.at) for edge in edges]).double())]
    y, g = fmt.ordinals(value(x.double()).to(dtype)), slope(x.double())
    finite = (y.abs() <= fmt.largest_ordinal) & g.isfinite()
    x, y, g = x[finite], y[finite], g[finite]
    if not len(x):
        raise FormulaError("f is beyond the dtype's numbers nearly everywhere: use a formula of another scale")
    codes = binned.code_of(tuple(float(edge.threshold(np.float32)) for edge in edges), x).long()
    _, group = torch.unique(y * 16 + codes, return_inverse=True)
    none = torch.full((int(group.max()) + 1,), torch.inf, dtype=torch.float64)
    least, most = none.scatter_reduce(0, group, g, "amin"), (-none).scatter_reduce(0, group, g, "amax")
    floor = (most - least) / (least.abs().clamp(min=1) + most.abs().clamp(min=1))
    worst = int(floor.argmax())
    return float(floor[worst]), float(x[group == worst][0])


def _written(activation: Activation) -> str:
    patches = [
        [[patch.sign, patch.binade, [[c.hex() for c in row] for row in patch.rows]] for patch in function.patches]
        for function in (activation._value, activation._slope)
    ]
    return json.dumps({"decoder": bins.to_json(activation.bins, "invref.from_formula"), "patches": patches})


def _read(formula: Formula, text: str | None) -> Activation | None:
    """The activation of a cache entry; None where the entry does not hold the decoder of this formula."""
    if text is None:
        return None
    try:
        data = json.loads(text)
        decoder = bins.from_json(data["decoder"])
        if (decoder.text, decoder.parameters) != (formula.text, formula.parameters):
            return None
        value, slope = (
            Checked(formula, order, tuple(_patch(*patch) for patch in patches))
            for order, patches in enumerate(data["patches"])
        )
    except (ValueError, KeyError, TypeError, TableError):
        return None
    return Activation(formula, replace(decoder, name=formula.name), value, slope)


def _patch(sign: int, binade: int, rows: list[list[str]]) -> Patch:
    return Patch(sign, binade, tuple(tuple(map(float.fromhex, row)) for row in rows))


@remembered
def _version() -> str:
    """A hash of the package's source and of the libraries that decide what is fitted: another one, another entry."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    package = resources.files("invref")
    for folder in (package, package / "kernels"):
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    libraries = [f"{library} {version(library)}" for library in ("sympy", "mpmath", "python-flint", "torch", "numpy")]
    return f"{digest.hexdigest()} {' '.join(libraries)}"
