"""Activations whose derivative follows from the output by a formula, for any parameters that torch takes.

A `Form` is an activation with its parameters put in. From it comes the scheme of each format: float32 and float64 use
the formula; the 16-bit formats a table calibrated on the forward, because the exact inverse of a rounded output can err
twice as much as the best answer. Where the output does not tell the derivative for these parameters, a side bit does.
Must not know autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from invref import native
from invref.errors import FormulaError
from invref.formats import BY_DTYPE
from invref.kernels import codes, slopes
from invref.kernels.codes import Forward, Slope
from invref.kernels.scheme import BitsOnly, Coded, CodeOf, Gradient, Scheme, Tabled

FORMS = 256
"""How many activations with different parameters are remembered."""
TABLES = 16
"""How many of their tables, of a quarter or half a MiB each; of learnt parameters only the latest."""
CLOSED, TABLE = "closed form", "table of all codes"

keep = lru_cache(maxsize=FORMS)


@dataclass(frozen=True, eq=False)
class Form:
    """An activation with its parameters.

    slope: f' in float64; gradient: f' from float32 or float64 outputs and side codes; turning: (x*, y*) of a smooth
    turning point, around which float32 outputs are decoded by table; slices: whether the forward's scalar tail may
    round otherwise than its vector code; shares: df/dp of each learnt parameter p in float64; curve: f'' of float64
    inputs, where 16-bit outputs are decoded by table; bend: f'' of float64 outputs and side codes.
    """

    forward: Forward
    slope: Slope
    gradient: Gradient | None = None
    bits: int = 0
    code_of: CodeOf | None = None
    breaks: tuple[float, ...] = ()
    turning: tuple[float, float] | None = None
    kind: str = CLOSED
    slices: bool = True
    shares: tuple[Slope, ...] = ()
    curve: Slope | None = None
    bend: Gradient | None = None

    def scheme(self, dtype: torch.dtype) -> Scheme:
        """How tensors of this dtype are decoded."""
        if BY_DTYPE[dtype].bits == 16:
            return Tabled(TABLE, partial(table, self, dtype), self.bits, self.code_of)
        assert self.gradient is not None
        gradient = self.gradient
        if dtype == torch.float32 and self.turning is not None:
            gradient = partial(_with_lowest, self)
        return Coded(self.kind, gradient, self.bits, self.code_of)


Where = ParamSpec("Where")
Made = TypeVar("Made")


def _kept(make: Callable[Concatenate[Form, Where], Made]) -> Callable[Concatenate[Form, Where], Made]:
    """Remembers what was made for a form; where parameters are learnt, so that it serves one step, only the latest."""
    lasting = lru_cache(maxsize=TABLES)(make)
    latest: dict[object, tuple[Form, Made]] = {}

    @wraps(make)
    def kept(form: Form, /, *args: Where.args, **kwargs: Where.kwargs) -> Made:
        if not form.shares:
            return lasting(form, *args, **kwargs)  # type: ignore[arg-type]
        held = latest.get(args)
        if held is None or held[0] is not form:
            held = latest[args] = (form, make(form, *args, **kwargs))
        return held[1]

    return kept


@_kept
def tables(form: Form, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tables of f' and of the shares, of shape (1 + shares, sides, 65536)."""
    wanted = (form.slope, *form.shares)
    sides = 1 << form.bits
    with plainly(device):
        return codes.tables(form.forward, wanted, form.code_of, sides, dtype, device, form.breaks, form.slices)


@_kept
def lowest(form: Form, device: torch.device, span: int = codes.SPAN) -> codes.Lowest:
    """The table for outputs within `span` ulp of the turning value of a form that has one."""
    assert form.turning is not None
    sides = 1 << form.bits
    with plainly(device):
        return codes.lowest(
            form.forward, form.slope, form.code_of, sides, *form.turning, device, span=span, slices=form.slices
        )


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """For tabulating a forward in its own format: backward may run under autocast and another default device."""
    with torch.autocast(device.type, enabled=False), torch.device("cpu"):
        yield


