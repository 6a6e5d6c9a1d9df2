"""Evaluate one expression tree on four engines: mpmath numbers, Arb balls, Arb power series, torch tensors.

A formula is written once, as a sympy expression in x; an engine is the small namespace that gives its functions
a meaning. Enclosures are `balls`' work. This module must not know any activation, and only evaluates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import mpmath
import sympy
import torch
from flint import arb, arb_series

from invref import balls
from invref.balls import coefficients, compose, precision, to_arb, to_mpf, variable
from invref.errors import FormulaError

__all__ = [
    "ARB",
    "MPMATH",
    "SERIES",
    "TORCH",
    "Engine",
    "coefficients",
    "compose",
    "erfc",
    "erfcx",
    "evaluate",
    "precision",
    "sigmoid",
    "tanh",
    "to_arb",
    "to_mpf",
    "variable",
]

Value = Any
"""A number of one of the engines: mpf, arb, arb_series or float64 tensor."""


class sigmoid(sympy.Function):  # type: ignore[misc]  # noqa: N801 - the name is the formula language's
    """1 / (1 + exp(-z)); its derivative is a product, which keeps its relative accuracy in both tails."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative sigmoid(z) sigmoid(-z)."""
        return sigmoid(self.args[0]) * sigmoid(-self.args[0])


class erfc(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """Complementary error function that, unlike sympy's, never rewrites erfc(-z) to the cancelling 2 - erfc(z)."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative -2/sqrt(pi) exp(-z²)."""
        return -2 * sympy.exp(-(self.args[0] ** 2)) / sympy.sqrt(sympy.pi)


class tanh(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """Hyperbolic tangent whose derivative is a product, not the cancelling 1 - tanh²."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative 4 sigmoid(2z) sigmoid(-2z)."""
        return 4 * sigmoid(2 * self.args[0]) * sigmoid(-2 * self.args[0])


class erfcx(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """exp(z²) erfc(z), which decays like 1/z: `pieces` writes derivatives with it to read off their sign."""


@dataclass(frozen=True)
class Engine:
    """What an expression's leaves and functions mean for one kind of number."""

    name: str
    number: Callable[[sympy.Rational], Value]
    pi: Callable[[], Value]
    power: Callable[[Value, sympy.Rational], Value]
    functions: dict[str, Callable[[Value], Value]] = field(repr=False)


def evaluate(expression: sympy.Expr, x: Value, engine: Engine) -> Value:
    """Value of `expression` at `x`; repeated subexpressions are evaluated once. FormulaError on unknown functions."""
    seen: dict[sympy.Expr, Value] = {}

    def walk(node: sympy.Expr) -> Value:
        if node in seen:
            return seen[node]
        result: Value
        if node.is_Symbol:
            result = x
        elif node.is_Rational:
            result = engine.number(node)
        elif node is sympy.pi:
            result = engine.pi()
        elif node is sympy.E:
            result = engine.functions["exp"](engine.number(sympy.Integer(1)))
        elif node.is_Add:
            result = reduce(lambda a, b: a + b, map(walk, node.args))
        elif node.is_Mul:
            result = reduce(lambda a, b: a * b, map(walk, node.args))
        elif node.is_Pow and node.exp.is_Rational:
            result = engine.power(walk(node.base), node.exp)
        else:
            function = engine.functions.get(node.func.__name__)
            if function is None:
                raise FormulaError(f"{engine.name} cannot evaluate {node}: rewrite the formula without it")
            result = function(walk(node.args[0]))
        seen[node] = result
        return result

    return walk(expression)


# --- mpmath -----------------------------------------------------------------------------------------------


def _mp_sigmoid(z: mpmath.mpf) -> mpmath.mpf:
    if z >= 0:
        return 1 / (1 + mpmath.exp(-z))
    tail = mpmath.exp(z)
    return tail / (1 + tail)


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
        "exp": mpmath.exp,
        "log": mpmath.log,
        "erf": mpmath.erf,
        "erfc": _mp_erfc,
        "tanh": mpmath.tanh,
        "sigmoid": _mp_sigmoid,
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
    },
)
SERIES = ARB
"""Series share the ball engine: its functions accept both, as constants inside a series' formula are balls."""


# --- torch ------------------------------------------------------------------------------------------------


def _torch_power(base: Value, exponent: sympy.Rational) -> Value:
    return base ** float(exponent) if exponent.q > 1 else base ** int(exponent)


def _on_tensors(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    """Constants inside a formula are Python floats: lift them to the double tensor that torch's functions want."""
    return lambda z: function(z if isinstance(z, torch.Tensor) else torch.tensor(z, dtype=torch.float64))


def _torch_sigmoid(z: torch.Tensor) -> torch.Tensor:
    """Sigmoid as 1 minus its small complement for z > 0: rounded once near 1, where torch's own is rounded twice."""
    small = torch.sigmoid(-z.abs())
    return torch.where(z > 0, 1 - small, small)


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
    },
)
