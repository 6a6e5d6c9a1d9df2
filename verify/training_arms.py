"""The arms: one activation with its native gradient, ours, native with the noise no decoder can avoid, or a wrong one.

Guarantees that every arm's forward is native's, bit for bit, so that only gradients differ, and that an arm's noise
depends on its seed alone. Must not know how arms are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import Function

import invref
from invref import layers
from invref.decoders import load
from invref.formats import FORMATS
from invref.kernels import sidebits
from verify.training_models import Kind, MakeActivation

FLOAT32 = FORMATS["float32"]
NATIVE, INVERTED, TWIN = "native", "inverted", "twin"
COARSE, FLIPPED, WRONG = "coarse", "flipped", "wrong"
CONTROLS = (COARSE, FLIPPED, WRONG)
ARMS = (NATIVE, INVERTED, TWIN, *CONTROLS)
ERROR = 2e-2
"""What the coarse control's decoder is off by at worst."""
RIPPLE = 6.0
"""Its error is a cosine of the output times this: it changes sign a few times in the range that matters, as fits do."""
NEAR = 64
"""How many ulp around the turning value the float32 floor is counted, not expanded: there it is largest."""
SHARE = 0.01
"""The share of side bits that are flipped."""

Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, dy, the native dx) -> dx."""


def function(kind: Kind) -> Callable[[Tensor], Tensor]:
    """torch's own activation."""
    return {
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "silu": nn.functional.silu,
    }[kind]


def maker(arm: str, seed: int, device: torch.device) -> MakeActivation:
    """What makes an arm's activations; all that it makes share one source of noise."""
    noise = Noise(seed, device)

    def make(kind: Kind) -> nn.Module:
        if arm == NATIVE:
            return _native(kind)
        if arm == INVERTED:
            return _inverted(kind)
        return Altered(kind, _CORRECTIONS[arm](kind, noise))

    return make


class Altered(nn.Module):
    """The native activation with a corrected gradient."""

    def __init__(self, kind: Kind, correction: Correction) -> None:
        super().__init__()
        self.forward_function, self.correction = function(kind), correction

    def forward(self, x: Tensor) -> Tensor:
        """The native value, of any shape."""
        y: Tensor = _Altered.apply(x, self.forward_function, self.correction)  # type: ignore[no-untyped-call]
        return y


