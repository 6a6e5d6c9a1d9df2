"""Activations whose inverse has no closed form: which decoder serves which format.

The 16-bit formats use a table calibrated on the forward, the wider ones a fitted decoder or, in float64, a solver. Must
not know autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from invref import bins, native
from invref.decoders import load
from invref.errors import FormulaError
from invref.formats import BY_DTYPE
from invref.kernels import binscheme, closed, codes, dispatch, gpu, naive, slopes, solve
from invref.kernels.closed import Form, keep
from invref.kernels.codes import Forward, Lowest, Slope
from invref.kernels.room import room
from invref.kernels.scheme import Plain, Scheme

ROOT = "polynomials in the signed root"
DIP = -0.16997
"""Just above the least value of GELU."""
SETTLED = 9.0
"""From here on GELU(x) rounds to x in every format, float64 included."""


def _sided(name: str, forward: Forward, slope: Slope, breaks: tuple[float, ...] = ()) -> Form:
    """A gate with one minimum: the side bit says whether x lies right of it."""
    decoder = load(name)
    return Form(
        forward,
        slope,
        bits=1,
        code_of=partial(naive.side_of, decoder),
        breaks=breaks,
        turning=(float(decoder.turning_x), float(decoder.turning_y)),
    )


QUICK_SCALE = 1.702
TANH_SCALE = 0.7978845608
"""sqrt(2 / pi) as `gelu_fast` rounds it."""

FORMS: dict[str, tuple[Forward, Slope]] = {
    "gelu": (functional.gelu, slopes.gelu),
    "gelu_tanh": (native.gelu_tanh, slopes.gelu_tanh),
    "silu": (functional.silu, slopes.silu),
    "mish": (functional.mish, slopes.mish),
    "quick_gelu": (native.quick_gelu, partial(slopes.silu, scale=QUICK_SCALE)),
    "gelu_new": (native.gelu_new, slopes.gelu_tanh),
    "gelu_fast": (native.gelu_fast, partial(slopes.gelu_tanh, scale=TANH_SCALE)),
}
"""The framework's forward of each gate, and f' of float64 inputs."""

INTO: dict[str, Callable[..., Tensor]] = {
    "gelu": torch.ops.aten.gelu.out,
    "gelu_tanh": partial(torch.ops.aten.gelu.out, approximate="tanh"),
    "silu": torch.ops.aten.silu.out,
    "mish": torch.ops.aten.mish.out,
}
"""The forwards of torch that write to where they are told, each the same as its function."""

COARSE = ("mish",)
"""Whose float32 forward errs by more around the turning value than a clamp can answer for, on some processor."""
CLAMPED = 4.0
"""By so many ulp the forward of any other gate may err for the clamp, which reaches twice as far."""


@keep
def _form(name: str) -> Form:
    return _sided(name, *FORMS[name])


@lru_cache(maxsize=closed.TABLES)
def _lowest(name: str, device: torch.device) -> Lowest | None:
    """The table for float32 outputs around the turning value, where the forward errs too much there for the clamp.

    It reaches twice as far as the forward errs: from there on the exact inverse of an output errs less than the floor.
    """
    form = _form(name)
    assert form.turning is not None
    with closed.plainly(device):
        error = codes.astray(form.forward, *form.turning, device)
    if name not in COARSE and error <= CLAMPED:
        return None
    return closed.lowest(form, device, max(codes.SPAN, math.ceil(2 * error)))


@dataclass(frozen=True)
class Gate:
    """A gate with one minimum: the same side bit in every format and on every device, decoded as suits them best.

    In 16 bit by a table of all outputs, in float64 by Newton's method, else by the decoder that ships.
    """

    name: str
    dtype: torch.dtype
    bits: int = field(default=1, init=False)
    keeps_output: bool = field(default=True, init=False)

    @property
    def kind(self) -> str:
        """The decoder in two or three words."""
        if BY_DTYPE[self.dtype].bits == 16:
            return closed.TABLE
        return "Newton's method" if self.dtype == torch.float64 else ROOT

    def pack(self, x: Tensor) -> Tensor:
        """One side bit an element: whether x lies right of the turning point."""
        return self._pack(x) if dispatch.fast(x) else dispatch.pack(load(self.name), x)

    @cached_property
    def _pack(self) -> Callable[[Tensor], Tensor]:
        """`dispatch.pack` where compiled kernels serve, ready to be called."""
        return dispatch.packer(load(self.name), self.dtype)

    @cached_property
    def plain(self) -> Plain | None:
        """The compiled kernels, where they serve."""
        if self.dtype == torch.float64 or not dispatch.serves(self.dtype):
            return None
        return Plain(self.dtype, self.bits, self._pack, lambda: self._decode)

    def size(self, n: int, device: torch.device) -> int:
        """How many bytes the side bits of n elements take there."""
        return dispatch.size(n, self.dtype, device)

    def fused(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The outputs (n,) and packed side bits of flat inputs (n,) in one pass, where a GPU has a kernel for it."""
        return gpu.forward(self.name, x) if self.name in gpu.OWN and gpu.available(x) else None

    def into_room(self, x: Tensor) -> Tensor | None:
        """The forward of a contiguous tensor, written to where memory comes quicker, if that can be."""
        return INTO[self.name](x, out=room(x)) if self.name in INTO and dispatch.fast(x) else None

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy * g(y, s)."""
        assert y is not None and packed is not None
        if dispatch.fast(y, dy, packed) and self.dtype != torch.float64:
            return self._decode(dy, y, packed)
        decoder, form = load(self.name), _form(self.name)
        if BY_DTYPE[y.dtype].bits == 16:
            return self._by_table(closed.table(form, y.dtype, y.device), dy, y, packed)
        lowest = _lowest(self.name, y.device) if y.dtype == torch.float32 else None
        return dispatch.backward(decoder, dy, y, packed, lowest)

    @cached_property
    def _decode(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """What decodes where compiled kernels serve, ready to be called."""
        device = torch.device("cpu")
        if BY_DTYPE[self.dtype].bits == 16:
            return dispatch.on_codes(closed.table(_form(self.name), self.dtype, device), self.dtype, 1)
        return dispatch.on_cells(load(self.name), _lowest(self.name, device))

    def __reduce__(self) -> tuple[type[Gate], tuple[str, torch.dtype]]:
        # What is ready to be called is full of addresses.
        return Gate, (self.name, self.dtype)

    def _by_table(self, table: Tensor, dy: Tensor, y: Tensor, packed: Tensor) -> Tensor:
        if gpu.available(y):
            return gpu.by_table(table, dy.reshape(-1).contiguous(), y, packed)
        return dispatch.by_table(table, dy, y, packed, 1)


def gate(name: str, dtype: torch.dtype) -> Scheme:
    """gelu, gelu_tanh, silu, mish, quick_gelu, gelu_new or gelu_fast."""
    return Gate(name, dtype)


@dataclass(frozen=True)
class _Clipped:
    """A gate with gradient 0 where the output has reached `top`."""

    inner: Gate
    top: float
    bits: int = field(default=1, init=False)
    keeps_output: bool = field(default=True, init=False)
    kind: str = field(default=ROOT, init=False)

    def pack(self, x: Tensor) -> Tensor:
        """One side bit an element."""
        return self.inner.pack(x)

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy * g(y, s), 0 at the top."""
        assert y is not None
        return torch.where(y >= self.top, 0.0, self.inner.backward(dy, y, packed))


