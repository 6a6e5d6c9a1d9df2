"""Rewrite an expression so that its accuracy in the tails does not depend on how the user happened to write it.

Sums that lose digits or overflow, such as log(1 + exp(x)), 1 + erf(x) or (exp(x) - exp(-x)) / (exp(x) + exp(-x)),
become the functions of `symbols`, exactly: the result is the same function. What has no such form stays as it is. This
module must not know any activation.
"""

from __future__ import annotations

from functools import lru_cache

import sympy

from invref.symbols import atanc, erfc, expm1, log1p, sigmoid, softplus, tanh

ONE = sympy.Integer(1)
MOST_TERMS = 12
"""Sums of more exponentials than this are left alone."""
Exponentials = dict[sympy.Expr, sympy.Rational]
"""A sum of exponentials: coefficient of exp(u), by u."""


@lru_cache(maxsize=4096)
def stable(expression: sympy.Expr) -> sympy.Expr:
    """The same function of x, written stably."""
    if not expression.args:
        return expression
    before = expression
    if expression.is_Mul:
        arguments = [_stable_factor(argument) for argument in expression.args]
    else:
        arguments = [stable(argument) for argument in expression.args]
    if any(new is not old for new, old in zip(arguments, expression.args, strict=True)):
        expression = expression.func(*arguments)
    if expression.is_Add:
        expression = _sum(expression)
    elif expression.is_Mul or expression.is_Pow:
        expression = _product(expression)
    elif isinstance(expression, sympy.log | log1p):
        expression = _logarithm(expression)
    return expression if expression == before else stable(expression)


def _stable_factor(factor: sympy.Expr) -> sympy.Expr:
    """A factor whose denominator still waits for what stands over it."""
    if factor.is_Pow and factor.exp.is_Rational and factor.exp < 0:
        return stable(factor.base) ** factor.exp
    return stable(factor)


def _logarithm(expression: sympy.Expr) -> sympy.Expr:
    inner = expression.args[0] + ONE if isinstance(expression, log1p) else expression.args[0]
    if isinstance(inner, sympy.exp):
        return inner.args[0]
    if isinstance(inner, sigmoid):
        return -softplus(-inner.args[0])
    parts = _positive(_exponentials(inner)) if inner.is_Add else None
    if parts is not None and len(parts) > 1:
        return _log_sum(parts)
    if inner.is_Add and inner.as_coeff_Add()[0] == 1:
        return log1p(inner - ONE)
    return expression


def _sum(expression: sympy.Expr) -> sympy.Expr:
    """1 + erf(u), 1 + tanh(u), 2 sigmoid(u) - 1, exp(u) - 1 and their multiples, where the constant meets its term."""
    for term in expression.args:
        coefficient, function = term.as_coeff_Mul()
        if isinstance(function, softplus):
            # softplus(u) - u = softplus(-u)
            rest = expression - term + coefficient * function.args[0]
            if len(sympy.Add.make_args(rest)) < len(expression.args) - 1 or rest == 0:
                return rest + coefficient * softplus(-function.args[0])
    for term in expression.args:
        function = next((f for f in sympy.Mul.make_args(term) if isinstance(f, sympy.atan)), None)
        if function is not None:
            # pi/2 + atan(u) = atanc(-u)
            half = term / function * sympy.pi / 2
            for sign in (1, -1):
                if sign * half in expression.args:
                    rest = expression - term - sign * half
                    return rest + sign * term / function * atanc(-sign * function.args[0])
    constant, rest = expression.as_coeff_Add()
    if constant == 0:
        return _common_factor(expression)
    for term in sympy.Add.make_args(rest):
        coefficient, function = term.as_coeff_Mul()
        better = _with_constant(constant, coefficient, function)
        if better is not None:
            return rest - term + better
    return expression


def _common_factor(expression: sympy.Expr) -> sympy.Expr:
    """x + x erf(u) as x (1 + erf(u)), where what is left in parentheses becomes one function."""
    factored = sympy.factor_terms(expression)
    if not factored.is_Mul:
        return expression
    factors = [(factor, stable(factor)) for factor in factored.args]
    if any(before.is_Add and not after.is_Add for before, after in factors):
        return sympy.Mul(*(after for _, after in factors))
    return expression


def _with_constant(constant: sympy.Rational, c: sympy.Rational, function: sympy.Expr) -> sympy.Expr | None:
    """constant + c * function in one piece."""
    if not function.args:
        return None
    u = function.args[0]
    match function:
        case sympy.erf():
            # 1 + erf(u) = erfc(-u)
            return constant * erfc(-u * c / constant) if abs(c) == abs(constant) else None
        case tanh():
            return 2 * constant * sigmoid(2 * u * c / constant) if abs(c) == abs(constant) else None
        case sigmoid():
            if c == -constant:
                return constant * sigmoid(-u)
            return c / 2 * tanh(u / 2) if c == -2 * constant else None
        case erfc():
            if c == -constant:
                return constant * sympy.erf(u)
            return constant / 2 * erfc(-u) if 2 * c == -constant else None
        case sympy.exp():
            return c * expm1(u) if c == -constant else None
    return None


