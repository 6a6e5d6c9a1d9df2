"""What a verification says: one record per (activation, format), made of named checks.

Guarantees that a record survives JSON unchanged (non-finite numbers travel as strings, so any JSON reader takes it),
and that a check whose measured value is NaN never holds. Must not know how anything is measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from invref.errors import InputError
from invref.formats import Format

ABSOLUTE, RELATIVE = "absolute", "relative beyond 1"
VERDICTS = ("proved", "exhausted", "sampled", "unproved", "failed")


@dataclass(frozen=True)
class WorstInput:
    """One input: its decimal value, its hexadecimal float, its bit pattern (`0x…`), and its monotone piece."""

    value: float
    hex: str
    bits: str
    piece: int

    @classmethod
    def of(cls, fmt: Format, ordinal: int, piece: int) -> WorstInput:
        """The input with this ordinal of `fmt`."""
        value = fmt.value(ordinal)
        return cls(value, value.hex(), f"0x{fmt.pattern(ordinal):0{fmt.bits // 4}x}", piece)


@dataclass(frozen=True)
class Check:
    """One named statement: `measured` against `bound` (None: reported only), and the input where it was worst."""

    name: str
    measured: float
    bound: float | None
    holds: bool
    worst: WorstInput | None = None

    @classmethod
    def at_most(cls, name: str, measured: float, bound: float, worst: WorstInput | None = None) -> Check:
        """The check `measured ≤ bound`; NaN on either side fails."""
        return cls(name, measured, bound, bool(measured <= bound), worst)


@dataclass
class Record:
    """The result for one activation in one format; errors are absolute errors of the gradient for `grad_output` 1.

    `worst_error` includes the oracle's own error bound; `bound` is what it was held to, with the gradient's rounding
    to a 16-bit format. `native_error` is that of the framework's own backward, over the inputs where that is finite.
    Where `scale` says so, errors are divided by max(1, |f'|), and `overflowed` inputs, whose output is infinite, are no
    part of them. `forward_error_ulps` is |y - f(x)| in units in the last place of f(x), where that was measured.
    """

    activation: str
    formula: str
    target: str
    forward: str
    dtype: str
    device: str
    inputs: int
    coverage: str
    verdict: str
    worst_error: float
    worst_input: WorstInput | None
    error_floor: float | None
    excess_error: float | None
    native_error: float | None
    nonfinite_gradients: int
    bound: float | None
    seconds: float
    reproduce: str
    pieces: int = 0
    bits: int = 0
    decoder: str = ""
    gain: str = ""
    scale: str = ABSOLUTE
    overflowed: int = 0
    forward_error_ulps: float | None = None
    forward_worst: WorstInput | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.holds]

    @property
    def bounded(self) -> list[Check]:
        """The checks that could fail; the others only tell what was measured."""
        return [check for check in self.checks if check.bound is not None]

    @property
    def passed(self) -> bool:
        """Whether the verdict is one that bounds the error, and every check holds."""
        return self.verdict in ("proved", "exhausted", "sampled") and not self.failures

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-ready dictionaries, fields in order."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> Record:
        """The inverse of `to_json` (also takes the JSON text); InputError where fields are missing or unknown."""
        data = json.loads(data) if isinstance(data, str) else data
        names = {f.name for f in fields(cls)}
        if data.keys() != names:
            wrong = ", ".join(sorted(data.keys() ^ names))
            raise InputError(f"not a verification record: missing or unknown {wrong}; write records with --json")
        values = {name: _number(value) if name in _NUMBERS else value for name, value in data.items()}
        for name in ("worst_input", "forward_worst"):
            values[name] = _worst(data[name])
        values["checks"] = [
            Check(c["name"], _number(c["measured"]), _number(c["bound"]), c["holds"], _worst(c["worst"]))
            for c in data["checks"]
        ]
        return cls(**values)


_NUMBERS = {"worst_error", "error_floor", "excess_error", "native_error", "bound", "seconds", "forward_error_ulps"}


def _plain(value: Any) -> Any:
    """`value` with every non-finite float spelled as a string."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _worst(data: dict[str, Any] | None) -> WorstInput | None:
    return None if data is None else WorstInput(_number(data["value"]), data["hex"], data["bits"], data["piece"])
