"""The verifier verified: faults planted in a layer or in the sweep, each with the checks that must catch it.

Guarantees that a fault is planted in the real layer (its decoder, its side bits, or the gradient that leaves it), and
that it only counts as caught when every check named for it fails. Those named "no fault" are controls: the layer as it
is, run the same way, must pass. Must not know how a check measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from invref import decoders
from invref.autograd import inverted
from invref.decoders import Clamp, Decoder
from invref.errors import InputError
from invref.formats import Format
from invref.kernels import sidebits
from invref.kernels.scheme import Rational, Scheme
from verify import sweep, targets
from verify.batches import SLICE
from verify.record import Record
from verify.targets import Layer, Role, Target

SAMPLES = 1 << 16

Gradient = Callable[[Tensor, Tensor], Tensor]
"""(x, the layer's gradient) -> the faulty gradient, all of one shape."""


@dataclass(frozen=True)
class Mutant:
    """A fault, the format in which it is planted, and the names of the checks that must all fail because of it."""

    name: str
    fault: str
    dtype: str
    checks: tuple[str, ...]
    layer: Callable[[Target], Layer]
    inputs: Callable[[Format], Tensor] | None = None
    activation: str = "gelu"
    role: Role = "row"

    def run(self) -> Outcome:
        """Verify the faulty layer: every input in 16 bits, landmarks and samples in wider formats."""
        (target,) = targets.resolve([self.activation])
        faulty = replace(target, layer=self.layer(target), label=f"{target.label}, {self.name}")
        if self.role == "foreign":
            faulty = replace(faulty, role="foreign", codes=None, scheme=None)
        samples = None if self.dtype in ("bfloat16", "float16") else SAMPLES
        return Outcome(self, sweep.run(faulty, self.dtype, samples=samples, inputs=self.inputs))


@dataclass(frozen=True)
class Outcome:
    """What the verifier said of a mutant."""

    mutant: Mutant
    record: Record

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.record.failures]

    @property
    def caught(self) -> bool:
        """Whether the verdict is `failed` and every check meant for the fault is among those that failed.

        For a control: whether it passed.
        """
        if not self.mutant.checks:
            return self.record.passed
        return self.record.verdict == "failed" and set(self.mutant.checks) <= set(self.failed)

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON-ready dictionaries."""
        facts = {key: getattr(self.mutant, key) for key in ("name", "fault", "activation", "dtype", "checks")}
        return {**facts, "failed": self.failed, "caught": self.caught}


@dataclass(frozen=True)
class _Changed:
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


Packing = Callable[[Scheme, Tensor], Tensor | None]
Decoding = Callable[[Scheme, Tensor, Tensor | None, Tensor | None], Tensor]


def _scheme(change: Callable[[Scheme, torch.dtype], Scheme]) -> Callable[[Target], Layer]:
    """The layer with its scheme changed: what it stores, or how it decodes that."""

    def plant(target: Target) -> Layer:
        def faulty(x: Tensor) -> Tensor:
            assert target.scheme is not None
            return inverted(x, target.native, change(target.scheme(x.dtype), x.dtype))

        return faulty

    return plant


def _decoding(change: Callable[[Decoder], Decoder]) -> Callable[[Target], Layer]:
    """The layer with its rational decoder changed; its side bits come from the changed decoder as well."""
    return lambda target: _scheme(lambda _scheme, _dtype: Rational(change(decoders.load(target.name))))(target)


def _repacked(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Target], Layer]:
    """The layer with its side codes changed: (x, codes) -> codes."""

    def pack(scheme: Scheme, x: Tensor) -> Tensor | None:
        packed = scheme.pack(x)
        assert packed is not None
        return sidebits.pack(change(x, sidebits.unpack(packed, x.numel(), scheme.bits)), scheme.bits)

    return _scheme(lambda scheme, _: _Changed(scheme, packing=pack))


def _redecoded(change: Decoding) -> Callable[[Target], Layer]:
    return _scheme(lambda scheme, _: _Changed(scheme, decoding=change))


def _other_formula(_scheme: Scheme, dy: Tensor, y: Tensor | None, _packed: Tensor | None) -> Tensor:
    """Softplus by the sigmoid of y, where it is that of x."""
    assert y is not None
    return dy * torch.sigmoid(y)


def _next_code(scheme: Scheme, dy: Tensor, y: Tensor | None, packed: Tensor | None) -> Tensor:
    """Each 16-bit code looked up one place further; zero and the infinities stay."""
    assert y is not None
    shifted = (y.view(torch.int16) + (y.isfinite() & (y != 0)).to(torch.int16)).view(y.dtype)
    return scheme.backward(dy, shifted, packed)


def _gradient(change: Gradient) -> Callable[[Target], Layer]:
    """The layer with its gradient changed on the way out."""

    def plant(target: Target) -> Layer:
        def faulty(x: Tensor) -> Tensor:
            inner = x.view_as(x)
            if inner.requires_grad:
                inner.register_hook(lambda dx: change(x.detach(), dx))
            return target.layer(inner)

        return faulty

    return plant


def _scheme_of(name: str, dtype: torch.dtype) -> Scheme:
    (target,) = targets.resolve([name])
    assert target.scheme is not None
    return target.scheme(dtype)


def _where(condition: Callable[[Tensor], Tensor], value: float) -> Gradient:
    return lambda x, dx: torch.where(condition(x.double()), torch.full_like(dx, value), dx)


def _bumped(decoder: Decoder) -> Decoder:
    """One coefficient off by 2^-18 of itself: 32 float32 ulp."""
    numerator = (decoder.turn.numerator[0] * (1 + 2.0**-18), *decoder.turn.numerator[1:])
    return replace(decoder, turn=replace(decoder.turn, numerator=numerator))


def _sign_flipped(decoder: Decoder) -> Decoder:
    return replace(decoder, head=replace(decoder.head, numerator=tuple(-c for c in decoder.head.numerator)))


def _short_series(decoder: Decoder) -> Decoder:
    return replace(decoder, series=decoder.series[:6])


def _shifted(decoder: Decoder) -> Decoder:
    return replace(decoder, turning_y=repr(float(decoder.turning_y) * (1 + 2.0**-20)))


def _clamped(cut: float, value: float) -> Callable[[Decoder], Decoder]:
    return lambda decoder: replace(decoder, clamps=dict.fromkeys(decoder.clamps, Clamp(cut, value)))


def _other_forward(target: Target) -> Layer:
    """y one ulp off at one input."""

    def layer(x: Tensor) -> Tensor:
        y = target.layer(x)
        return y + torch.where(x.detach().double() == 1.0, 2.0**-6, 0.0).to(y.dtype)

    return layer


def _stale(_x: Tensor, dx: Tensor) -> Tensor:
    return torch.arange(dx.numel(), dtype=torch.int32).to(torch.int16).view(dx.dtype).view_as(dx)


def _in_short_tensors(change: Gradient) -> Gradient:
    return lambda x, dx: change(x, dx) if x.numel() <= SLICE else dx


def _four_fifths(fmt: Format) -> Tensor:
    """The inputs that a wrong start constant leaves: a fifth is skipped without a word."""
    skipped = fmt.finite_count // 5
    return fmt.tensor(fmt.first_ordinal + skipped, fmt.finite_count - skipped)


MUTANTS = {
    mutant.name: mutant
    for mutant in (
        *(Mutant(f"no fault in {dtype}", "none: the layer as it is", dtype, (), lambda target: target.layer)
          for dtype in ("bfloat16", "float16", "float32", "float64")),
        *(Mutant(f"no fault in {name}", "none: the layer as it is", "bfloat16", (), lambda target: target.layer,
                 activation=name) for name in ("leaky_relu", "relu2", "sigmoid")),
        Mutant("no fault in a foreign layer", "none: the framework's own layer, called foreign", "float16", (),
               lambda target: target.native, role="foreign"),
        Mutant("perturbed coefficient", "one coefficient of the decoder off by 2^-18 of itself", "float32",
               ("decoder error", "error beyond stored value"), _decoding(_bumped)),
        Mutant("flipped sign", "one segment of the decoder has the wrong sign", "bfloat16",
               ("gradient error",), _decoding(_sign_flipped)),
        Mutant("flipped side bit", "the side bit of x = -2 is inverted", "float16",
               ("gradient error",), _repacked(lambda x, codes: codes ^ (x.double() == -2.0))),
        Mutant("shifted turning point", "y* off by 2^-20 of itself", "float32",
               ("gradient error", "decoder error"), _decoding(_shifted)),
        Mutant("dropped clamp", "y below y* reaches the square root", "bfloat16",
               ("finite gradients",), _decoding(_clamped(-math.inf, 0.0)), activation="silu"),
        Mutant("clamp at zero", "y below y* decodes as y*: the exact inverse", "bfloat16",
               ("gradient error",), _decoding(_clamped(0.0, 0.0))),
        Mutant("one NaN", "one finite input gives NaN", "float16",
               ("finite gradients", "gradient error"), _gradient(_where(lambda x: x == 0.5, math.nan))),
        Mutant("one NaN in float32", "one finite input gives NaN", "float32",
               ("finite gradients", "gradient error"), _gradient(_where(lambda x: x == -0.75, math.nan))),
        Mutant("scalar code only", "the loop behind the vector loop gives another gradient", "bfloat16",
               ("gradient error (scalar tail)",), _gradient(_in_short_tensors(_where(lambda x: x == 1.0, 0.0)))),
        Mutant("skipped range", "a fifth of the inputs is never run", "bfloat16",
               ("count",), lambda target: target.layer, _four_fifths),
        Mutant("swapped activation", "SiLU answers where GELU was asked for", "bfloat16",
               ("forward identical", "gradient error"), lambda _: targets.TARGETS["silu"].layer),
        Mutant("swapped decoder", "GELU's outputs are decoded as SiLU's", "float16",
               ("gradient error",), _scheme(lambda _, dtype: _scheme_of("silu", dtype))),
        Mutant("wrong closed form", "softplus decodes sigmoid(y) where it is 1 - exp(-y)", "float32",
               ("gradient error", "decoder error", "error beyond stored value"), _redecoded(_other_formula),
               activation="softplus"),
        Mutant("shifted code table", "every output is looked up one code further", "bfloat16",
               ("gradient error",), _redecoded(_next_code), activation="mish"),
        Mutant("swapped side codes", "left of the turning point counts as right of it", "float16",
               ("gradient error",), _repacked(lambda _, codes: 1 - codes), activation="hardswish"),
        Mutant("lost bit plane", "of two side bits the second is 0", "bfloat16",
               ("gradient error",), _repacked(lambda _, codes: codes & 1), activation="xielu"),
        Mutant("dtype forgotten", "no kernel serves float16: gradients are whatever the memory held", "float16",
               ("finite gradients", "gradient error"), _gradient(_stale)),
        Mutant("other forward", "y differs from the framework's at one input", "bfloat16",
               ("forward identical",), _other_forward),
        Mutant("other forward of a foreign layer", "y is 2^-6 off at x = 1", "bfloat16",
               ("forward error in ulps",), _other_forward, activation="tanh", role="foreign"),
        Mutant("foreign gradient off", "0.1 where f' is 0.07, in a layer that says nothing of what it keeps",
               "float32", ("gradient error",), _gradient(_where(lambda x: x == 2.0, 0.1)), activation="tanh",
               role="foreign"),
        Mutant("gradient of one's own", "one gradient differs from the framework's, whose layer it is", "bfloat16",
               ("gradient identical",), _gradient(_where(lambda x: x == 2.0, 0.1)), activation="sigmoid"),
        Mutant("wrong at a break", "the gradient at ±0, where the slopes are 0.01 and 1, is 2", "bfloat16",
               ("between the one-sided derivatives at breaks",), _gradient(_where(lambda x: x == 0, 2.0)),
               activation="leaky_relu"),
        Mutant("overflow", "an output that overflows gives NaN", "bfloat16",
               ("overflowed gradients",), _gradient(_where(lambda x: x > 1e20, math.nan)), activation="relu2"),
        Mutant("saturated too far", "the gradient is 0 from 1e19 on", "bfloat16",
               ("gradient at 1e20", "gradient at the largest value", "one tail"),
               _gradient(_where(lambda x: x > 1e19, 0.0))),
        Mutant("one is not reached", "the gradient stays at 0.98 where f' has become 1", "float16",
               ("one tail",), _gradient(_where(lambda x: x > 100, 0.98))),
        Mutant("tail never decays", "1e-3 leaks at all x below -8", "bfloat16",
               ("zero tail", "gradient at the most negative value"), _gradient(_where(lambda x: x < -8, -1e-3))),
        Mutant("tail of the wrong sign", "a bias of 1e-6 in the tail, against the sign of f'", "bfloat16",
               ("zero tail sign",), _gradient(_where(lambda x: x < -8, 1e-6))),
        Mutant("zero at zero", "±0 give the gradient 0, as for a ReLU", "float32",
               ("gradient at +0", "gradient at -0"), _gradient(_where(lambda x: x == 0, 0.0))),
        Mutant("infinities forgotten", "+inf gives the gradient 1 where the framework gives NaN", "float32",
               ("infinities and NaN as the framework",), _gradient(_where(lambda x: x == math.inf, 1.0))),
        Mutant("short series", "float64 uses six terms of the Taylor polynomial at the turning point", "float64",
               ("gradient error away from turning points",), _decoding(_short_series)),
        Mutant("single precision", "float64 gradients pass through float32", "float64",
               ("gradient error away from turning points",), _gradient(lambda _, dx: dx.float().double())),
    )
}  # fmt: skip


def chosen(names: Sequence[str]) -> Iterator[Mutant]:
    """The mutants with these names, all where there is no name; InputError lists the names there are."""
    for name in names or MUTANTS:
        if name not in MUTANTS:
            raise InputError(f"unknown mutant {name!r}: use one of {', '.join(map(repr, MUTANTS))}")
        yield MUTANTS[name]


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row per mutant: the checks that must catch it, and whether they did."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("mutant", "dtype", "must be caught by", ""):
        result.add_column(title)
    for outcome in outcomes:
        mutant = outcome.mutant
        result.add_row(mutant.name, mutant.dtype, ", ".join(mutant.checks) or "nothing", _verdict(outcome))
    return result


def _verdict(outcome: Outcome) -> str:
    if not outcome.mutant.checks:
        return "[green]passed[/]" if outcome.caught else "[bold red]FALSE ALARM[/]"
    return "[green]caught[/]" if outcome.caught else "[bold red]SURVIVED[/]"


def escaped(outcome: Outcome) -> str:
    """A mutant that was not caught, or a control that did not pass, in one line."""
    mutant = outcome.mutant
    expected = ", ".join(mutant.checks) or "nothing"
    return f"{mutant.name} ({mutant.fault}): must fail {expected}; failed {', '.join(outcome.failed) or 'nothing'}"