def _product(expression: sympy.Expr) -> sympy.Expr:
    """Ratios of sums of exponentials: the denominator one by one, with all that stands over it."""
    factors = list(sympy.Mul.make_args(expression))
    for place, factor in enumerate(factors):
        base, exponent = factor.as_base_exp()
        if not (exponent.is_Rational and exponent < 0) or not base.has(sympy.exp, expm1):
            continue
        below = _positive(_exponentials(base))
        if below is None or len(below) < 2:
            continue
        others = factors[:place] + factors[place + 1 :]
        if exponent == -1:
            above, kept = ONE, []
            for other in others:
                if other.has(sympy.exp, expm1) and _exponentials(other) is not None:
                    above = above * other
                else:
                    kept.append(other)
            sums = _exponentials(above)
            if sums is not None:
                return sympy.Mul(*kept, _ratio(sums, below))
        # One of the terms, taken out as a whole, leaves a sigmoid: 1/(a + b) = sigmoid(log b - log a) / b.
        return sympy.Mul(*others, sympy.exp(exponent * _log_sum(below)))
    return _exponentials_together(factors)


def _exponentials_together(factors: list[sympy.Expr]) -> sympy.Expr:
    """The product with its exponentials made one, so that none overflows alone; exp(u) sigmoid(-u) is sigmoid(u)."""
    phases = [f.args[0] for f in factors if isinstance(f, sympy.exp)]
    rest = [f for f in factors if not isinstance(f, sympy.exp)]
    phase = sympy.Add(*phases)
    for place, factor in enumerate(rest):
        if phases and isinstance(factor, sigmoid) and factor.args[0] == -phase:
            return sympy.Mul(*rest[:place], sigmoid(phase), *rest[place + 1 :])
    return sympy.Mul(*rest, sympy.exp(phase)) if len(phases) > 1 else sympy.Mul(*factors)


def _ratio(above: Exponentials, below: Exponentials) -> sympy.Expr:
    """Σ a_i exp(u_i) / Σ b_i exp(u_i), the b_i positive."""
    share = {u: above.get(u, sympy.Integer(0)) / b for u, b in below.items()}
    levels = sorted(set(share.values()))
    if set(above) <= set(below) and len(levels) == 2:
        # c0 below + (c1 - c0) part: a constant, and a share of the whole.
        low, high = levels
        part = {u: below[u] for u in below if share[u] == high}
        rest = {u: below[u] for u in below if share[u] == low}
        gap = _log_sum(part) - _log_sum(rest)
        if low == -high:
            return high * tanh(gap / 2)
        if low == 0 or high == 0:
            return high * sigmoid(gap) + low * sigmoid(-gap)
    terms = []
    for u, a in above.items():
        if u in below:
            rest = {v: b for v, b in below.items() if v != u}
            terms.append(a / below[u] * sigmoid(u + sympy.log(below[u]) - _log_sum(rest)))
        else:
            terms.append(a * sympy.exp(u - _log_sum(below)))
    return sympy.Add(*terms)


def _log_sum(parts: Exponentials) -> sympy.Expr:
    """log Σ c exp(u), the c positive, by softplus."""
    (u, c), *rest = parts.items()
    result = u + sympy.log(c)
    for v, b in rest:
        result = result + softplus(v + sympy.log(b) - result)
    return result


def _exponentials(expression: sympy.Expr) -> Exponentials | None:
    """The expression as a sum of exponentials, multiplied out; None when it is none, or a long one."""
    if isinstance(expression, sympy.exp):
        return {expression.args[0]: ONE}
    if isinstance(expression, expm1):
        return {expression.args[0]: ONE, sympy.Integer(0): -ONE}
    if expression.is_Rational:
        return {sympy.Integer(0): expression}
    if expression.is_Add:
        result: Exponentials = {}
        for term in expression.args:
            part = _exponentials(term)
            if part is None:
                return None
            for u, c in part.items():
                result[u] = result.get(u, sympy.Integer(0)) + c
        return _short(result)
    if expression.is_Mul:
        result = {sympy.Integer(0): ONE}
        for factor in expression.args:
            part = _exponentials(factor)
            if part is None:
                return None
            result = _times(result, part)
        return _short(result)
    if expression.is_Pow and expression.exp.is_Integer and 0 < expression.exp <= MOST_TERMS:
        part = _exponentials(expression.base)
        if part is None:
            return None
        result = part
        for _ in range(int(expression.exp) - 1):
            result = _times(result, part)
            if len(result) > MOST_TERMS:
                return None
        return _short(result)
    return None


def _times(a: Exponentials, b: Exponentials) -> Exponentials:
    result: Exponentials = {}
    for u, c in a.items():
        for v, d in b.items():
            result[u + v] = result.get(u + v, sympy.Integer(0)) + c * d
    return result


def _short(parts: Exponentials) -> Exponentials | None:
    kept = {u: c for u, c in parts.items() if c != 0}
    return kept if len(kept) <= MOST_TERMS else None


def _positive(parts: Exponentials | None) -> Exponentials | None:
    return parts if parts and all(c > 0 for c in parts.values()) else None
