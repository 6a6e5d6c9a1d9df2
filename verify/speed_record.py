"""One line of a speed measurement: what was timed, where, how long it took and how that compares.

Guarantees that a contestant that could not run has a line, too, whose note says why. Must not know how anything is
timed or printed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from verify.speed_stats import Spread

Kind = Literal["layer", "small", "first", "step", "peer"]
Case = tuple[Kind, str, str, str, int, int]
"""Kind, activation, dtype, device, threads and size."""
OURS, THEIRS, COPY = "invref", "torch", "copy"
"""The contestants of a layer; every ratio is to THEIRS."""
STEP_OURS = "invref, eager"
COLD, WARM, NATIVE, IMPORT = "cold", "warm", "torch's own", "import invref"
"""The contestants of a first call, and of what comes before it."""

TARGETS = {"gelu": 1.05, "gelu_tanh": 1.05, "mish": 1.0, "silu": 1.2}
"""invref's time over torch's, forward and backward, that the processor kernels are meant to stay below."""
GPU_TARGET = 1.03
SMALL_TARGET = 30e-6
"""Seconds that a small tensor may take longer than with torch."""
FIRST_TARGETS = {COLD: 3.0, WARM: 0.3, IMPORT: 0.3}
"""Seconds for the first call in a process: nothing compiled yet, and everything found in the cache;
and for importing invref once torch is."""
QUIET = 0.2
"""Cores that others may keep busy: with more, one of two threads has to wait for its core in every fifth round."""


@dataclass(frozen=True)
class Timing:
    """A contestant in one case; n elements, or tokens of a whole step.

    seconds: of one call; ratio, to_copy: over torch's and over a plain copy's, by pairs; overhead: seconds more than
    torch, by pairs; gigabytes: bytes that forward and backward cannot do without, a nanosecond; share: of a copy's such
    rate; kept: bytes kept for backward; error_input, error_weight: the gradients' distance to those in float64,
    relative to their norm; others: cores busy with something else meanwhile.
    """

    kind: Kind
    activation: str
    dtype: str
    device: str
    threads: int
    n: int
    contestant: str
    rounds: int = 0
    loops: int = 0
    seconds: Spread | None = None
    ratio: Spread | None = None
    to_copy: Spread | None = None
    overhead: Spread | None = None
    gigabytes: float | None = None
    share: float | None = None
    kept: int | None = None
    error_input: float | None = None
    error_weight: float | None = None
    others: float | None = None
    note: str = ""

    @property
    def case(self) -> Case:
        """What was timed: the same for all contestants of one case."""
        return self.kind, self.activation, self.dtype, self.device, self.threads, self.n

    @property
    def target(self) -> float | None:
        """What `measured` should not exceed; None where nothing is demanded."""
        if self.kind == "first":
            return FIRST_TARGETS.get(self.contestant) if self.device == "cpu" else None
        if self.contestant != OURS or self.kind not in ("layer", "small"):
            return None
        if self.kind == "small":
            return SMALL_TARGET if self.device == "cpu" else None
        demanded = TARGETS.get(self.activation) if self.dtype in ("float32", "bfloat16") else None
        return demanded if self.device == "cpu" or demanded is None else GPU_TARGET

    @property
    def measured(self) -> float | None:
        """The median that a target is about: a ratio, or seconds."""
        value = {"first": self.seconds, "small": self.overhead}.get(self.kind, self.ratio)
        return None if value is None else value.middle

    @property
    def disturbed(self) -> bool:
        """Whether something else ran meanwhile, so that another run may say something else."""
        return self.others is not None and self.others > QUIET

    @property
    def missed(self) -> bool:
        """Whether there is a target and the median is not within it."""
        if self.target is None:
            return False
        return self.measured is None or not self.measured <= self.target

    def to_json(self) -> dict[str, Any]:
        """The fields, with percentiles as lists, and the target."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: v.to_json() if isinstance(v, Spread) else v for name, v in values.items()}
        return {**plain, "target": self.target, "missed": self.missed}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timing:
        """The timing that `to_json` wrote."""
        known: dict[str, Any] = {field.name: data[field.name] for field in fields(cls)}
        known |= {name: Spread(*value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known)
