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

from rich import box
from rich.table import Table
from torch import Tensor

from invref.errors import InputError
from invref.formats import Format
from verify import faults, foreign, sweep, targets
from verify.record import Record
from verify.targets import Layer, Role, Target

SAMPLES = 1 << 16
FORMULA = "x * tanh(exp(x))"
"""Stands for any formula that is not in the catalogue."""


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

    def target(self) -> Target:
        """The layer without its fault: that of a name, or of a formula's text."""
        if self.activation in targets.TARGETS:
            return targets.TARGETS[self.activation]
        return foreign.from_text(self.activation)

    def run(self) -> Outcome:
        """Verify the faulty layer: every input in 16 bits, landmarks and samples in wider formats."""
        target = self.target()
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


MUTANTS = {
    mutant.name: mutant
    for mutant in (
        *(Mutant(f"no fault in {dtype}", "none: the layer as it is", dtype, (), lambda target: target.layer)
          for dtype in ("bfloat16", "float16", "float32", "float64")),
        Mutant("no fault in a formula", "none: the layer as it is", "float32", (), lambda target: target.layer,
               activation=FORMULA),
        *(Mutant(f"no fault in {name}", "none: the layer as it is", "bfloat16", (), lambda target: target.layer,
                 activation=name) for name in ("leaky_relu", "relu2", "sigmoid")),
        Mutant("no fault in a foreign layer", "none: the framework's own layer, called foreign", "float16", (),
               lambda target: target.native, role="foreign"),
        Mutant("perturbed coefficient", "one coefficient of the decoder off by 2^-18 of itself", "float32",
               ("decoder error", "error beyond stored value"), faults.decoding(faults.bumped)),
        Mutant("flipped sign", "one segment of the decoder has the wrong sign", "bfloat16",
               ("gradient error",), faults.decoding(faults.sign_flipped)),
        Mutant("flipped side bit", "the side bit of x = -2 is inverted", "float16",
               ("gradient error",), faults.repacked(lambda x, codes: codes ^ (x.double() == -2.0))),
        Mutant("shifted turning point", "y* off by 2^-20 of itself", "float32",
               ("gradient error", "decoder error"), faults.decoding(faults.shifted)),
        Mutant("dropped clamp", "y below y* reaches the square root", "bfloat16",
               ("finite gradients",), faults.decoding(faults.clamped(-math.inf, 0.0)), activation="silu"),
        Mutant("clamp at zero", "y below y* decodes as y*: the exact inverse", "bfloat16",
               ("gradient error",), faults.decoding(faults.clamped(0.0, 0.0))),
        Mutant("one NaN", "one finite input gives NaN", "float16",
               ("finite gradients", "gradient error"), faults.instead(lambda x: x == 0.5, math.nan)),
        Mutant("one NaN in float32", "one finite input gives NaN", "float32",
               ("finite gradients", "gradient error"), faults.instead(lambda x: x == -1.0, math.nan)),
        Mutant("scalar code only", "the loop behind the vector loop gives another gradient", "bfloat16",
               ("gradient error (scalar tail)",), faults.in_short_tensors(faults.where(lambda x: x == 1.0, 0.0))),
        Mutant("skipped range", "a fifth of the inputs is never run", "bfloat16",
               ("count",), lambda target: target.layer, faults.four_fifths),
        Mutant("swapped activation", "SiLU answers where GELU was asked for", "bfloat16",
               ("forward identical", "gradient error"), lambda _: targets.TARGETS["silu"].layer),
        Mutant("swapped decoder", "GELU's outputs are decoded as SiLU's", "float16",
               ("gradient error",), faults.scheme(lambda _, dtype: faults.scheme_of("silu", dtype))),
        Mutant("wrong closed form", "softplus decodes sigmoid(y) where it is 1 - exp(-y)", "float32",
               ("gradient error", "decoder error", "error beyond stored value"), faults.redecoded(faults.other_formula),
               activation="softplus"),
        Mutant("shifted code table", "every output is looked up one code further", "bfloat16",
               ("gradient error",), faults.redecoded(faults.next_code), activation="mish"),
        Mutant("swapped side codes", "left of the turning point counts as right of it", "float16",
               ("gradient error",), faults.repacked(lambda _, codes: 1 - codes), activation="hardswish"),
        Mutant("bin off", "one coefficient of one bin of a formula's decoder off by 2^-18", "float32",
               ("decoder error", "error beyond stored value"), faults.bin_off, activation=FORMULA),
        Mutant("rounded forward", "a formula's output passes through bfloat16", "float32",
               ("forward error in ulps",), faults.twice_rounded, activation=FORMULA),
        Mutant("lost bit plane", "of two side bits the second is 0", "bfloat16",
               ("gradient error",), faults.repacked(lambda _, codes: codes & 1), activation="xielu"),
        Mutant("dtype forgotten", "no kernel serves float16: gradients are whatever the memory held", "float16",
               ("finite gradients", "gradient error"), faults.gradient(faults.stale)),
        Mutant("other forward", "y differs from the framework's at one input", "bfloat16",
               ("forward identical",), faults.other_forward),
        Mutant("other forward of a foreign layer", "y is 2^-6 off at x = 1", "bfloat16",
               ("forward error in ulps",), faults.other_forward, activation="tanh", role="foreign"),
        Mutant("foreign gradient off", "0.5 where f' is 0.42, in a layer that says nothing of what it keeps",
               "float32", ("gradient error",), faults.instead(lambda x: x == 1.0, 0.5), activation="tanh",
               role="foreign"),
        Mutant("gradient of one's own", "one gradient differs from the framework's, whose layer it is", "bfloat16",
               ("gradient identical",), faults.instead(lambda x: x == 2.0, 0.1), activation="sigmoid"),
        Mutant("wrong at a break", "the gradient at ±0, where the slopes are 0.01 and 1, is 2", "bfloat16",
               ("between the one-sided derivatives at breaks",), faults.instead(lambda x: x == 0, 2.0),
               activation="leaky_relu"),
        Mutant("overflow", "an output that overflows gives NaN", "bfloat16",
               ("overflowed gradients",), faults.instead(lambda x: x > 1e20, math.nan), activation="relu2"),
        Mutant("saturated too far", "the gradient is 0 from 1e19 on", "bfloat16",
               ("gradient at 1e20", "gradient at the largest value", "one tail"),
               faults.instead(lambda x: x > 1e19, 0.0)),
        Mutant("one is not reached", "the gradient stays at 0.98 where f' has become 1", "float16",
               ("one tail",), faults.instead(lambda x: x > 100, 0.98)),
        Mutant("tail never decays", "1e-3 leaks at all x below -8", "bfloat16",
               ("zero tail", "gradient at the most negative value"), faults.instead(lambda x: x < -8, -1e-3)),
        Mutant("tail of the wrong sign", "a bias of 1e-6 in the tail, against the sign of f'", "bfloat16",
               ("zero tail sign",), faults.instead(lambda x: x < -8, 1e-6)),
        Mutant("zero at zero", "±0 give the gradient 0, as for a ReLU", "float32",
               ("gradient at +0", "gradient at -0"), faults.instead(lambda x: x == 0, 0.0)),
        Mutant("infinities forgotten", "+inf gives the gradient 1 where the framework gives NaN", "float32",
               ("infinities and NaN as the framework",), faults.instead(lambda x: x == math.inf, 1.0)),
        Mutant("short series", "float64 uses six terms of the Taylor polynomial at the turning point", "float64",
               ("gradient error away from turning points",), faults.decoding(faults.short_series)),
        Mutant("single precision", "float64 gradients pass through float32", "float64",
               ("gradient error away from turning points",), faults.gradient(lambda _, dx: dx.float().double())),
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