def table(form: Form, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table of f', of shape (sides, 65536)."""
    return tables(form, dtype, device)[0]


def _with_lowest(form: Form, y: Tensor, side: Tensor | None) -> Tensor:
    assert form.gradient is not None
    return lowest(form, y.device).replace(form.gradient(y, side), y, side)


def finite(name: str, **parameters: float) -> None:
    """FormulaError for infinite parameters and NaN, of which outputs tell nothing."""
    for key, value in parameters.items():
        if not math.isfinite(value):
            raise FormulaError(f"{name} with {key}={value} has no decoder: use a finite {key}, or torch's own layer")


# Exponential units


STEEPEST = 1024.0
"""The largest slope of an exponential unit at 0: the gradient's error, relative to it, is an ulp of 1."""


@keep
def elu(alpha: float, scale: float = 1.0, input_scale: float = 1.0, forward: Forward | None = None) -> Form:
    """torch's ELU and its kin: scale * x, and on the left scale * alpha * expm1(input_scale * x).

    Left outputs are above 0 where alpha * input_scale < 0: then a side bit tells the sides apart. FormulaError for
    parameters that are not finite, or with a slope at 0 beyond 1024.
    """
    finite("elu", alpha=alpha)
    total = scale * alpha
    if abs(total * input_scale) > STEEPEST:
        raise FormulaError(
            f"alpha={alpha} makes outputs so large that they lose the gradient: use at most {STEEPEST:.0f} in size, "
            "or torch's own layer"
        )
    mixed = alpha * input_scale < 0

    def left(y: Tensor) -> Tensor:
        slope = input_scale * (y + total)
        # Rounding may carry y past its limit; the sign of f' never changes.
        return slope.clamp(min=0) if total * input_scale >= 0 else slope.clamp(max=0)

    def gradient(y: Tensor, side: Tensor | None) -> Tensor:
        right = y > 0 if side is None else side.bool()
        return torch.where(right, scale, left(y))

    return Form(
        forward or partial(functional.elu, alpha=alpha),
        lambda x: slopes.elu(x, alpha, scale, input_scale),
        gradient,
        bits=int(mixed),
        code_of=(lambda x: x > 0) if mixed else None,
        breaks=(0.0,),
        curve=lambda x: slopes.elu_curve(x, alpha, scale, input_scale),
        bend=lambda y, side: torch.where(y > 0 if side is None else side.bool(), 0.0, input_scale * left(y)),
    )


@keep
def celu(alpha: float) -> Form:
    """CELU: x, and on the left alpha * expm1(x / alpha); FormulaError for alpha = 0 and for infinite or NaN alpha."""
    finite("celu", alpha=alpha)
    if alpha == 0:
        raise FormulaError("celu divides by alpha=0: use another alpha, or relu")
    return elu(alpha, 1.0, 1 / alpha, partial(functional.celu, alpha=alpha))


@keep
def selu() -> Form:
    """SELU with the constants that torch has."""
    return elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0, functional.selu)


# Smooth gates of one piece


SMOOTH = 20.0
"""From this threshold on softplus and its linear part meet within 2e-9, so that the output tells them apart."""


@keep
def softplus(beta: float, threshold: float) -> Form:
    """Softplus; a threshold below 20 makes outputs ambiguous, which a side bit resolves; FormulaError for beta = 0.

    So it is for an infinite beta and NaN.
    """
    finite("softplus", beta=beta)
    if beta == 0:
        raise FormulaError("softplus divides by beta=0: use another beta")
    linear = threshold < SMOOTH

    def code_of(x: Tensor) -> Tensor:
        return (x.float() if x.dtype != torch.float64 else x) * beta > threshold

    def gradient(y: Tensor, side: Tensor | None) -> Tensor:
        above = y * beta > threshold if side is None else side.bool()
        return torch.where(above, 1.0, -torch.expm1(-beta * y))

    def bend(y: Tensor, side: Tensor | None) -> Tensor:
        above = y * beta > threshold if side is None else side.bool()
        return torch.where(above, 0.0, -beta * torch.exp(-beta * y) * torch.expm1(-beta * y))

    return Form(
        partial(functional.softplus, beta=beta, threshold=threshold),
        lambda x: slopes.softplus(x, beta, threshold),
        gradient,
        bits=int(linear),
        code_of=code_of if linear else None,
        breaks=(threshold / beta,),
        curve=lambda x: slopes.softplus_curve(x, beta, threshold),
        bend=bend,
    )


