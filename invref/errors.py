"""The error classes. Every message says what was wrong with which value, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = {
    "flint": "python-flint", "llvmlite": "llvmlite", "matplotlib": "matplotlib", "mpmath": "mpmath", "numba": "numba",
    "rich": "rich", "sympy": "sympy", "triton": "triton",
}  # fmt: skip
"""Modules that some features need and others do not, and the packages that bring them."""


class InvrefError(Exception):
    """Base class of every error that invref raises on purpose."""


class FormulaError(InvrefError, ValueError):
    """A formula that cannot be understood or cannot be used."""


class RangeError(InvrefError, ValueError):
    """A value outside the range on which the asked quantity exists."""


class InputError(InvrefError, TypeError):
    """A tensor whose type the layers do not take."""


class ProofError(InvrefError):
    """A bound that could not be proved."""


class TableError(InvrefError):
    """A decoder table that is damaged."""


class TwiceError(InvrefError, NotImplementedError):
    """A second derivative, which the decoders do not give."""


class MissingError(InvrefError, ImportError):
    """A package that is not installed, for a feature that needs it."""


@contextmanager
def needing(feature: str) -> Iterator[None]:
    """Imports that `feature` cannot do without: MissingError, which says what to install, where one fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = OPTIONAL.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise MissingError(f"{feature} needs {package}: pip install {package}") from error
