"""From the text of a formula to one expression for each interval between its breaks.

Text is untrusted input: it is parsed by Python's own grammar and walked against a whitelist, never evaluated, and the
size of numbers, exponents, nesting and expressions is bounded. Decimal numbers are exact. A break is a number at which
`where`, `abs`, `maximum`, `minimum`, `relu` or `clip` changes its expression. This module must not know which
activations there are: names that stand for formulas are handed in as macros.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import sympy

from invref.engines import ARB, evaluate, precision
from invref.errors import FormulaError
from invref.rewriting import stable
from invref.symbols import erfc, expm1, log1p, sigmoid, softplus, tanh

X = sympy.Symbol("x")
FUNCTIONS: dict[str, Callable[[sympy.Expr], sympy.Expr]] = {
    "exp": sympy.exp,
    "expm1": expm1,
    "log": sympy.log,
    "log1p": log1p,
    "sqrt": sympy.sqrt,
    "erf": sympy.erf,
    "erfc": erfc,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "atan": sympy.atan,
}
CHOICES = ("abs", "maximum", "minimum", "relu", "clip", "where")
"""Functions that make breaks."""
OTHER_NAMES = {"arctan": "atan", "max": "maximum", "min": "minimum", "clamp": "clip", "swish": "silu"}
PERIODIC = ("sin", "cos", "tan", "sinc")
LONGEST_TEXT = 10_000
LONGEST_NUMBER = 100
DEEPEST = 100
LARGEST_EXPONENT = 64
LARGEST_NUMBER_BITS = 4096
LARGEST_POWER_OF_TEN = 30
"""Numbers that are written out lie between 10^-30 and 10^30, as far as they are not 0."""
HIGHEST_TOWER = 4
"""exp(exp(exp(exp(x)))); each log takes one off."""
LARGEST_EXPRESSION = 2000
"""Nodes of an expression's tree."""
MOST_BREAKS = 32
ALLOWED = f"use numbers, x, pi, + - * / **, parentheses and {', '.join((*FUNCTIONS, *CHOICES))}"
SCALE = f"between 1e-{LARGEST_POWER_OF_TEN} and 1e{LARGEST_POWER_OF_TEN}"
NOT_AFFINE = "changes where its argument is not a straight line in x: write it with where(x > c, ..., ...)"


@dataclass(frozen=True)
class Break:
    """A number at which one expression ends and the next begins; x = at itself belongs to one of them."""

    at: Fraction
    right_owns: bool


@dataclass(frozen=True)
class Line:
    """Expressions, or the truth of a condition, on the intervals between breaks, from the left."""

    values: tuple[Any, ...]
    breaks: tuple[Break, ...] = ()


@dataclass(frozen=True)
class Macro:
    """A formula that may be called by name, its parameters with their defaults."""

    text: str
    parameters: tuple[tuple[str, Fraction], ...] = ()


def read(text: str, parameters: Mapping[str, Fraction], macros: Mapping[str, Macro]) -> Line:
    """The expressions that `text` writes, stably written; FormulaError names the piece that is not allowed."""
    names = {name: Line((rational(value),)) for name, value in parameters.items()}
    line = _parse(text, {"x": Line((X,)), **names}, macros, 0)
    if any(isinstance(value, bool) for value in line.values):
        raise FormulaError(f"{text[:60]!r} is a condition, not a number: use it inside where(condition, a, b)")
    if any(_tower(value) > HIGHEST_TOWER for value in line.values):
        raise FormulaError(f"{text[:60]!r} nests exp more than {HIGHEST_TOWER} deep, beyond every float: use fewer")
    return _joined([stable(value) for value in line.values], list(line.breaks))


def rational(number: Fraction) -> sympy.Rational:
    """A Fraction as sympy's number."""
    return sympy.Rational(number.numerator, number.denominator)


