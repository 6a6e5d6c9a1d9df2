"""How a fault is planted in a real layer: in its scheme, its decoder, its side codes, or the gradient that leaves it.

Guarantees that everything else about the layer stays as it is. Must not know which check is to catch which fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from invref import decoders
from invref.autograd import inverted
from invref.custom import Activation
from invref.decoders import CELLS_RIGHT, Clamp, Decoder
from invref.decoding import Layer as Decoded
from invref.formats import Format
from invref.kernels import dispatch, sidebits
from invref.kernels.scheme import Scheme
from verify import targets
from verify.batches import SLICE
from verify.targets import Layer, Target

Gradient = Callable[[Tensor, Tensor], Tensor]
"""(x, the layer's gradient) -> the faulty gradient, all of one shape."""

Plant = Callable[[Target], Layer]
"""A target -> its layer with a fault."""


@dataclass(frozen=True)
class Changed:
    """A scheme with another way to pack or to decode."""

    inner: Scheme
    packing: Packing | None = None
    decoding: Decoding | None = None

    @property
    def bits(self) -> int:
        """Those of the scheme it changes, as all that follows."""
        return self.inner.bits

    @property
    def keeps_output(self) -> bool:
        """Whether the output is kept."""
        return self.inner.keeps_output

    @property
    def kind(self) -> str:
        """The decoder's name."""
        return self.inner.kind

    def pack(self, x: Tensor) -> Tensor | None:
        """The side codes of x."""
        return self.packing(self.inner, x) if self.packing else self.inner.pack(x)

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """The gradient."""
        decode = self.decoding
        return decode(self.inner, dy, y, packed) if decode else self.inner.backward(dy, y, packed)


@dataclass(frozen=True)
class Given:
    """A gate's scheme with a decoder of one's own, in every format: in 16 bit its rational functions, not a table."""

    decoder: Decoder
    bits: int = field(default=1, init=False)
    keeps_output: bool = field(default=True, init=False)
    kind: str = field(default="planted", init=False)

    def pack(self, x: Tensor) -> Tensor:
        """One side bit an element."""
        return dispatch.pack(self.decoder, x)

    def backward(self, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
        """dy * g(y, s)."""
        assert y is not None and packed is not None
        return dispatch.backward(self.decoder, dy, y, packed)


Packing = Callable[[Scheme, Tensor], Tensor | None]
Decoding = Callable[[Scheme, Tensor, Tensor | None, Tensor | None], Tensor]


def scheme(change: Callable[[Scheme, torch.dtype], Scheme]) -> Plant:
    """The layer with its scheme changed: what it stores, or how it decodes that."""

    def plant(target: Target) -> Layer:
        def faulty(x: Tensor) -> Tensor:
            assert target.scheme is not None
            planted = change(target.scheme(x.dtype), x.dtype)
            return inverted(x, target.native, Decoded("planted", target.native, lambda *_: planted, lambda *_: None))

        return faulty

    return plant


def decoding(change: Callable[[Decoder], Decoder]) -> Plant:
    """The layer with its decoder changed; its side bits come from the changed decoder as well."""
    return lambda target: scheme(lambda _, _dtype: Given(change(decoders.load(target.name))))(target)


def repacked(change: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    """The layer with its side codes changed: (x, codes) -> codes."""

    def pack(scheme: Scheme, x: Tensor) -> Tensor | None:
        packed = scheme.pack(x)
        assert packed is not None
        return sidebits.pack(change(x, sidebits.unpack(packed, x.numel(), scheme.bits)), scheme.bits)

    return scheme(lambda scheme, _: Changed(scheme, packing=pack))


def redecoded(change: Decoding) -> Plant:
    """The layer with its decoding changed."""
    return scheme(lambda scheme, _: Changed(scheme, decoding=change))


def other_formula(_scheme: Scheme, dy: Tensor, y: Tensor | None, _packed: Tensor | None) -> Tensor:
    """Softplus by the sigmoid of y, where it is that of x."""
    assert y is not None
    return dy * torch.sigmoid(y)


def next_code(scheme: Scheme, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
    """Each 16-bit code looked up one place further; zero and the infinities stay."""
    assert y is not None
    shifted = (y.view(torch.int16) + (y.isfinite() & (y != 0)).to(torch.int16)).view(y.dtype)
    return scheme.backward(dy, shifted, packed)


def gradient(change: Gradient) -> Plant:
    """The layer with its gradient changed on the way out."""

    def plant(target: Target) -> Layer:
        def faulty(x: Tensor) -> Tensor:
            inner = x.view_as(x)
            if inner.requires_grad:
                inner.register_hook(lambda dx: change(x.detach(), dx))
            return target.layer(inner)

        return faulty

    return plant


def scheme_of(name: str, dtype: torch.dtype) -> Scheme:
    """What a row of the catalogue stores in a dtype."""
    (target,) = targets.resolve([name])
    assert target.scheme is not None
    return target.scheme(dtype)


def bin_off(target: Target) -> Layer:
    """The layer of a formula with one bin of its decoder, of those for outputs 1/4 from an anchor, off by 2^-18."""
    activation = target.layer
    assert isinstance(activation, Activation)
    made, (formula, decoder, *functions) = activation.__reduce__()
    cells = []
    for cell in decoder.cells:
        coefficients = cell.coefficients.copy()
        octave = -2 - cell.first
        if 0 <= octave < len(cell.splits):
            coefficients[sum(1 << split for split in cell.splits[:octave]), 0] += 2.0**-18
        cells.append(replace(cell, coefficients=coefficients))
    faulty: Layer = made(formula, replace(decoder, cells=tuple(cells)), *functions)
    return faulty


def where(condition: Callable[[Tensor], Tensor], value: float) -> Gradient:
    """The gradient replaced by a value where the condition on x holds."""
    return lambda x, dx: torch.where(condition(x.double()), torch.full_like(dx, value), dx)


def instead(condition: Callable[[Tensor], Tensor], value: float) -> Plant:
    """The layer with another gradient where the condition on x holds."""
    return gradient(where(condition, value))


def bumped(decoder: Decoder) -> Decoder:
    """One coefficient of a cell, a value of g near 1/2, off by 2^-18 of itself: 64 float32 ulp."""
    row = min(range(CELLS_RIGHT), key=lambda i: abs(decoder.cells.rows[i][0] - 0.5))
    return _with_row(decoder, row, lambda rows: (rows[0] * (1 + 2.0**-18), *rows[1:]))


def _with_row(decoder: Decoder, index: int, change: Callable[[tuple[float, ...]], tuple[float, ...]]) -> Decoder:
    rows = decoder.cells.rows
    changed = (*rows[:index], change(rows[index]), *rows[index + 1 :])
    return replace(decoder, cells=replace(decoder.cells, rows=changed))


def sign_flipped(decoder: Decoder) -> Decoder:
    """A polynomial of the decoder with the wrong sign, and the segment of its rational functions that serves there."""
    flipped = replace(decoder, head=replace(decoder.head, numerator=tuple(-c for c in decoder.head.numerator)))
    return _with_row(flipped, CELLS_RIGHT - 3, lambda row: tuple(-c for c in row))


def short_series(decoder: Decoder) -> Decoder:
    """Float64 with six terms of the Taylor polynomial."""
    return replace(decoder, series=decoder.series[:6])


def shifted(decoder: Decoder) -> Decoder:
    """y* off by 2^-20 of itself."""
    return replace(decoder, turning_y=repr(float(decoder.turning_y) * (1 + 2.0**-20)))


def clamped(cut: float, value: float) -> Callable[[Decoder], Decoder]:
    """Other values for the lowest outputs."""
    return lambda decoder: replace(decoder, clamps=dict.fromkeys(decoder.clamps, Clamp(cut, value)))


def other_forward(target: Target) -> Layer:
    """y one ulp off at one input."""

    def layer(x: Tensor) -> Tensor:
        y = target.layer(x)
        return y + torch.where(x.detach().double() == 1.0, 2.0**-6, 0.0).to(y.dtype)

    return layer


def twice_rounded(target: Target) -> Layer:
    """The output rounded to bfloat16 on its way."""
    return lambda x: target.layer(x).bfloat16().to(x.dtype)


def stale(_x: Tensor, dx: Tensor) -> Tensor:
    """Whatever the memory held."""
    return torch.arange(dx.numel(), dtype=torch.int32).to(torch.int16).view(dx.dtype).view_as(dx)


def in_short_tensors(change: Gradient) -> Plant:
    """The layer with a fault in tensors shorter than a vector alone."""
    return gradient(lambda x, dx: change(x, dx) if x.numel() <= SLICE else dx)


def four_fifths(fmt: Format) -> Tensor:
    """The inputs that a wrong start constant leaves: a fifth is skipped without a word."""
    skipped = fmt.finite_count // 5
    return fmt.tensor(fmt.first_ordinal + skipped, fmt.finite_count - skipped)