@keep
def softsign() -> Form:
    """Softsign: (1 - |y|)^2."""
    return Form(
        functional.softsign,
        slopes.softsign,
        lambda y, _: (1 - y.abs()).square(),
        curve=slopes.softsign_curve,
        bend=lambda y, _: -2 * torch.sign(y) * (1 - y.abs()) ** 3,
    )


@keep
def logsigmoid() -> Form:
    """Log-sigmoid: 1 - exp(y)."""
    return Form(
        functional.logsigmoid,
        lambda x: torch.sigmoid(-x),
        lambda y, _: -torch.expm1(y),
        curve=lambda x: -torch.sigmoid(x) * torch.sigmoid(-x),
        bend=lambda y, _: torch.exp(y) * torch.expm1(y),
    )


@keep
def sqrtsoftplus() -> Form:
    """The root of softplus: (1 - exp(-y^2)) / (2 y), and 1 / (2 y) where softplus is linear."""

    def gradient(y: Tensor, _: Tensor | None) -> Tensor:
        square = y * y
        gate = torch.where(square > SMOOTH, 1.0, -torch.expm1(-square))
        # Below 1e-10 the square may underflow, and the quotient is y / 2.
        return torch.where(y < 1e-10, y / 2, gate / (2 * y))

    def bend(y: Tensor, _: Tensor | None) -> Tensor:
        square = y * y
        gate = torch.where(square > SMOOTH, 1.0, -torch.expm1(-square))
        return torch.where(y < 1e-10, y / 4, gate * ((1 - gate) - gate / (2 * square)) / (2 * y))

    return Form(
        native.sqrtsoftplus,
        slopes.sqrtsoftplus,
        gradient,
        breaks=(SMOOTH,),
        curve=slopes.sqrtsoftplus_curve,
        bend=bend,
    )


@keep
def laplace(mu: float, sigma: float) -> Form:
    """The normal distribution function: its density at the quantile; FormulaError for sigma = 0.

    So it is for infinite parameters and NaN.
    """
    finite("laplace", mu=mu, sigma=sigma)
    if sigma == 0:
        raise FormulaError("laplace divides by sigma=0: use another sigma")

    def gradient(y: Tensor, _: Tensor | None) -> Tensor:
        z = torch.special.ndtri(y.double())
        return (torch.exp(-z * z / 2) / (sigma * math.sqrt(2 * math.pi))).to(y.dtype)

    def bend(y: Tensor, _: Tensor | None) -> Tensor:
        return slopes.laplace_curve(torch.special.ndtri(y), 0.0, 1.0) / (sigma * sigma)

    return Form(
        partial(native.laplace, mu=mu, sigma=sigma),
        lambda x: slopes.laplace(x, mu, sigma),
        gradient,
        curve=lambda x: slopes.laplace_curve(x, mu, sigma),
        bend=bend,
    )


@keep
def _relu2(sided: bool) -> Form:
    return Form(
        native.relu2,
        slopes.relu2,
        lambda y, _: 2 * torch.sqrt(y).clamp(max=torch.finfo(y.dtype).max / 4),
        bits=int(sided),
        code_of=(lambda x: x > 0) if sided else None,
        breaks=(0.0,),
        # No curve, and so no table: of inputs whose square underflows the middle of 0 and 2 would be nobody's.
        bend=lambda y, side: torch.where(y > 0 if side is None else side.bool(), torch.full_like(y, 2.0), 0.0),
    )


def relu2_form(dtype: torch.dtype) -> Form:
    """The square of relu: 2 sqrt(y). Outputs that overflow give a finite gradient.

    float16 takes a side bit: squares of inputs up to 1.7e-4 underflow there, whose gradient the plateau must not share.
    """
    return _relu2(dtype == torch.float16)


def relu2(dtype: torch.dtype) -> Scheme:
    """The scheme of `relu2_form`."""
    return relu2_form(dtype).scheme(dtype)