class _Altered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, native: Callable[[Tensor], Tensor], correction: Correction) -> Tensor:
        ctx.save_for_backward(x)
        ctx.native, ctx.correction = native, correction
        return native(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.correction(x, dy, _gradient(ctx.native, x, dy)), None, None


@dataclass
class Noise:
    """Random numbers of an arm, on the device."""

    seed: int
    device: torch.device
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def uniform(self, shape: torch.Size) -> Tensor:
        """Float32 numbers between -1 and 1."""
        return torch.rand(shape, generator=self.generator, device=self.device) * 2 - 1


def floor(kind: Kind, x: Tensor) -> Tensor:
    """Half the width of f' over the inputs that share x's stored output and side bit, float32, of x's shape.

    Counted over all inputs for those of 16 bit, and for float32 outputs within `NEAR` ulp of the turning value, where
    the forward's own error counts. Elsewhere by expansion at x: outputs within h, half a unit in the last place, are
    stored as one, which is a range of h / |f'| inputs either side, at a turning point of sqrt(h / |f''|), and f'' times
    as much of f'. One expression has both limits: f'' h / sqrt(f'^2 + h |f''|).
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return _floors(kind, x.dtype, x.device)[x.view(torch.int16).int() & 0xFFFF]
    slope, bend = _derivatives(kind, x)
    y = function(kind)(x)
    h = torch.finfo(x.dtype).eps / 2 * torch.exp2(torch.frexp(y).exponent.float() - 1)
    safe = (slope * slope + h * bend.abs()).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    expanded = (bend.abs() * h / safe).float()
    first, counted = _around_turning_point(kind, x.device)
    code = FLOAT32.ordinals(y) - first
    near = (code >= 0) & (code < counted.shape[1])
    return torch.where(near, counted[_side(kind, x).int(), torch.where(near, code, 0)], expanded)


@cache
def _floors(kind: Kind, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The floor at each of the 65,536 inputs of a format, 0 where an input is not finite."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    x = patterns.to(torch.int16).view(dtype)
    finite = x.isfinite()
    slope, _ = _derivatives(kind, torch.where(finite, x, 0).double())
    cell = (function(kind)(x).view(torch.int16).int() & 0xFFFF) * 2 + _side(kind, x)
    half = _half_widths(cell[finite], slope[finite], 2 * x.numel())[cell]
    return torch.where(finite, half, 0).float().to(device)


@cache
def _around_turning_point(kind: Kind, device: torch.device) -> tuple[int, Tensor]:
    """The floor of float32 outputs around the turning value: the first one's ordinal, and (2, 2 NEAR + 1) by side."""
    decoder = load(kind)
    at, value = float(decoder.turning_x), float(decoder.turning_y)
    _, bend = _derivatives(kind, torch.tensor([at], dtype=torch.float64))
    # Twice as far up the parabola as is counted: no forward errs by `NEAR` ulp.
    reach = (4 * NEAR * FLOAT32.ulp(value) / float(bend)) ** 0.5
    left, right = FLOAT32.ordinal(at - reach), FLOAT32.ordinal(at + reach)
    x = FLOAT32.tensor(left, right - left).to(device)
    slope, _ = _derivatives(kind, x.double())
    first, count = FLOAT32.ordinal(value) - NEAR, 2 * NEAR + 1
    code = FLOAT32.ordinals(function(kind)(x)) - first
    near = (code >= 0) & (code < count)
    cell = _side(kind, x) * count + code
    return first, _half_widths(cell[near], slope[near], 2 * count).float().view(2, count)


def _half_widths(cell: Tensor, slope: Tensor, count: int) -> Tensor:
    """Half the width of the slopes (n,) in each of `count` cells; 0 in those without any."""
    none = torch.full((count,), torch.inf, dtype=slope.dtype, device=slope.device)
    low, high = none.scatter_reduce(0, cell, slope, "amin"), (-none).scatter_reduce(0, cell, slope, "amax")
    return torch.where(low <= high, (high - low) / 2, 0)


def _side(kind: Kind, x: Tensor) -> Tensor:
    """Whether x lies right of the turning point, as the layer says, int64."""
    return (x.float() > float(load(kind).threshold(np.float32))).long()


def _derivatives(kind: Kind, x: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' at x, by torch's own derivatives."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(kind)(leaf).sum(), leaf, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), leaf)
    return slope.detach(), bend


def _gradient(native: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(native(leaf), leaf, dy)[0]


def _native(kind: Kind) -> nn.Module:
    return nn.SiLU() if kind == "silu" else nn.GELU("tanh" if kind == "gelu_tanh" else "none")


def _inverted(kind: Kind) -> nn.Module:
    return invref.SiLU() if kind == "silu" else invref.GELU("tanh" if kind == "gelu_tanh" else "none")


def _packed(kind: Kind, x: Tensor) -> Tensor:
    packed = layers.get(kind).scheme(x.dtype, x.device).pack(x)
    assert packed is not None, f"{kind} has a turning point, and so side bits"
    return packed


def _twin(kind: Kind, noise: Noise) -> Correction:
    def correction(x: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
        # Two gradients that are each rounded once are up to eps of their size apart, whatever they were computed from.
        rounding = noise.uniform(x.shape) * torch.finfo(dx.dtype).eps * dx.float()
        return (dx.float() + rounding + dy.float() * noise.uniform(x.shape) * floor(kind, x)).to(dx.dtype)

    return correction


def _coarse(kind: Kind, _noise: Noise) -> Correction:
    return lambda x, dy, dx: dx + (dy * ERROR * torch.cos(RIPPLE * function(kind)(x).float())).to(dx.dtype)


def _flipped(kind: Kind, noise: Noise) -> Correction:
    def correction(x: Tensor, dy: Tensor, _dx: Tensor) -> Tensor:
        x, dy, n = x.contiguous(), dy.contiguous(), x.numel()
        scheme = layers.get(kind).scheme(x.dtype, x.device)
        y = function(kind)(x).view(-1)
        # An output above 0 is on the right piece alone: with the other bit it stands for no input at all.
        flips = (noise.uniform(torch.Size([n])) < 2 * SHARE - 1) & (y < 0)
        return scheme.backward(dy.view(-1), y, _packed(kind, x) ^ sidebits.pack(flips)).view(x.shape)

    return correction


def _wrong(kind: Kind, _noise: Noise) -> Correction:
    other = function("gelu" if kind == "silu" else "silu")
    return lambda x, dy, _dx: _gradient(other, x, dy)


_CORRECTIONS: dict[str, Callable[[Kind, Noise], Correction]] = {
    TWIN: _twin, COARSE: _coarse, FLIPPED: _flipped, WRONG: _wrong,
}  # fmt: skip
