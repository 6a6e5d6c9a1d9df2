"""The functions that sympy lacks, or writes in a form that loses digits: names of the formula language.

Each knows its derivative as a product or a sum of positive terms, so that nothing cancels in a tail, and its value
at 0. This module must not know how anything is evaluated.
"""

from __future__ import annotations

import sympy


class sigmoid(sympy.Function):  # type: ignore[misc]  # noqa: N801 - the names are the formula language's
    """1 / (1 + exp(-z)); its derivative is a product, which keeps its relative accuracy in both tails."""

    @classmethod
    def eval(cls, z: sympy.Expr) -> sympy.Expr | None:
        """1/2 at 0."""
        return sympy.Rational(1, 2) if z == 0 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative sigmoid(z) sigmoid(-z)."""
        return sigmoid(self.args[0]) * sigmoid(-self.args[0])


class softplus(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """log(1 + exp(z))."""

    @classmethod
    def eval(cls, z: sympy.Expr) -> sympy.Expr | None:
        """log(2) at 0."""
        return sympy.log(2) if z == 0 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative sigmoid(z)."""
        return sigmoid(self.args[0])


class erfc(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """Complementary error function that, unlike sympy's, never rewrites erfc(-z) to the cancelling 2 - erfc(z)."""

    @classmethod
    def eval(cls, z: sympy.Expr) -> sympy.Expr | None:
        """1 at 0."""
        return sympy.Integer(1) if z == 0 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative -2/sqrt(pi) exp(-z²)."""
        return -2 * sympy.exp(-(self.args[0] ** 2)) / sympy.sqrt(sympy.pi)


class tanh(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """Hyperbolic tangent whose derivative is a product, not the cancelling 1 - tanh²."""

    @classmethod
    def eval(cls, z: sympy.Expr) -> sympy.Expr | None:
        """0 at 0; odd."""
        if z == 0:
            return sympy.Integer(0)
        return -tanh(-z) if z.could_extract_minus_sign() else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative 4 sigmoid(2z) sigmoid(-2z)."""
        return 4 * sigmoid(2 * self.args[0]) * sigmoid(-2 * self.args[0])


class expm1(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """exp(z) - 1."""

    @classmethod
    def eval(cls, z: sympy.Expr) -> sympy.Expr | None:
        """0 at 0."""
        return sympy.Integer(0) if z == 0 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative exp(z)."""
        return sympy.exp(self.args[0])


class log1p(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """log(1 + z)."""

    @classmethod
    def eval(cls, z: sympy.Expr) -> sympy.Expr | None:
        """0 at 0."""
        return sympy.Integer(0) if z == 0 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative 1 / (1 + z)."""
        return 1 / (1 + self.args[0])


class atanc(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """pi/2 - atan(z), the angle that is left: it keeps its digits as z goes to +infinity."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        """Derivative -1 / (1 + z²)."""
        return -1 / (1 + self.args[0] ** 2)


class erfcx(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """exp(z²) erfc(z), which decays like 1/z."""


class softplusx(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """exp(-z) softplus(z), which tends to 1 as z goes to -infinity."""


class tanhx(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """tanh(z) / z, and 1 at 0."""


class erfx(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """erf(z) / z, and 2/sqrt(pi) at 0."""


class atanx(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """atan(z) / z, and 1 at 0."""


class expm1x(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """expm1(z) / z, and 1 at 0."""


class log1px(sympy.Function):  # type: ignore[misc]  # noqa: N801
    """log1p(z) / z, and 1 at 0."""


POSITIVE = (sympy.exp, sigmoid, softplus, erfc, atanc, erfcx, softplusx, tanhx, erfx, atanx, expm1x, log1px)
"""Functions that are positive wherever they are defined."""
ODD = {tanh: tanhx, sympy.erf: erfx, sympy.atan: atanx, expm1: expm1x, log1p: log1px}
"""Functions with the sign of their argument, and each over its argument."""