@keep
def hardswish() -> Form:
    """Hard swish: the root of its quadratic; a side bit tells the sides of -3/2 apart."""

    def code_of(x: Tensor) -> Tensor:
        # NaN counts as right, where it stays NaN; -inf, whose output is NaN, as left, where it gives 0.
        return ~(x <= -1.5)

    def gradient(y: Tensor, side: Tensor | None) -> Tensor:
        assert side is not None
        root = torch.sqrt((y + 0.375).clamp(min=0) * (2 / 3))
        return torch.where(side.bool(), torch.where(y > 3, 1.0, root), torch.where(y < 0, -root, 0.0))

    def bend(y: Tensor, side: Tensor | None) -> Tensor:
        assert side is not None
        return torch.where(torch.where(side.bool(), y <= 3, y < 0), torch.full_like(y, 1 / 3), 0.0)

    return Form(
        functional.hardswish,
        slopes.hardswish,
        gradient,
        1,
        code_of,
        breaks=(-3.0, 3.0),
        turning=(-1.5, -0.375),
        curve=slopes.hardswish_curve,
        bend=bend,
    )


# Derivatives of few values


Exact = Callable[[Tensor], Tensor]


def _exactly(values: Exact) -> Scheme:
    """y alone tells the derivative, in every format: no table."""

    def gradient(y: Tensor, _: Tensor | None) -> Tensor:
        return values(y).to(torch.float64 if y.dtype == torch.float64 else torch.float32)

    return Coded(CLOSED, gradient, dead=True)


def _rounded(bound: float, dtype: torch.dtype) -> float:
    """A bound as the format holds it, which is how the forward returns it."""
    return float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype))


def _single(bound: float) -> float:
    return _rounded(bound, torch.float32)


@keep
def leaky_relu(negative_slope: float) -> Scheme:
    """1 above 0, else the slope; a negative slope makes all outputs positive: a side bit instead of the output."""
    if negative_slope < 0:
        return BitsOnly((negative_slope, 1.0), lambda x: x > 0)

    def values(y: Tensor) -> Tensor:
        slope = torch.tensor(negative_slope, dtype=torch.float64, device=y.device)
        return torch.where(y > 0, torch.ones_like(slope), slope)

    return _exactly(values)


@keep
def hardtanh(min_val: float, max_val: float, dtype: torch.dtype) -> Scheme:
    """1 strictly between the bounds, else 0; a side bit where a bound is rounded onto an input between them."""
    low, high = _rounded(min_val, dtype), _rounded(max_val, dtype)
    if BY_DTYPE[dtype].bits == 16 and (low > _single(min_val) or high < _single(max_val)):
        return BitsOnly((0.0, 1.0), lambda x: (x.float() > min_val) & (x.float() < max_val))
    # On the CPU torch's vector code gives 0 for NaN and its scalar code 1.
    return _exactly(lambda y: (y > low) & (y < high))


@keep
def threshold(threshold: float, value: float, dtype: torch.dtype) -> Scheme:
    """0 where the output is the value, else 1; a value above the threshold hides which: a side bit instead."""

    def above(v: Tensor) -> Tensor:
        return ~((v if v.dtype == torch.float64 else v.float()) <= threshold)

    # A value of NaN, which is not below the threshold either, takes the side bit.
    if not _rounded(value, dtype) <= (threshold if dtype == torch.float64 else _single(threshold)):
        return BitsOnly((0.0, 1.0), above)
    return _exactly(above)


@keep
def hardsigmoid() -> Scheme:
    """1/6 strictly between -3 and 3, else 0, by a side bit: outputs near the edges round to 0 and 1."""
    return BitsOnly((0.0, 1 / 6), lambda x: (x > -3) & (x < 3))


@keep
def hardshrink(lambd: float) -> Scheme:
    """0 where the output is 0, else 1; always 1 for a negative lambd, which shrinks nothing.

    FormulaError for NaN, with which torch's vector code and its scalar code differ.
    """
    if math.isnan(lambd):
        finite("hardshrink", lambd=lambd)
    return _exactly(lambda y: torch.ones_like(y) if lambd < 0 else y != 0)


@keep
def softshrink(lambd: float) -> Scheme:
    """0 where the output is 0, else 1; FormulaError for a negative lambd, as torch has it."""
    if lambd < 0:
        raise FormulaError(f"lambd={lambd} is negative: softshrink takes 0 or more")
    return _exactly(lambda y: y != 0)
