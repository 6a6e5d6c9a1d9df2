"""Evaluate one expression tree on any engine: mpmath numbers, Arb balls and power series, intervals, torch tensors.

A formula is written once, as a sympy expression in x; an engine is the small namespace that gives its functions
a meaning. Enclosures are `balls`' work. This module must not know any activation, and only evaluates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from operator import add, mul
from typing import Any

import mpmath
import sympy
import torch
from flint import arb, arb_series, fmpq

from invref import balls, intervals
from invref.balls import coefficients, compose, precision, to_arb, to_mpf, variable
from invref.errors import FormulaError
from invref.symbols import erfc, erfcx, expm1, log1p, sigmoid, softplus, tanh

__all__ = [
    "ARB",
    "INTERVALS",
    "MPMATH",
    "SERIES",
    "TORCH",
    "Engine",
    "coefficients",
    "compose",
    "erfc",
    "erfcx",
    "evaluate",
    "expm1",
    "log1p",
    "precision",
    "sigmoid",
    "softplus",
    "steps",
    "tanh",
    "to_arb",
    "to_mpf",
    "variable",
]

Value = Any
"""A number of one of the engines: mpf, arb, arb_series, Interval or float64 tensor."""


@dataclass(frozen=True)
class Engine:
    """What an expression's leaves and functions mean for one kind of number."""

    name: str
    number: Callable[[sympy.Rational], Value]
    pi: Callable[[], Value]
    power: Callable[[Value, sympy.Rational], Value]
    functions: dict[str, Callable[[Value], Value]] = field(repr=False)


def evaluate(expression: sympy.Expr, x: Value, engine: Engine, seen: dict[sympy.Expr, Value] | None = None) -> Value:
    """Value of `expression` at `x`; repeated subexpressions are evaluated once. FormulaError on unknown functions.

    `seen` keeps the values of subexpressions for further calls at the same x.
    """
    values: list[Value] = []
    for step in _program(expression):
        if seen is not None and step.node in seen:
            values.append(seen[step.node])
            continue
        operands = [values[i] for i in step.operands]
        result: Value
        match step.kind:
            case "x":
                result = x
            case "number":
                result = engine.number(step.node)
            case "pi":
                result = engine.pi()
            case "e":
                result = engine.functions["exp"](engine.number(sympy.Integer(1)))
            case "+":
                result = reduce(add, operands)
            case "*":
                result = reduce(mul, operands)
            case "**":
                result = engine.power(operands[0], step.node.exp)
            case _:
                function = engine.functions.get(step.kind)
                if function is None:
                    raise FormulaError(f"{engine.name} cannot evaluate {step.node}: rewrite the formula without it")
                result = function(operands[0])
        values.append(result)
        if seen is not None:
            seen[step.node] = result
    return values[-1]


def steps(expression: sympy.Expr) -> int:
    """Operations that one evaluation takes."""
    return len(_program(expression))


@dataclass(frozen=True)
class _Step:
    """One operation on the results of earlier steps."""

    kind: str
    node: sympy.Expr
    operands: tuple[int, ...]


@lru_cache(maxsize=4096)
def _program(expression: sympy.Expr) -> tuple[_Step, ...]:
    """The expression as steps in an order in which they can be taken, each subexpression once."""
    steps: list[_Step] = []
    places: dict[sympy.Expr, int] = {}

    def place(node: sympy.Expr) -> int:
        if node not in places:
            if node.is_Symbol:
                kind = "x"
            elif node.is_Rational:
                kind = "number"
            elif node is sympy.pi:
                kind = "pi"
            elif node is sympy.E:
                kind = "e"
            elif node.is_Add:
                kind = "+"
            elif node.is_Mul:
                kind = "*"
            elif node.is_Pow and node.exp.is_Rational:
                kind = "**"
            else:
                kind = node.func.__name__
            inner = () if kind in ("x", "number", "pi", "e") else node.args[:1] if kind == "**" else node.args
            operands = tuple(place(argument) for argument in inner)
            places[node] = len(steps)
            steps.append(_Step(kind, node, operands))
        return places[node]

    place(expression)
    return tuple(steps)


# --- mpmath -----------------------------------------------------------------------------------------------


LARGEST_MAGNITUDE = 200_000
"""Where the binary exponent of its argument passes this, mpmath's exp is 0 or infinite: else it would fill memory."""


def _mp_exp(z: mpmath.mpf) -> mpmath.mpf:
    if mpmath.isfinite(z) and z != 0 and mpmath.mag(z) > LARGEST_MAGNITUDE:
        return mpmath.mpf(0) if z < 0 else mpmath.inf
    return mpmath.exp(z)


def _mp_sigmoid(z: mpmath.mpf) -> mpmath.mpf:
    if z >= 0:
        return 1 / (1 + _mp_exp(-z))
    tail = _mp_exp(z)
    return tail / (1 + tail)


def _mp_softplus(z: mpmath.mpf) -> mpmath.mpf:
    return mpmath.log1p(_mp_exp(-abs(z))) + max(z, mpmath.mpf(0))


def _mp_power(base: mpmath.mpf, exponent: sympy.Rational) -> mpmath.mpf:
    if exponent.q == 2:
        base = mpmath.sqrt(base)
        return base**exponent.p
    return base ** (mpmath.mpf(exponent.p) / exponent.q if exponent.q > 1 else int(exponent))