def _parse(text: str, names: Mapping[str, Line], macros: Mapping[str, Macro], depth: int) -> Line:
    if len(text) > LONGEST_TEXT:
        raise FormulaError(f"the formula has {len(text)} characters: keep it within {LONGEST_TEXT}")
    line = text.strip()
    if not line.isascii() or "\n" in line or "\r" in line:
        raise FormulaError(f"{line[:60]!r} is not one line of plain ASCII: {ALLOWED}")
    try:
        tree = ast.parse(line, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormulaError(f"{line[:60]!r} is not a well-formed formula: {ALLOWED}") from None
    return _Parser(line, names, macros).expression(tree.body, depth)


class _Parser:
    """One walk over Python's syntax tree of `text`."""

    def __init__(self, text: str, names: Mapping[str, Line], macros: Mapping[str, Macro]) -> None:
        self.text, self.names, self.macros = text, names, macros
        self.sizes: dict[sympy.Expr, int] = {}

    def piece(self, node: ast.expr) -> str:
        return repr(self.text[node.col_offset : node.end_col_offset][:60])

    def refuse(self, node: ast.expr, why: str) -> FormulaError:
        return FormulaError(f"{self.piece(node)} {why}")

    def expression(self, node: ast.expr, depth: int) -> Line:
        if depth > DEEPEST:
            raise self.refuse(node, f"is nested more than {DEEPEST} deep: simplify the formula")
        match node:
            case ast.Constant():
                return Line((self.number(node),))
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Name(id="pi"):
                return Line((sympy.pi,))
            case ast.Name(id=name):
                raise self.refuse(node, f"is no variable: write the formula in x, or give {name[:60]} as a parameter")
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
                result = self.expression(inner, depth + 1)
                self.numbers(node, result)
                return self.each(node, lambda a: -a, result) if isinstance(sign, ast.USub) else result
            case ast.BinOp(left=left, op=ast.operator() as operator, right=right):
                operands = self.expression(left, depth + 1), self.expression(right, depth + 1)
                self.numbers(node, *operands)
                return self.each(node, lambda a, b: self.binary(node, operator, a, b), *operands)
            case ast.Compare(left=left, ops=[relation], comparators=[right]):
                operands = self.expression(left, depth + 1), self.expression(right, depth + 1)
                self.numbers(node, *operands)
                return self.comparison(node, relation, *operands)
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, OTHER_NAMES.get(name, name), depth)
            case ast.Attribute():
                raise self.refuse(
                    node, "reaches into an object, which a formula may not: write the function's name alone"
                )
            case _:
                raise self.refuse(node, f"is not allowed in a formula: {ALLOWED}")

    def call(self, node: ast.Call, name: str, depth: int) -> Line:
        if name in PERIODIC:
            raise self.refuse(
                node, "has unboundedly many turning points, which no number of side bits tells apart: leave it out"
            )
        known = name in FUNCTIONS or name in CHOICES or name in self.macros
        if not known or any(isinstance(argument, ast.Starred) for argument in node.args):
            raise self.refuse(node, f"is not allowed in a formula: {ALLOWED}")
        lines = [self.expression(argument, depth + 1) for argument in node.args]
        if name == "where":
            if len(lines) != 3 or node.keywords or not _is_condition(lines[0]):
                raise self.refuse(node, "is not of the form where(x > c, a, b)")
            self.numbers(node, *lines[1:])
            return self.where(node, *lines)
        self.numbers(node, *lines)
        if name in FUNCTIONS and len(lines) == 1 and not node.keywords:
            return self.each(node, FUNCTIONS[name], *lines)
        if name in CHOICES and not node.keywords:
            return self.choice(node, name, lines)
        if name in self.macros:
            return self.macro(node, name, lines, depth)
        raise self.refuse(node, f"has arguments that {name} does not take: {ALLOWED}")

    def macro(self, node: ast.Call, name: str, lines: list[Line], depth: int) -> Line:
        macro = self.macros[name]
        known = dict(macro.parameters)
        given = {"x": lines[0]} if lines else {}
        given |= dict(zip(known, lines[1:], strict=False))
        for keyword in node.keywords:
            if keyword.arg in given or keyword.arg not in known:
                raise self.refuse(
                    node, f"has an argument that {name} does not take: it has {', '.join(known) or 'none'}"
                )
            given[keyword.arg] = self.expression(keyword.value, depth + 1)
        if not lines or len(lines) > 1 + len(known):
            raise self.refuse(node, f"has the wrong number of arguments: {name}({', '.join(('x', *known))})")
        if any(value.has(X) for key in known for value in given.get(key, Line(())).values):
            raise self.refuse(node, "has a parameter that depends on x: give a number")
        names = {key: Line((rational(value),)) for key, value in known.items()} | given
        return self.checked(node, _parse(macro.text, names, self.macros, depth + 1))

    def numbers(self, node: ast.expr, *lines: Line) -> None:
        if any(_is_condition(line) for line in lines):
            raise self.refuse(node, "calculates with a condition: use it as in where(x > c, a, b)")

    def each(self, node: ast.expr, function: Callable[..., sympy.Expr], *lines: Line) -> Line:
        """The function of what the lines hold, interval by interval."""
        breaks, rows = self.aligned(node, *lines)
        return self.checked(node, _joined([function(*row) for row in rows], breaks))

    def checked(self, node: ast.expr, line: Line) -> Line:
        for value in line.values:
            if _size(value, self.sizes) > LARGEST_EXPRESSION:
                raise self.refuse(node, f"has more than {LARGEST_EXPRESSION} terms written out: simplify the formula")
            if value.has(sympy.I, sympy.zoo, sympy.oo, sympy.nan):
                raise self.refuse(node, "is not a real number: keep roots and logarithms of positive numbers")
        return line

    def aligned(self, node: ast.expr, *lines: Line) -> tuple[list[Break], list[tuple[Any, ...]]]:
        """The breaks of all lines together, and what each line holds on each interval between them."""
        points = sorted({b.at for line in lines for b in line.breaks})
        if len(points) > MOST_BREAKS:
            raise self.refuse(node, f"has more than {MOST_BREAKS} breaks: simplify the formula")
        breaks = []
        for at in points:
            here = [(line, b.right_owns) for line in lines for b in line.breaks if b.at == at]
            owners = {owner for _, owner in here}
            if len(owners) > 1:
                owners = {owner for line, owner in here if _jumps(line, at)} or {False}
            if len(owners) > 1:
                raise self.refuse(
                    node, f"has a value of its own at x = {at}: let all conditions there be strict, or none"
                )
            breaks.append(Break(at, owners.pop()))
        starts = [None, *points]
        return breaks, [tuple(_right_of(line, start) for line in lines) for start in starts]

    def choice(self, node: ast.Call, name: str, lines: list[Line]) -> Line:
        """abs, maximum, minimum, relu and clip by conditions; where two are equal, the second one counts."""
        zero = Line((sympy.Integer(0),))
        count = {"abs": 1, "relu": 1, "maximum": 2, "minimum": 2, "clip": 3}[name]
        if len(lines) != count:
            raise self.refuse(node, f"has {len(lines)} arguments: {name} takes {count}")
        match name:
            case "abs":
                negative = self.each(node, lambda a: -a, lines[0])
                return self.where(node, self.comparison(node, ast.Gt(), lines[0], zero), lines[0], negative)
            case "relu":
                return self.where(node, self.comparison(node, ast.Gt(), lines[0], zero), lines[0], zero)
            case "maximum":
                return self.where(node, self.comparison(node, ast.Gt(), *lines), *lines)
            case "minimum":
                return self.where(node, self.comparison(node, ast.Lt(), *lines), *lines)
        u, low, high = lines
        above = self.where(node, self.comparison(node, ast.Gt(), u, high), high, u)
        return self.where(node, self.comparison(node, ast.Lt(), u, low), low, above)

    def where(self, node: ast.expr, condition: Line, yes: Line, no: Line) -> Line:
        breaks, rows = self.aligned(node, condition, yes, no)
        return self.checked(node, _joined([a if truth else b for truth, a, b in rows], breaks))

    def comparison(self, node: ast.expr, operator: ast.cmpop, left: Line, right: Line) -> Line:
        """Where left > right (or >=, <, <=) holds, the difference being a straight line on each interval."""
        breaks, rows = self.aligned(node, left, right)
        if not isinstance(operator, ast.Gt | ast.GtE | ast.Lt | ast.LtE):
            raise self.refuse(node, "is not allowed in a formula: compare with >, >=, < or <=")
        flip = -1 if isinstance(operator, ast.Lt | ast.LtE) else 1
        strict = isinstance(operator, ast.Gt | ast.Lt)

        def holds(sign: int) -> bool:
            return sign * flip > 0 or (sign == 0 and not strict)

        gaps = [a - b for a, b in rows]
        truths: list[bool] = []
        cuts: list[Break] = []
        ends = [None, *(b.at for b in breaks), None]
        for i, gap in enumerate(gaps):
            low, high = ends[i], ends[i + 1]
            slope = sympy.diff(gap, X)
            if slope.has(X):
                raise self.refuse(node, NOT_AFFINE)
            direction = self.sign(node, slope)
            if direction == 0:
                truths.append(holds(self.sign(node, gap.subs(X, 0))))
            else:
                zero = sympy.expand(-gap.subs(X, 0) / slope)
                if not zero.is_Rational:
                    raise self.refuse(
                        node, f"changes at {str(zero)[:40]}, which is no rational number: write it in decimals"
                    )
                at = Fraction(int(zero.p), int(zero.q))
                if low is not None and at <= low:
                    truths.append(holds(direction))
                elif high is not None and at >= high:
                    truths.append(holds(-direction))
                else:
                    truths += [holds(-direction), holds(direction)]
                    cuts.append(Break(at, holds(direction) == holds(0)))
            if high is not None:
                owner = gaps[i + 1] if breaks[i].right_owns else gap
                at_break = holds(self.sign(node, owner.subs(X, rational(high))))
                after = gaps[i + 1]
                first = self.first_truth(node, after, high, ends[i + 2], holds)
                if at_break not in (truths[-1], first):
                    raise self.refuse(node, f"singles out the point x = {high}: let the condition hold on an interval")
                cuts.append(Break(high, at_break == first))
        return _joined(truths, cuts)

    def first_truth(
        self, node: ast.expr, gap: sympy.Expr, low: Fraction, high: Fraction | None, holds: Callable[[int], bool]
    ) -> bool:
        """The truth just right of a break."""
        sign = self.sign(node, gap.subs(X, rational(low)))
        return holds(sign if sign else self.sign(node, sympy.diff(gap, X)))

    def sign(self, node: ast.expr, number: sympy.Expr) -> int:
        """Sign of a constant."""
        if number == 0:
            return 0
        with precision(1000):
            ball = evaluate(number, None, ARB)
            if ball > 0:
                return 1
            if ball < 0:
                return -1
        raise self.refuse(node, "compares two numbers that are equal, or nearly so: write the number in decimals")

    def number(self, node: ast.Constant) -> sympy.Expr:
        digits = self.text[node.col_offset : node.end_col_offset]
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise self.refuse(node, f"is not a number: {ALLOWED}")
        try:
            size = abs(Decimal(digits).adjusted())
        except InvalidOperation:
            raise self.refuse(node, "is not a decimal number: write it like 0.044715 or 1e-3") from None
        if len(digits) > LONGEST_NUMBER:
            raise self.refuse(node, f"is too long: write at most {LONGEST_NUMBER} digits")
        if size > LARGEST_POWER_OF_TEN:
            raise self.refuse(node, f"is too large or too small: use 0 and numbers {SCALE}")
        return rational(Fraction(digits))

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


