"""The catalogue of activations, and what a formula is: smooth branches between breaks, evaluated on any engine.

A formula stands here once; every engine evaluates the same expressions. Where a break has two slopes, the branch that
owns it is the one whose slope the framework's own backward takes there. This module must not know how a formula is
used, nor how text becomes expressions.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, reduce
from typing import Any

import mpmath
import sympy
import torch
from flint import arb, arb_series

from invref import language
from invref.engines import ARB, Engine, coefficients, evaluate, precision, to_arb
from invref.errors import FormulaError
from invref.language import Break, Macro, X
from invref.signs import Box

__all__ = ["CATALOGUE", "Branch", "Break", "Formula", "X", "define", "get", "parse"]

LONGEST_NAME = 60
MOST_LETTERS = f"at most {LONGEST_NAME}, and no digit first"
EVALUATION_BITS = 400
"""Precision of what is read off at a break."""
PROBES = (0, 1e-6, 1e-3, 0.1, 0.7, 1, 1.5, 3, 10, 100, 1e4)
"""Where, with both signs, a new formula is tried before anything is proved."""


@dataclass(frozen=True)
class Branch:
    """A smooth function on a closed interval between breaks."""

    expression: sympy.Expr

    def derivative(self, n: int = 1) -> sympy.Expr:
        """The n-th derivative as a sympy expression; n = 0 is the function itself."""
        return _derivative(self.expression, n)

    def evaluate(self, x: Any, engine: Engine, order: int = 0) -> Any:
        """The derivative of that order at `x`, in the engine's own numbers and current precision."""
        return evaluate(self.derivative(order), x, engine)

    @property
    def constant(self) -> bool:
        """Whether the branch does not depend on x."""
        return not self.expression.has(X)