@keep
def _clipped(low: float, high: float) -> Form:
    def slope(x: Tensor) -> Tensor:
        return torch.where(x > high, torch.where(x.isinf(), torch.nan, 0.0), slopes.gelu(x))

    return _sided("gelu", partial(native.gelu_10, min=low, max=high), slope, breaks=(high,))


def clipped_gelu(low: float, high: float, dtype: torch.dtype) -> Scheme:
    """GELU clipped to [low, high]; FormulaError for bounds at which the output does not tell the gradient."""
    for key, bound in (("min", low), ("max", high)):
        if math.isnan(bound):
            closed.finite("gelu_10", **{key: bound})
    if low > high:
        raise FormulaError(f"min={low} is above max={high}: exchange them")
    if low > DIP:
        raise FormulaError(
            f"min={low} cuts into the dip of GELU, whose outputs then do not tell whether they were clipped: "
            "use a min of -0.17 or less"
        )
    if high < SETTLED:
        raise FormulaError(
            f"max={high} is also the rounded output of inputs that are not clipped, with another gradient: "
            f"use a max of {SETTLED:.0f} or more"
        )
    if BY_DTYPE[dtype].bits == 16:
        return _clipped(low, high).scheme(dtype)
    return _Clipped(Gate("gelu", dtype), high)


