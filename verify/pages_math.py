"""A formula in mathematical notation: MathML for pages, LaTeX for Markdown, from one expression tree.

Guarantees plain presentation MathML (no style, no fonts, no deprecated elements), that numbers are written exactly,
and the same text for the same expression. Must not know activations.
"""

from __future__ import annotations

from fractions import Fraction
from html import escape
from typing import Any

import sympy

Tree = tuple[Any, ...]
"""A node: its kind, then children or text. Kinds: number, symbol, operator, name, row, fraction, power, root, group,
cases."""

_LETTERS = {"sigmoid": "σ"}
_LATEX = {"σ": r"\sigma", "π": r"\pi", "·": r"\,", "−": "-", "≥": r"\ge ", "≤": r"\le "}
_KNOWN_LATEX = {"exp", "log", "tanh", "max", "min"}
_PLAIN_NAMES = {"Abs": "abs", "Max": "max", "Min": "min"}


def mathml(*lines: Tree) -> str:
    """The lines as one block of MathML."""
    rows = "".join(f"<mtr><mtd>{_mathml(line)}</mtd></mtr>" for line in lines)
    return f'<math><mtable displaystyle="true">{rows}</mtable></math>'


def latex(tree: Tree) -> str:
    """The same as LaTeX, without dollar signs."""
    return _latex(tree)


def equation(left: str, right: Tree) -> Tree:
    """left(x) = right, for a one-letter function name that may carry a prime."""
    return ("row", ("symbol", left), ("group", ("symbol", "x")), ("operator", "="), right)


def cases(branches: list[tuple[Tree, str]]) -> Tree:
    """A piecewise function: each branch and the condition in words such as "x ≤ 0"."""
    return ("cases", *(("row", branch, ("condition", condition)) for branch, condition in branches))


def tree(expression: Any) -> Tree:
    """The layout of a sympy expression."""
    if expression.is_Rational:
        return _rational(Fraction(int(expression.p), int(expression.q)))
    if expression.is_Symbol:
        return ("symbol", str(expression))
    if expression is sympy.pi:
        return ("symbol", "π")
    if expression is sympy.E:
        return ("symbol", "e")
    if expression.is_Add:
        return _sum(expression)
    if expression.is_Mul:
        return _product(expression)
    if expression.is_Pow:
        return _power(expression)
    if expression.func is sympy.exp:
        exponent = expression.args[0]
        return ("power", ("symbol", "e"), tree(exponent)) if _short(exponent) else _call("exp", exponent)
    return _call(expression.func.__name__, *expression.args)


def decimal(value: Fraction) -> str:
    """`value` as a fraction or a decimal number, whichever is what someone would write."""
    numerator, denominator = value.numerator, value.denominator
    twos_and_fives = denominator
    for prime in (2, 5):
        while twos_and_fives % prime == 0:
            twos_and_fives //= prime
    if denominator > 16 and twos_and_fives == 1:
        digits = next(k for k in range(4000) if 10**k % denominator == 0)
        scaled = abs(numerator) * 10**digits // denominator
        if digits <= 20:
            return f"{'-' * (numerator < 0)}{scaled // 10**digits}.{scaled % 10**digits:0{digits}}"
    return str(value)


def _rational(value: Fraction) -> Tree:
    if value < 0:
        return ("row", ("operator", "−"), _rational(-value))
    text = decimal(value)
    if "/" in text:
        return ("fraction", ("number", str(value.numerator)), ("number", str(value.denominator)))
    return ("number", text)


def _sum(expression: Any) -> Tree:
    terms = sorted(expression.args, key=lambda term: bool(term.could_extract_minus_sign()))
    parts: list[Tree] = []
    for term in terms:
        negative = bool(term.could_extract_minus_sign())
        if negative or parts:
            parts.append(("operator", "−" if negative else "+"))
        parts.append(_factor(-term, in_product=False) if negative else tree(term))
    return ("row", *parts)


def _product(expression: Any) -> Tree:
    coefficient, rest = expression.as_coeff_Mul()
    if coefficient.is_negative:
        return ("row", ("operator", "−"), tree(-expression))
    above: list[Any] = []
    below: list[Any] = []
    roots_above: list[Any] = []
    roots_below: list[Any] = []
    exact = Fraction(int(coefficient.p), int(coefficient.q)) if coefficient.is_Rational else Fraction(1)
    written = decimal(exact)
    if "/" in written:
        above += [sympy.Integer(exact.numerator)] if exact.numerator != 1 else []
        below.append(sympy.Integer(exact.denominator))
    elif exact != 1:
        above.append(coefficient)
    for factor in sympy.Mul.make_args(rest):
        if factor.is_Pow and abs(factor.exp) == sympy.Rational(1, 2) and not factor.free_symbols:
            (roots_above if factor.exp > 0 else roots_below).append(factor.base)
        elif factor.is_Pow and factor.exp.is_Rational and factor.exp < 0:
            below.append(factor.base**-factor.exp)
        else:
            above.append(factor)
    if len(roots_above) == 1 and not roots_below and below and below[0] % roots_above[0] == 0:
        # √2/2 is written 1/√2.
        below[0] //= roots_above[0]
        below = [b for b in below if b != 1]
        roots_above, roots_below = [], roots_above
    leading = [_root(roots_above, roots_below)] if roots_above and roots_below else []
    if not leading:
        above += [sympy.sqrt(base) for base in roots_above]
        below += [sympy.sqrt(base) for base in roots_below]
    top = _factors(_ordered(above), leading)
    return ("fraction", top, _factors(_ordered(below))) if below else top