def _mp_erfc(z: mpmath.mpf) -> mpmath.mpf:
    """mpmath's erfc, which overflows a float inside for the largest arguments: there by its asymptotic series."""
    if z < 2**100:
        return mpmath.erfc(z)
    # DLMF 7.12.1: alternating, so the error is below the first term left out; each one adds 201 bits.
    term = total = mpmath.mpf(1)
    for n in range(1, mpmath.mp.prec // 200 + 2):
        term *= -mpmath.mpf(2 * n - 1) / (2 * z * z)
        total += term
    return mpmath.exp(-z * z) / (z * mpmath.sqrt(mpmath.pi)) * total


MPMATH = Engine(
    "mpmath",
    lambda q: mpmath.mpf(int(q.p)) / int(q.q),
    lambda: +mpmath.pi,
    _mp_power,
    {
        "exp": _mp_exp,
        "log": mpmath.log,
        "erf": mpmath.erf,
        "erfc": _mp_erfc,
        "tanh": lambda z: mpmath.tanh(z) if mpmath.mag(z) < LARGEST_MAGNITUDE else mpmath.sign(z),
        "sigmoid": _mp_sigmoid,
        "softplus": _mp_softplus,
        "expm1": lambda z: mpmath.expm1(z) if mpmath.mag(z) < 64 else _mp_exp(z) - 1,
        "log1p": mpmath.log1p,
        "atan": mpmath.atan,
        "atanc": lambda z: mpmath.atan2(1, z),
    },
)


# --- Arb: balls, and power series whose constant term is a ball --------------------------------------------


def _lift(ball: Callable[[arb], arb], taylor: Callable[[arb, int], list[arb]]) -> Callable[[Value], Value]:
    """A function of balls and series, from its value on a ball and its Taylor coefficients over a ball."""

    def function(z: Value) -> Value:
        if isinstance(z, arb):
            return ball(z)
        inner = coefficients(z)
        return compose(arb_series(taylor(inner[0], z.prec), prec=z.prec), inner)

    return function


def _arb_power(base: Value, exponent: sympy.Rational) -> Value:
    return _lift(lambda z: balls.power(z, exponent), lambda z, count: balls.taylor_power(z, count, exponent))(base)


ARB = Engine(
    "Arb",
    to_arb,
    arb.pi,
    _arb_power,
    {
        "exp": _lift(balls.exp, balls.taylor_exp),
        "log": _lift(balls.log, balls.taylor_log),
        "erf": _lift(balls.erf, balls.taylor_erf),
        "erfc": _lift(balls.erfc, balls.taylor_erfc),
        "erfcx": balls.erfcx,
        "tanh": _lift(balls.tanh, balls.taylor_tanh),
        "sigmoid": _lift(balls.sigmoid, balls.taylor_sigmoid),
        "softplus": _lift(balls.softplus, balls.taylor_softplus),
        "expm1": _lift(balls.expm1, balls.taylor_expm1),
        "log1p": _lift(balls.log1p, balls.taylor_log1p),
        "atan": _lift(balls.atan, balls.taylor_atan),
        "atanc": _lift(balls.atanc, balls.taylor_atanc),
    },
)
SERIES = ARB
"""Series share the ball engine: its functions accept both, as constants inside a series' formula are balls."""


# --- intervals ---------------------------------------------------------------------------------------------


def _interval_power(base: Value, exponent: sympy.Rational) -> Value:
    if exponent.q == 1:
        return intervals.power(base, int(exponent))
    return intervals.root(base, fmpq(int(exponent.p), int(exponent.q)))


INTERVALS = Engine(
    "intervals",
    lambda q: intervals.around(to_arb(q)),
    lambda: intervals.around(arb.pi()),
    _interval_power,
    intervals.FUNCTIONS,
)


# --- torch ------------------------------------------------------------------------------------------------


def _torch_power(base: Value, exponent: sympy.Rational) -> Value:
    return base ** float(exponent) if exponent.q > 1 else base ** int(exponent)


def _on_tensors(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    """Constants inside a formula are Python floats: lift them to the double tensor that torch's functions want."""
    return lambda z: function(z if isinstance(z, torch.Tensor) else torch.tensor(z, dtype=torch.float64))


def _torch_softplus(z: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


def _torch_sigmoid(z: torch.Tensor) -> torch.Tensor:
    """Sigmoid as 1 minus its small complement for z > 0: rounded once near 1, where torch's own is rounded twice."""
    return torch.where(z > 0, 1 - torch.sigmoid(-z), torch.sigmoid(z))


TORCH = Engine(
    "torch",
    float,
    lambda: float(sympy.pi),
    _torch_power,
    {
        "exp": _on_tensors(torch.exp),
        "log": _on_tensors(torch.log),
        "erf": _on_tensors(torch.erf),
        "erfc": _on_tensors(torch.special.erfc),
        "tanh": _on_tensors(torch.tanh),
        "sigmoid": _on_tensors(_torch_sigmoid),
        "softplus": _on_tensors(_torch_softplus),
        "expm1": _on_tensors(torch.expm1),
        "log1p": _on_tensors(torch.log1p),
        "atan": _on_tensors(torch.atan),
        "atanc": _on_tensors(lambda z: torch.atan2(torch.ones_like(z), z)),
    },
)
