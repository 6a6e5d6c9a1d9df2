"""Signs of expressions over boxes, out to where everything underflows: proofs that a derivative has no zero.

In a tail f' is a tiny positive factor times something of clear sign. So signs are read from the structure first (a
product has its factors' signs, exp is positive), then from intervals, then from the sum divided by its dominant
exponential, after each function in it was written as exp(phase) times a slowly varying factor. This module must not
know what the expressions are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
from flint import arb

from invref.engines import INTERVALS, erfc, erfcx, evaluate, sigmoid, softplus
from invref.intervals import Interval
from invref.symbols import ODD, POSITIVE, log1p, softplusx

ZERO = sympy.Integer(0)
Scaled = tuple[sympy.Expr, sympy.Expr]
"""(phase, slow): exp(phase) * slow."""
EXPONENTIAL = (sympy.exp, sigmoid, softplus, erfc)
"""Functions that underflow in a tail."""
LARGEST_POWER = 64
LARGEST_TIDY = 80
"""Operations up to which an expression is brought over one denominator."""


class Box:
    """An interval of x with exact ends, and what has been found out on it."""

    def __init__(self, low: arb, high: arb) -> None:
        self.x = Interval(low, high)
        self.values: dict[sympy.Expr, Interval] = {}
        self.signs: dict[sympy.Expr, int] = {}

    def interval(self, expression: sympy.Expr) -> Interval:
        """All values of the expression over the box."""
        value: Interval = evaluate(expression, self.x, INTERVALS, self.values)
        return value

    def bounds(self, expression: sympy.Expr) -> Interval:
        """All values of the expression, as `interval`, or term by term with each term's exponentials together."""
        direct = self.interval(expression)
        total = Interval(arb(0), arb(0))
        for term in sympy.Add.make_args(expression):
            phase, slow = self._scaled(term)
            total = total + (
                self.interval(sympy.exp(phase)) * self.interval(slow) if phase != 0 else self.bounds_of(term)
            )
        return direct.meet(total)

    def bounds_of(self, term: sympy.Expr) -> Interval:
        """All values of one term, its sums bounded as `bounds` does."""
        if not term.is_Mul:
            return self.interval(term)
        result = Interval(arb(1), arb(1))
        for factor in term.args:
            result = result * (self.bounds(factor) if factor.is_Add else self.interval(factor))
        return result

    def sign(self, expression: sympy.Expr) -> int:
        """1 or -1 where the expression has that sign on the whole box, 0 when that is not known."""
        known = self.signs.get(expression)
        if known is None:
            known = self.signs[expression] = self._sign(expression)
        return known

    def defined(self, expression: sympy.Expr) -> bool:
        """Whether the expression is finite and smooth on the whole box, as far as is known."""
        if expression.is_Pow:
            base, exponent = expression.args
            fine = exponent.is_Integer and exponent > 0
            if not fine and not (self.sign(base) > 0 or (exponent.is_Integer and self.sign(base))):
                return False
        elif isinstance(expression, sympy.log | log1p):
            inner = expression.args[0] if isinstance(expression, sympy.log) else 1 + expression.args[0]
            if not self.sign(inner) > 0:
                return False
        return all(self.defined(argument) for argument in expression.args)

    def _sign(self, expression: sympy.Expr) -> int:
        if expression.is_Rational:
            return int(sympy.sign(expression))
        if expression.is_Mul:
            result = 1
            for factor in expression.args:
                result *= self.sign(factor)
                if not result:
                    break
            return result or self.interval(expression).sign
        if expression.is_Pow and expression.exp.is_Rational:
            sign = self.sign(expression.base)
            if expression.exp.is_Integer:
                return int(sign ** abs(int(expression.exp)))
            return 1 if sign > 0 else 0
        if isinstance(expression, POSITIVE):
            return 1
        if type(expression) in ODD:
            return self.sign(expression.args[0])
        if expression.is_Add:
            signs = {self.sign(term) for term in expression.args}
            if len(signs) == 1 and 0 not in signs:
                return signs.pop()
            return self.interval(expression).sign or self._scaled_sign(expression)
        return self.interval(expression).sign

    def _scaled_sign(self, expression: sympy.Expr) -> int:
        phase, slow = self._sum(expression)
        return self.interval(slow).sign if phase != 0 else 0

    def _sum(self, expression: sympy.Expr) -> Scaled:
        """A sum over its dominant exponential; phase 0 where it has none."""
        if not expression.has(*EXPONENTIAL):
            return ZERO, expression
        parts = [self._scaled(term) for term in expression.args]
        phases = list(dict.fromkeys(phase for phase, _ in parts))
        for dominant in phases:
            gaps = {phase: sympy.expand(phase - dominant) for phase in phases}
            if all(gap == 0 or self.interval(gap).high <= 1 for gap in gaps.values()):
                return dominant, sympy.Add(*(slow * sympy.exp(gaps[phase]) for phase, slow in parts))
        return ZERO, expression

    def _scaled(self, node: sympy.Expr) -> Scaled:
        """The node as exp(phase) times a factor that varies slowly over the box."""
        if not node.has(*EXPONENTIAL):
            return ZERO, node
        if node.is_Mul:
            parts = [self._scaled(factor) for factor in node.args]
            return sympy.Add(*(p for p, _ in parts)), sympy.Mul(*(s for _, s in parts))
        if node.is_Pow and node.exp.is_Rational:
            phase, slow = self._scaled(node.base)
            return node.exp * phase, slow**node.exp
        if node.is_Add:
            return self._sum(node)
        inner = node.args[0]
        values = self.interval(inner)
        if isinstance(node, sympy.exp):
            return (ZERO, node) if values.low > -1 and values.high < 1 else (inner, sympy.Integer(1))
        if isinstance(node, sigmoid) and values.high < -1:
            return inner, sigmoid(-inner)
        if isinstance(node, softplus) and values.high < -1:
            return inner, softplusx(inner)
        if isinstance(node, erfc) and values.low > 1:
            return -(inner**2), erfcx(inner)
        if type(node) in ODD and values.low > -0.5 and values.high < 1:
            phase, slow = self._scaled(inner)
            return phase, slow * ODD[type(node)](inner)
        return ZERO, node


@lru_cache(maxsize=256)
def tidy(expression: sympy.Expr) -> sympy.Expr:
    """The expression over one denominator, factored, where that is cheap: sums whose leading terms cancel exactly."""
    if sympy.count_ops(expression) > LARGEST_TIDY:
        return expression
    # sympy takes exp(p/q u) for the p-th power of exp(u/q): with such powers in the millions it never ends.
    awkward = [node for node in expression.atoms(sympy.exp) if any(_large(q) for q in node.atoms(sympy.Rational))]
    plain = {node: sympy.Dummy() for node in sorted(awkward, key=str)}
    result: Any = sympy.factor(sympy.together(expression.xreplace(plain)))
    return result.xreplace({dummy: node for node, dummy in plain.items()})


def _large(number: sympy.Rational) -> bool:
    return bool(max(abs(number.p), number.q) > LARGEST_POWER)