def _root(above: list[Any], below: list[Any]) -> Tree:
    """Roots of constants over roots of constants, under one sign."""
    return ("root", ("fraction", _factors(_ordered(above)), _factors(_ordered(below))))


def _ordered(factors: list[Any]) -> list[Any]:
    """Numbers, then roots and π, then powers of x, then functions."""

    def rank(factor: Any) -> tuple[int, str]:
        if factor.is_Rational:
            return 0, ""
        if not factor.free_symbols:
            return 1, str(factor)
        base = factor.base if factor.is_Pow else factor
        return (2 if base.is_Symbol else 3 if base.is_Add else 4), str(factor)

    return sorted(factors, key=rank)


def _factors(factors: list[Any], roots: list[Tree] | None = None) -> Tree:
    """A product; `roots` stand behind the numbers."""
    if len(factors) + len(roots or []) == 1:
        return roots[0] if roots else tree(factors[0])
    numbers = [_factor(f) for f in factors if f.is_Rational]
    shown = [*numbers, *(roots or []), *(_factor(f) for f in factors if not f.is_Rational)]
    parts: list[Tree] = []
    for i, factor in enumerate(shown):
        parts += [("operator", "·"), factor] if i else [factor]
    return ("row", *parts) if parts else ("number", "1")


def _factor(expression: Any, in_product: bool = True) -> Tree:
    inner = tree(expression)
    if expression.is_Add or (in_product and expression.could_extract_minus_sign() and not expression.is_Function):
        return ("group", inner)
    return inner


def _power(expression: Any) -> Tree:
    base, exponent = expression.base, expression.exp
    if exponent.is_Rational and exponent < 0:
        return ("fraction", ("number", "1"), tree(base**-exponent))
    if exponent == sympy.Rational(1, 2):
        return ("root", tree(base))
    plain = base.is_Symbol or base is sympy.pi or (base.is_Integer and base >= 0)
    return ("power", tree(base) if plain else ("group", tree(base)), tree(exponent))


def _call(name: str, *arguments: Any) -> Tree:
    inner: list[Tree] = []
    for i, argument in enumerate(arguments):
        if i:
            inner.append(("operator", ","))
        inner.append(tree(argument))
    name = _PLAIN_NAMES.get(name, name)
    shown: Tree = ("symbol", _LETTERS[name]) if name in _LETTERS else ("name", name)
    return ("row", shown, ("group", ("row", *inner)))


def _short(exponent: Any) -> bool:
    return len(str(exponent)) <= 8


def _mathml(node: Tree) -> str:
    kind, children = node[0], node[1:]
    match kind:
        case "number":
            return f"<mn>{children[0]}</mn>"
        case "symbol":
            letter, prime = children[0].rstrip("′"), children[0].count("′")
            base = f"<mi>{escape(letter)}</mi>"
            return f"<msup>{base}<mo>{'′' * prime}</mo></msup>" if prime else base
        case "name":
            return f"<mi>{escape(children[0])}</mi>"
        case "operator":
            # An invisible times: neighbours are told apart by a little space.
            return '<mspace width="0.17em"/>' if children[0] == "·" else f"<mo>{escape(children[0])}</mo>"
        case "condition":
            return f"<mtext>{escape(children[0])}</mtext>"
        case "fraction":
            return f"<mfrac>{_mathml(children[0])}{_mathml(children[1])}</mfrac>"
        case "power":
            return f"<msup>{_mathml(children[0])}{_mathml(children[1])}</msup>"
        case "root":
            return f"<msqrt>{_mathml(children[0])}</msqrt>"
        case "group":
            return f"<mrow><mo>(</mo>{_mathml(children[0])}<mo>)</mo></mrow>"
        case "cases":
            rows = "".join(f"<mtr><mtd>{_mathml(r[1])}</mtd><mtd>{_mathml(r[2])}</mtd></mtr>" for r in children)
            # The style sheet draws the brace: few systems have a font whose braces grow.
            return f'<mtable class="cases">{rows}</mtable>'
    return f"<mrow>{''.join(map(_mathml, children))}</mrow>"


def _latex(node: Tree) -> str:
    kind, children = node[0], node[1:]
    match kind:
        case "number" | "symbol" | "operator":
            text = str(children[0])
            return _LATEX.get(text, text.replace("′", "'"))
        case "name":
            return f"\\{children[0]}" if children[0] in _KNOWN_LATEX else f"\\operatorname{{{children[0]}}}"
        case "condition":
            return "".join(_LATEX.get(letter, letter) for letter in children[0])
        case "fraction":
            return f"\\frac{{{_latex(children[0])}}}{{{_latex(children[1])}}}"
        case "power":
            return f"{_latex(children[0])}^{{{_latex(children[1])}}}"
        case "root":
            return f"\\sqrt{{{_latex(children[0])}}}"
        case "group":
            return f"\\left({_latex(children[0])}\\right)"
        case "cases":
            rows = r" \\ ".join(f"{_latex(r[1])} & {_latex(r[2])}" for r in children)
            return f"\\begin{{cases}} {rows} \\end{{cases}}"
    return " ".join(map(_latex, children))