@dataclass(frozen=True)
class Formula:
    """An activation: its name, the text of f(x), and the values of the text's parameters."""

    name: str
    text: str
    parameters: tuple[tuple[str, Fraction], ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The smooth branches, from the left; FormulaError when the text is not a formula."""
        return _read(self)[0]

    @property
    def breaks(self) -> tuple[Break, ...]:
        """The numbers between neighbouring branches."""
        return _read(self)[1]

    @property
    def expression(self) -> sympy.Expr:
        """f as a sympy expression in `X`; FormulaError where it has breaks."""
        return self._smooth().expression

    def derivative(self, n: int = 1) -> sympy.Expr:
        """The n-th derivative of f as a sympy expression; n = 0 is f itself. FormulaError where f has breaks."""
        return self._smooth().derivative(n)

    def evaluate(self, x: Any, engine: Engine, order: int = 0) -> Any:
        """The derivative of that order at `x`, in the engine's own numbers and current precision.

        At a break, the owner's. A ball that holds a break gives the union of what the branches give on their parts.
        """
        if not self.breaks:
            return self.branches[0].evaluate(x, engine, order)
        if isinstance(x, torch.Tensor):
            return self._on_tensor(x, engine, order)
        if isinstance(x, arb | arb_series):
            return self._on_ball(x, engine, order)
        return self.branches[self.branch_of(x)].evaluate(x, engine, order)

    def branch_of(self, x: Any) -> int:
        """Number of the branch that owns a number: a float, an int, a Fraction or an mpf."""
        if x != x or x in (math.inf, -math.inf):
            return 0 if x < 0 else len(self.breaks)
        exact = Fraction(*mpmath.libmp.to_rational(x._mpf_)) if isinstance(x, mpmath.mpf) else Fraction(x)
        return sum(exact > b.at or (exact == b.at and b.right_owns) for b in self.breaks)

    def slopes_at(self, at: Fraction | Break) -> tuple[float, float]:
        """The derivatives of f on the left and on the right of a break."""
        return self.sides_at(at, 1)

    def sides_at(self, at: Fraction | Break, order: int = 0) -> tuple[float, float]:
        """The one-sided values of f, or of its derivative of that order, at a break."""
        point = at.at if isinstance(at, Break) else at
        index = next((i for i, b in enumerate(self.breaks) if b.at == point), None)
        if index is None:
            raise FormulaError(f"{self.name} has no break at x = {point}: its breaks are in `breaks`")
        with precision(EVALUATION_BITS):
            x = to_arb(language.rational(point))
            left, right = (float(b.evaluate(x, ARB, order).mid()) for b in self.branches[index : index + 2])
        return left, right

    def _smooth(self) -> Branch:
        if self.breaks:
            raise FormulaError(f"{self.name} has breaks: use its branches")
        return self.branches[0]

    def _on_tensor(self, x: torch.Tensor, engine: Engine, order: int) -> torch.Tensor:
        parts = [branch.evaluate(x, engine, order) for branch in self.branches]
        parts = [part if isinstance(part, torch.Tensor) else torch.full_like(x, part) for part in parts]
        wide, result = x.double(), parts[-1]
        for part, border in zip(parts[-2::-1], self.breaks[::-1], strict=True):
            at = _floor_of(border.at)
            left = wide <= at if not border.right_owns or at != border.at else wide < at
            result = torch.where(left, part, result)
        return torch.where(torch.isnan(x), x, result)

    def _on_ball(self, x: arb | arb_series, engine: Engine, order: int) -> Any:
        inner = [x] if isinstance(x, arb) else coefficients(x)
        found = []
        for index, part in self.parts_of(inner[0]):
            at = part if isinstance(x, arb) else arb_series([part, *inner[1:]], prec=x.prec)
            value = self.branches[index].evaluate(at, engine, order)
            if isinstance(x, arb_series) and not isinstance(value, arb_series):
                value = arb_series([value], prec=x.prec)
            found.append(value)
        if isinstance(x, arb):
            return reduce(arb.union, found)
        rows = zip(*map(coefficients, found), strict=True)
        return arb_series([reduce(arb.union, row) for row in rows], prec=min(value.prec for value in found))

    def parts_of(self, x: arb) -> list[tuple[int, arb]]:
        """The branches that a ball meets, each with the part of the ball on its interval; a point meets its owner."""
        ends = [to_arb(language.rational(b.at)) for b in self.breaks]
        if x.is_exact() and x.is_finite():
            close = [abs(x - end).abs_lower() == 0 for end in ends]
            if any(close):
                man, exp = x.man_exp()
                exact = Fraction(int(man)) * Fraction(2) ** int(exp)
                return [(self.branch_of(exact), x)]
        found = []
        for index, (low, high) in enumerate(zip([arb.neg_inf(), *ends], [*ends, arb.pos_inf()], strict=True)):
            if x < low or x > high:
                continue
            part = x
            if not x > low:
                part = part.intersection(_from(low, part, -1))
            if not part < high:
                part = part.intersection(_from(high, part, 1))
            found.append((index, part))
        return found


def _from(end: arb, part: arb, side: int) -> arb:
    """A ball from an end of a branch's interval to the farther end of `part`."""
    return end.union(part.upper() if side < 0 else part.lower())


def _row(name: str, text: str, **parameters: str) -> Formula:
    return Formula(name, text, tuple((key, Fraction(value)) for key, value in parameters.items()))


_GELU_TANH = "x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))"
_SOFTPLUS = "where(beta * x > threshold, x, softplus(beta * x) / beta)"
_SELU = {"alpha": "1.6732632423543772848170429916717", "scale": "1.0507009873554804934193349852946"}

CATALOGUE = {
    formula.name: formula
    for formula in (
        _row("relu", "where(x > 0, x, 0)"),
        _row("leaky_relu", "where(x > 0, x, negative_slope * x)", negative_slope="0.01"),
        _row("elu", "where(x > 0, x, alpha * expm1(x))", alpha="1"),
        _row("celu", "where(x > 0, x, alpha * expm1(x / alpha))", alpha="1"),
        _row("selu", "scale * where(x > 0, x, alpha * expm1(x))", **_SELU),
        _row("gelu", "x * erfc(-x / sqrt(2)) / 2"),
        _row("gelu_tanh", _GELU_TANH),
        _row("silu", "x * sigmoid(x)"),
        _row("mish", "x * tanh(softplus(x))"),
        _row("softplus", _SOFTPLUS, beta="1", threshold="20"),
        _row("softsign", "x / (1 + abs(x))"),
        _row("tanh", "tanh(x)"),
        _row("sigmoid", "sigmoid(x)"),
        _row("logsigmoid", "-softplus(-x)"),
        _row("hardtanh", "where(x <= min_val, min_val, where(x >= max_val, max_val, x))", min_val="-1", max_val="1"),
        _row("relu6", "where(x <= 0, 0, where(x >= 6, 6, x))"),
        _row("hardsigmoid", "where(x <= -3, 0, where(x >= 3, 1, x / 6 + 1 / 2))"),
        _row("hardswish", "where(x <= -3, 0, where(x >= 3, x, x * (x / 6 + 1 / 2)))"),
        _row("tanhshrink", "x - tanh(x)"),
        _row("softshrink", "where(x > lambd, x - lambd, where(x < -lambd, x + lambd, 0))", lambd="0.5"),
        _row("hardshrink", "where(x > lambd, x, where(x < -lambd, x, 0))", lambd="0.5"),
        _row("threshold", "where(x > threshold, x, value)", threshold="1", value="0"),
        _row("prelu", "where(x > 0, x, weight * x)", weight="0.25"),
        _row("quick_gelu", "x * sigmoid(1.702 * x)"),
        _row("relu2", "where(x > 0, x * x, 0)"),
        _row("laplace", "erfc(-(x - mu) / (sigma * sqrt(2))) / 2", mu="0.707107", sigma="0.282095"),
        _row("sqrtsoftplus", "sqrt(where(x > 20, x, softplus(x)))"),
        _row(
            "xielu",
            "where(x > 0, alpha_p * x * x + beta * x,"
            " where(x > eps, alpha_n * (expm1(eps) - x) + beta * x, alpha_n * (expm1(x) - x) + beta * x))",
            alpha_p="0.8",
            alpha_n="0.8",
            beta="0.5",
            eps="-1e-6",
        ),
        _row("gelu_10", "where(x > 10, 10, x * erfc(-x / sqrt(2)) / 2)"),
        _row("gelu_fast", "x * sigmoid(2 * 0.7978845608 * x * (1 + 0.044715 * x * x))"),
        _row("gelu_new", _GELU_TANH),
    )
}
MACROS = {name: Macro(row.text, row.parameters) for name, row in CATALOGUE.items()}
"""Names that may be called in a formula's text. `softplus` of one argument is the smooth function."""


def get(name_or_formula: str | Formula, **parameters: float | int | str | Fraction) -> Formula:
    """The formula meant: itself, a row of the catalogue, or text in x, with its parameters put in.

    FormulaError says which names there are.
    """
    if isinstance(name_or_formula, Formula) or name_or_formula in CATALOGUE:
        row = CATALOGUE[name_or_formula] if isinstance(name_or_formula, str) else name_or_formula
        if not parameters:
            return row
        known = dict(row.parameters)
        for name in parameters:
            if name not in known:
                raise FormulaError(f"{row.name} has no parameter {name[:60]!r}: it has {', '.join(known) or 'none'}")
        given = known | {name: _fraction(name, value) for name, value in parameters.items()}
        return Formula(row.name, row.text, tuple(given.items()))
    if name_or_formula.isidentifier() and name_or_formula != "x" and name_or_formula not in parameters:
        raise FormulaError(
            f"unknown activation {name_or_formula[:60]!r}: use one of {', '.join(CATALOGUE)}, or a formula in x"
        )
    return define(name_or_formula, parameters=parameters)


def define(
    text: str, name: str | None = None, parameters: Mapping[str, float | int | str | Fraction] | None = None
) -> Formula:
    """A new formula from its text, tried at a few dozen numbers; FormulaError when it is none, or not finite there."""
    if name is not None and not (isinstance(name, str) and _short(name.replace("-", "_").replace(".", "_"))):
        raise FormulaError(
            f"{str(name)[:60]!r} cannot be a name: use letters, digits, '_', '-' and '.', {MOST_LETTERS}"
        )
    if not isinstance(parameters or {}, Mapping):
        raise FormulaError(f"parameters are a {type(parameters).__name__}: give a dict such as {{'beta': 1.702}}")
    for key in parameters or {}:
        if not (isinstance(key, str) and _short(key)):
            raise FormulaError(f"{str(key)[:60]!r} cannot be the name of a parameter: use letters, {MOST_LETTERS}")
    values = tuple((key, _fraction(key, value)) for key, value in (parameters or {}).items())
    limit = 10**language.LARGEST_POWER_OF_TEN
    for key, value in values:
        if value and not Fraction(1, limit) <= abs(value) <= limit:
            raise FormulaError(f"parameter {key} is too large or too small: use 0 and numbers {language.SCALE}")
    return _checked(Formula(name or text, text, values))


def _short(name: str) -> bool:
    return name.isidentifier() and len(name) <= LONGEST_NAME


@lru_cache(maxsize=1024)
def _checked(formula: Formula) -> Formula:
    reserved = {"x", "pi", *language.FUNCTIONS, *language.CHOICES, *language.OTHER_NAMES, *MACROS}
    for key, _ in formula.parameters:
        if not key.isidentifier() or key in reserved:
            raise FormulaError(f"{key[:60]!r} cannot be the name of a parameter: choose a name that has no meaning yet")
    if all(branch.constant for branch in formula.branches):
        raise FormulaError(f"{formula.text[:60]!r} does not depend on x: write a formula in x")
    tree = ast.parse(formula.text.strip(), mode="eval")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for key, _ in formula.parameters:
        if key not in used:
            raise FormulaError(f"parameter {key} does not occur in {formula.text[:60]!r}: leave it out, or use it")
    _probe(formula)
    return formula


def parse(text: str) -> sympy.Expr:
    """The expression that a text without breaks writes; FormulaError names the piece that is not allowed."""
    return Formula(text[:60], text).expression


def _fraction(name: str, value: float | int | str | Fraction) -> Fraction:
    """A parameter's value, floats as the decimal that they print as."""
    try:
        exact = Fraction(repr(value) if isinstance(value, float) else value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise FormulaError(f"parameter {name[:60]} = {str(value)[:60]} is not a finite number") from None
    if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > language.LARGEST_NUMBER_BITS:
        raise FormulaError(f"parameter {name[:60]} has more than {language.LARGEST_NUMBER_BITS} bits: use fewer digits")
    return exact


def _probe(formula: Formula) -> None:
    """Refuse at once what is not finite, or has no derivative, at one of a few dozen numbers."""
    name = repr(formula.name[:60])
    with precision(EVALUATION_BITS):
        for order in (0, 1):
            for index, point in _probes(formula):
                x, branch, at = to_arb(language.rational(point)), formula.branches[index], f"{float(point):.6g}"
                if branch.evaluate(x, ARB, order).is_finite() or Box(x.mid(), x.mid()).defined(branch.expression):
                    continue
                if order == 0:
                    raise FormulaError(f"{name} is not finite at x = {at}: use a formula that is, on the whole line")
                if any(point == b.at for b in formula.breaks):
                    raise FormulaError(f"{name} has no finite slope at its break x = {at}: use a formula that has one")
                raise FormulaError(
                    f"{name} has no derivative at x = {at}: declare the break with where(x > {at}, ..., ...)"
                )


def _probes(formula: Formula) -> list[tuple[int, Fraction]]:
    """Numbers to try, with the branch to try them on: a few, the ends of each branch, and zeros of parts of it."""
    found = [(formula.branch_of(s * Fraction(p)), s * Fraction(p)) for p in PROBES for s in (1, -1)]
    ends = [None, *(b.at for b in formula.breaks), None]
    for index, branch in enumerate(formula.branches):
        low, high = ends[index], ends[index + 1]
        inner = [end for end in (low, high) if end is not None]
        for zero in affine_zeros(branch.expression):
            if (low is None or low <= zero) and (high is None or zero <= high):
                inner.append(zero)
        found += [(index, point) for point in inner]
    return found


@lru_cache(maxsize=1024)
def affine_zeros(expression: sympy.Expr) -> tuple[Fraction, ...]:
    """The rational zeros of all parts of an expression that are straight lines in x."""
    zeros = set()
    for part in sympy.preorder_traversal(expression):
        if part.is_Add or part.is_Mul or part.is_Symbol:
            slope = sympy.diff(part, X) if part.has(X) else sympy.Integer(0)
            if slope != 0 and not slope.has(X):
                zero = sympy.expand(-part.subs(X, 0) / slope)
                if zero.is_Rational:
                    zeros.add(Fraction(int(zero.p), int(zero.q)))
    return tuple(sorted(zeros))


@lru_cache(maxsize=1024)
def _read(formula: Formula) -> tuple[tuple[Branch, ...], tuple[Break, ...]]:
    line = language.read(formula.text, dict(formula.parameters), MACROS)
    return tuple(map(Branch, line.values)), line.breaks


@lru_cache(maxsize=1024)
def _derivative(expression: sympy.Expr, n: int) -> sympy.Expr:
    return sympy.factor_terms(sympy.diff(_derivative(expression, n - 1), X)) if n else expression


def _floor_of(exact: Fraction) -> float:
    """The largest float64 that is not above a number."""
    nearest = float(exact)
    return nearest if Fraction(nearest) <= exact else math.nextafter(nearest, -math.inf)
