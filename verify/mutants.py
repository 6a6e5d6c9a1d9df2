"""The verifier verified: faults planted in a layer or in the sweep, each with the checks that must catch it.

Guarantees that a fault is planted in the real layer (its decoder, its side bits, or the gradient that leaves it), and
that it only counts as caught when every check named for it fails. Those named "no fault" are controls: the layer as it
is, run the same way, must pass. Must not know how a check measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from invref import decoders, functional
from invref.decoders import Clamp, Decoder
from invref.errors import InputError
from invref.formats import Format
from invref.kernels import dispatch, sidebits
from verify import sweep, targets
from verify.batches import SLICE
from verify.record import Record
from verify.targets import Layer, Target

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

    def run(self) -> Outcome:
        """Verify the faulty layer: every input in 16 bits, landmarks and samples in wider formats."""
        (target,) = targets.resolve([self.activation])
        faulty = replace(target, layer=self.layer(target), label=f"{target.label}, {self.name}")
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


def _decoding(change: Callable[[Decoder], Decoder]) -> Callable[[Target], Layer]:
    """The layer with its decoder changed; its side bits come from the changed decoder as well."""

    def plant(target: Target) -> Layer:
        faulty = change(decoders.load(target.name))
        return _while(target.layer, lambda: patch.object(functional, "load", lambda _name: faulty))

    return plant


def _while(layer: Layer, fault: Callable[[], AbstractContextManager[Any]]) -> Layer:
    """`layer`, with `fault` in force during its forward."""

    def faulty(x: Tensor) -> Tensor:
        with fault():
            return layer(x)

    return faulty


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


def _flipped_bit(at: float) -> Callable[[Target], Layer]:
    """The layer with the side bit of one input inverted."""
    honest = dispatch.pack

    def pack(decoder: Decoder, x: Tensor) -> Tensor:
        side = sidebits.unpack(honest(decoder, x), x.numel())
        return sidebits.pack(side ^ (x.double() == at))

    return lambda target: _while(target.layer, lambda: patch.object(dispatch, "pack", pack))


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
        Mutant("perturbed coefficient", "one coefficient of the decoder off by 2^-18 of itself", "float32",
               ("decoder error", "error beyond stored value"), _decoding(_bumped)),
        Mutant("flipped sign", "one segment of the decoder has the wrong sign", "bfloat16",
               ("gradient error",), _decoding(_sign_flipped)),
        Mutant("flipped side bit", "the side bit of x = -2 is inverted", "float16",
               ("gradient error",), _flipped_bit(-2.0)),
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
               ("gradient error",), _decoding(lambda _: decoders.load("silu"))),
        Mutant("dtype forgotten", "no kernel serves float16: gradients are whatever the memory held", "float16",
               ("finite gradients", "gradient error"), _gradient(_stale)),
        Mutant("other forward", "y differs from the framework's at one input", "bfloat16",
               ("forward identical",), _other_forward),
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
