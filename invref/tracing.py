"""From a Python function of one variable to the text of its formula: the function is called once, with a symbol.

The symbol takes +, -, *, /, ** and comparisons with numbers; this module has the functions (exp, log, erf, tanh, sqrt,
maximum, where, and all other names of the formula language), and torch's and torch.nn.functional's own functions of
the same names are understood, too. The text then goes through the same checks as any other. Must not know them.

    from invref import tracing as m
    invref.from_formula(lambda x: x * m.erf(m.log(1 + m.exp(x))), name="serf")
    invref.from_formula(lambda x: x * torch.tanh(torch.nn.functional.softplus(x)), name="mish2")
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from invref.errors import FormulaError
from invref.formulas import CATALOGUE, MACROS
from invref.language import CHOICES, FUNCTIONS, LONGEST_TEXT, OTHER_NAMES

CALLABLE = frozenset((*FUNCTIONS, *CHOICES, *OTHER_NAMES, *MACROS))
SPELLINGS = {"special_erfc": "erfc", "special_expm1": "expm1", "special_log1p": "log1p", "absolute": "abs"}
"""torch's names that the language spells differently."""


class Traced:
    """A formula's text under construction."""

    __array_ufunc__ = None

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEXT:
            raise FormulaError(f"the function writes more than {LONGEST_TEXT} characters: simplify it")
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __bool__(self) -> bool:
        raise FormulaError(f"{self.text[:60]!r} is not known to be true or false: use where(condition, a, b), not `if`")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in CALLABLE:
            raise AttributeError(f"a traced variable has no attribute {name!r}")
        return lambda *others, **options: call(name, self, *others, **options)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Traced:
        """torch's functions called with a traced variable."""
        name = getattr(function, "__name__", str(function))
        return call(SPELLINGS.get(name, name), *args, **(kwargs or {}))

    def __neg__(self) -> Traced:
        return Traced(f"(-{self.text})")

    def __pos__(self) -> Traced:
        return self

    def __abs__(self) -> Traced:
        return call("abs", self)

    def __add__(self, other: Any) -> Traced:
        return _binary(self, "+", other)

    def __radd__(self, other: Any) -> Traced:
        return _binary(other, "+", self)

    def __sub__(self, other: Any) -> Traced:
        return _binary(self, "-", other)

    def __rsub__(self, other: Any) -> Traced:
        return _binary(other, "-", self)

    def __mul__(self, other: Any) -> Traced:
        return _binary(self, "*", other)

    def __rmul__(self, other: Any) -> Traced:
        return _binary(other, "*", self)

    def __truediv__(self, other: Any) -> Traced:
        return _binary(self, "/", other)

    def __rtruediv__(self, other: Any) -> Traced:
        return _binary(other, "/", self)

    def __pow__(self, other: Any) -> Traced:
        return _binary(self, "**", other)

    def __rpow__(self, other: Any) -> Traced:
        return _binary(other, "**", self)

    def __gt__(self, other: Any) -> Traced:
        return _binary(self, ">", other)

    def __ge__(self, other: Any) -> Traced:
        return _binary(self, ">=", other)

    def __lt__(self, other: Any) -> Traced:
        return _binary(self, "<", other)

    def __le__(self, other: Any) -> Traced:
        return _binary(self, "<=", other)


def call(name: str, *arguments: Any, **options: Any) -> Traced:
    """The function of that name, applied; FormulaError when the formula language does not have it."""
    if name not in CALLABLE:
        names = ", ".join((*FUNCTIONS, *CHOICES, *CATALOGUE))
        raise FormulaError(f"{name[:60]}() is not known: use {names}")
    written = [_text(argument) for argument in arguments]
    approximate = options.pop("approximate", "none")
    if name == "gelu" and approximate == "tanh":
        name = "gelu_tanh"
    options.pop("inplace", None)
    written += [f"{key}={_text(value)}" for key, value in options.items()]
    return Traced(f"{name}({', '.join(written)})")


def _binary(left: Any, operator: str, right: Any) -> Traced:
    return Traced(f"({_text(left)} {operator} {_text(right)})")


def _text(value: Any) -> str:
    if isinstance(value, Traced):
        return value.text
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise FormulaError(f"{str(value)[:60]!r} is neither a number nor made of x: use Python numbers")
    return f"({value!r})" if value < 0 else str(value) if isinstance(value, int) else repr(float(value))


def trace(function: Callable[..., Any]) -> str:
    """The formula's text of a function of one variable; FormulaError when it does not give one."""
    try:
        result = function(Traced("x"))
    except FormulaError:
        raise
    except Exception as error:
        raise FormulaError(
            f"the function could not be traced ({type(error).__name__}: {str(error)[:120]}): "
            "use operators and the functions of invref.tracing"
        ) from error
    return _text(result)


def __getattr__(name: str) -> Any:
    if name == "pi":
        return Traced("pi")
    if name.startswith("_") or name not in CALLABLE:
        raise AttributeError(f"invref.tracing has no {name!r}: use {', '.join((*FUNCTIONS, *CHOICES))}")
    return lambda *arguments, **options: call(name, *arguments, **options)