def _shrunk(x: Tensor) -> Tensor:
    """x - tanh(x) for x >= 0 in float64 without cancellation: near 0 by the series of x cosh(x) - sinh(x)."""
    square = x * x
    total, term = torch.zeros_like(x), x
    for k in range(1, 12):
        term = term * square / (2 * k * (2 * k + 1))
        total = total + 2 * k * term
    return torch.where(x < 1, total / torch.cosh(x.clamp(max=1)), x - torch.tanh(x))


@keep
def _tanhshrink() -> Form:
    def gradient(y: Tensor, _: Tensor | None) -> Tensor:
        size = y.double().abs()
        # x^3 / 3 bounds f from above, and below 1/5 the fifth of x^3 bounds it from below.
        lower = torch.pow(3 * size, 1 / 3).minimum(size + 1)
        upper = torch.where(size < 0.2, torch.pow(5 * size, 1 / 3), size + 1)
        finite = size.isfinite()
        x = solve.inverse(
            torch.where(finite, size, 1.0),
            _shrunk,
            lambda x: torch.tanh(x).square(),
            torch.where(finite, lower.minimum(upper), 1.0),
            torch.where(finite, upper, 2.0),
        )
        slope = torch.tanh(x).square()
        return torch.where(size.isinf(), 1.0, torch.where(size.isnan(), size, slope)).to(y.dtype)

    return Form(functional.tanhshrink, lambda x: torch.tanh(x).square(), gradient, kind="Newton's method")


@dataclass(frozen=True)
class _Binned:
    """The binned decoder that ships for a monotone activation, in float32."""

    name: str
    form: Form
    bits: int = field(default=0, init=False)
    keeps_output: bool = field(default=True, init=False)
    kind: str = field(default="binned polynomials", init=False)

    def pack(self, x: Tensor) -> None:
        """One piece: nothing to tell apart."""

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy times the derivative."""
        return _bins(self.name, self.form, dy.device).backward(dy, y, None)


@lru_cache(maxsize=closed.TABLES)
def _bins(name: str, form: Form, device: torch.device) -> binscheme.Binned:
    return binscheme.Binned(binscheme.calibrated(bins.load(name), form.forward, form.slope, device), (), 0)


def tanhshrink(dtype: torch.dtype) -> Scheme:
    """x - tanh(x), flat at 0."""
    form = _tanhshrink()
    return _Binned("tanhshrink", form) if dtype == torch.float32 else form.scheme(dtype)


def laplace(mu: float, sigma: float, dtype: torch.dtype) -> Scheme:
    """The normal distribution function; fitted for transformers' parameters, else by the quantile function."""
    form = closed.laplace(mu, sigma)
    fitted = dtype == torch.float32 and (mu, sigma) == (0.707107, 0.282095)
    return _Binned("laplace", form) if fitted else form.scheme(dtype)