def _is_condition(line: Line) -> bool:
    return bool(line.values) and isinstance(line.values[0], bool)


def _joined(values: list[Any], breaks: list[Break]) -> Line:
    """The line without breaks between equal neighbours."""
    kept, joined = [values[0]], []
    for value, border in zip(values[1:], breaks, strict=True):
        if value != kept[-1]:
            kept.append(value)
            joined.append(border)
    return Line(tuple(kept), tuple(joined))


def _right_of(line: Line, start: Fraction | None) -> Any:
    """What the line holds just right of a number (of -infinity for None)."""
    return line.values[0 if start is None else sum(b.at <= start for b in line.breaks)]


def _jumps(line: Line, at: Fraction) -> bool:
    """Whether the two sides of a break differ at the break itself."""
    after = next(i for i, b in enumerate(line.breaks, start=1) if b.at == at)
    left, right = line.values[after - 1 : after + 1]
    if isinstance(left, bool):
        return True
    gap = (right - left).subs(X, rational(at))
    if gap == 0:
        return False
    with precision(1000):
        return not evaluate(gap, None, ARB).contains(0)


def _size(expression: sympy.Expr, sizes: dict[sympy.Expr, int]) -> int:
    """Nodes of the expression's tree, counted without walking shared parts twice."""
    known = sizes.get(expression)
    if known is None:
        known = sizes[expression] = 1 + sum(_size(argument, sizes) for argument in expression.args)
    return known


def _tower(expression: sympy.Expr) -> int:
    """How deep exp is nested in an expression, less the logarithms around it."""
    inner = max(map(_tower, expression.args), default=0)
    if isinstance(expression, sympy.log | log1p):
        return max(inner - 1, 0)
    return inner + isinstance(expression, sympy.exp | expm1)


def _bits(expression: sympy.Expr) -> int:
    """Size of the rational number that an expression is, or is multiplied by."""
    coefficient = expression.as_coeff_Mul()[0]
    if not coefficient.is_Rational:
        return 0
    return max(int(coefficient.p).bit_length(), int(coefficient.q).bit_length())
