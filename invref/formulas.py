"""The catalogue of activations, and how a formula's text becomes an expression.

A formula stands here once; every engine evaluates the same expression. Text is untrusted input: it is parsed
by Python's own grammar and walked against a whitelist, never evaluated, and the size of numbers, exponents
and nesting is bounded. Decimal numbers are exact. This module must not know how a formula is used.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy

from invref.engines import Engine, erfc, evaluate, sigmoid, tanh
from invref.errors import FormulaError

X = sympy.Symbol("x")
FUNCTIONS = {
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "erf": sympy.erf,
    "erfc": erfc,
    "tanh": tanh,
    "sigmoid": sigmoid,
}
LONGEST_TEXT = 10_000
LONGEST_NUMBER = 100
DEEPEST = 100
LARGEST_EXPONENT = 64
LARGEST_NUMBER_BITS = 4096
ALLOWED = f"use numbers, x, pi, + - * / **, parentheses and {', '.join(FUNCTIONS)}"


@dataclass(frozen=True)
class Formula:
    """An activation: its name and the text of f(x)."""

    name: str
    text: str

    @property
    def expression(self) -> sympy.Expr:
        """f as a sympy expression in `X`; FormulaError when the text is not a formula."""
        return parse(self.text)

    def derivative(self, n: int = 1) -> sympy.Expr:
        """The n-th derivative of f as a sympy expression; n = 0 is f itself."""
        return _derivative(self.text, n)

    def evaluate(self, x: Any, engine: Engine, order: int = 0) -> Any:
        """The derivative of that order at `x`, in the engine's own numbers and current precision."""
        return evaluate(self.derivative(order), x, engine)


CATALOGUE = {
    formula.name: formula
    for formula in (
        Formula("gelu", "x * erfc(-x / sqrt(2)) / 2"),
        Formula("gelu_tanh", "x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))"),
        Formula("silu", "x * sigmoid(x)"),
    )
}


def get(name_or_formula: str | Formula) -> Formula:
    """The formula meant: itself, a row of the catalogue, or text in x. FormulaError says which names there are."""
    if isinstance(name_or_formula, Formula):
        return name_or_formula
    if name_or_formula in CATALOGUE:
        return CATALOGUE[name_or_formula]
    if name_or_formula.isidentifier() and name_or_formula != "x":
        raise FormulaError(
            f"unknown activation {name_or_formula[:60]!r}: use one of {', '.join(CATALOGUE)}, or a formula in x"
        )
    if not parse(name_or_formula).has(X):
        raise FormulaError(f"{name_or_formula[:60]!r} does not depend on x: write a formula in x")
    return Formula(name_or_formula, name_or_formula)


@lru_cache(maxsize=256)
def parse(text: str) -> sympy.Expr:
    """The expression that `text` writes; FormulaError names the piece that is not allowed."""
    if len(text) > LONGEST_TEXT:
        raise FormulaError(f"the formula has {len(text)} characters: keep it within {LONGEST_TEXT}")
    line = text.strip()
    if not line.isascii() or "\n" in line or "\r" in line:
        raise FormulaError(f"{line[:60]!r} is not one line of plain ASCII: {ALLOWED}")
    try:
        tree = ast.parse(line, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormulaError(f"{line[:60]!r} is not a well-formed formula: {ALLOWED}") from None
    return _Parser(line).expression(tree.body, 0)


@lru_cache(maxsize=1024)
def _derivative(text: str, n: int) -> sympy.Expr:
    return sympy.factor_terms(sympy.diff(_derivative(text, n - 1), X)) if n else parse(text)


class _Parser:
    """One walk over Python's syntax tree of `text`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def refuse(self, node: ast.expr, why: str) -> FormulaError:
        piece = self.text[node.col_offset : node.end_col_offset]
        return FormulaError(f"{piece[:60]!r} {why}")

    def expression(self, node: ast.expr, depth: int) -> sympy.Expr:
        if depth > DEEPEST:
            raise self.refuse(node, f"is nested more than {DEEPEST} deep: simplify the formula")
        match node:
            case ast.Constant():
                return self.number(node)
            case ast.Name(id="x"):
                return X
            case ast.Name(id="pi"):
                return sympy.pi
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self.expression(inner, depth + 1)
            case ast.BinOp(left=left, op=operator, right=right):
                result = self.binary(
                    node, operator, self.expression(left, depth + 1), self.expression(right, depth + 1)
                )
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
                result = FUNCTIONS[name](self.expression(argument, depth + 1))
            case _:
                raise self.refuse(node, f"is not allowed in a formula: {ALLOWED}")
        if result.has(sympy.I, sympy.zoo, sympy.oo, sympy.nan):
            raise self.refuse(node, "is not a real number: keep roots and logarithms of positive numbers")
        return result

    def number(self, node: ast.Constant) -> sympy.Expr:
        digits = self.text[node.col_offset : node.end_col_offset]
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise self.refuse(node, f"is not a number: {ALLOWED}")
        try:
            size = abs(Decimal(digits).adjusted())
        except InvalidOperation:
            raise self.refuse(node, "is not a decimal number: write it like 0.044715 or 1e-3") from None
        if len(digits) > LONGEST_NUMBER or size > LARGEST_NUMBER_BITS // 4:
            raise self.refuse(node, f"is too large: write at most {LONGEST_NUMBER} digits")
        exact = Fraction(digits)
        return sympy.Rational(exact.numerator, exact.denominator)

    def binary(self, node: ast.expr, operator: ast.operator, left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
        match operator:
            case ast.Add():
                result = left + right
            case ast.Sub():
                result = left - right
            case ast.Mult():
                result = left * right
            case ast.Div():
                if right.is_zero:
                    raise self.refuse(node, "divides by zero: write a denominator that is not 0")
                result = left / right
            case ast.Pow():
                result = self.power(node, left, right)
            case _:
                raise self.refuse(node, f"is not allowed in a formula: {ALLOWED}")
        if _bits(result) > LARGEST_NUMBER_BITS:
            raise self.refuse(node, f"is a number of more than {LARGEST_NUMBER_BITS} bits: use smaller numbers")
        return result

    def power(self, node: ast.expr, base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
        if not exponent.is_Rational:
            raise self.refuse(node, "has an exponent that is not a number: write a**b as exp(b * log(a))")
        if abs(exponent) > LARGEST_EXPONENT or exponent.q > LARGEST_EXPONENT:
            raise self.refuse(node, f"has a too large exponent: keep it within {LARGEST_EXPONENT}")
        if _bits(base) * abs(exponent) > LARGEST_NUMBER_BITS:
            raise self.refuse(node, f"is a number of more than {LARGEST_NUMBER_BITS} bits: use smaller numbers")
        result = base**exponent
        if result.is_Pow and result.exp.is_Rational and abs(result.exp) > LARGEST_EXPONENT:
            raise self.refuse(node, f"has a too large exponent: keep it within {LARGEST_EXPONENT}")
        return result


def _bits(expression: sympy.Expr) -> int:
    """Size of the rational number that an expression is, or is multiplied by."""
    coefficient = expression.as_coeff_Mul()[0]
    if not coefficient.is_Rational:
        return 0
    return max(int(coefficient.p).bit_length(), int(coefficient.q).bit_length())
