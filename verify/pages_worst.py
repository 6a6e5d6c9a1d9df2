"""The worst inputs of every run, kept: text files of bit patterns that later layers must get right, too.

A line is a format, a bit pattern, the hexadecimal float, and in a comment what was worst there. A line `bound` per
format says how large the gradient's error may be, and `bound none` that it must be the framework's own, bit for bit.
Guarantees that an input once kept stays. Must not know how a run goes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from invref import formats
from invref.errors import InputError
from verify import batches
from verify.oracle import exact_slopes
from verify.record import RELATIVE, Record, WorstInput
from verify.targets import OWN, Target

_SCALED = "relative"


@dataclass
class Kept:
    """Per format of one activation the bound (NaN: the framework's own), and what was worst at each input."""

    bounds: dict[str, float] = field(default_factory=dict)
    relative: bool = False
    inputs: dict[str, dict[int, set[str]]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Takes over a record's bound and worst inputs."""
        own = record.decoder == OWN or record.bound is None
        self.bounds[record.dtype] = math.nan if own else float(record.bound or 0.0)
        self.relative = record.scale == RELATIVE
        found: list[tuple[str, WorstInput | None]] = [("worst error", record.worst_input)]
        found += [(check.name, check.worst) for check in record.checks]
        for name, worst in found:
            if worst is not None:
                self.inputs.setdefault(record.dtype, {}).setdefault(int(worst.bits, 16), set()).add(name)

    def text(self, activation: str) -> str:
        """The file's content."""
        lines = [
            f"# {activation}: inputs at which a check was worst. Written by `invref-verify report`; kept for good."
        ]
        for name in formats.FORMATS:
            if name in self.bounds:
                bound = self.bounds[name]
                shown = "none" if math.isnan(bound) else bound.hex() + (f" {_SCALED}" if self.relative else "")
                lines.append(f"{name:<8} bound {shown}")
        for name, fmt in formats.FORMATS.items():
            for bits, reasons in sorted(self.inputs.get(name, {}).items()):
                value = value_of(name, bits)
                pattern, short = f"0x{bits:0{fmt.bits // 4}x}", re.sub(r"\.?0*p", "p", value.hex())
                lines.append(f"{name:<8} {pattern:<10} {short:<18} # {'; '.join(sorted(reasons))}")
        return "\n".join(lines) + "\n"


def value_of(dtype: str, bits: int) -> float:
    """The value with a bit pattern."""
    fmt = formats.get(dtype)
    magnitude = bits & (1 << fmt.bits - 1) - 1
    return fmt.value(magnitude if magnitude == bits else -1 - magnitude)


def read(path: Path) -> Kept:
    """What a file keeps, nothing if there is none; InputError names a line that is not understood."""
    kept = Kept()
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        content, _, comment = line.partition("#")
        words = content.split()
        if not words:
            continue
        try:
            if words[1] == "bound":
                kept.bounds[words[0]] = math.nan if words[2] == "none" else float.fromhex(words[2])
                kept.relative |= words[-1] == _SCALED
            else:
                bits = int(words[1], 16)
                value_of(words[0], bits)
                kept.inputs.setdefault(words[0], {})[bits] = {c.strip() for c in comment.split(";") if c.strip()}
        except (ValueError, IndexError):
            raise InputError(f"{path}: cannot read the line {line[:60]!r}: restore the file") from None
    return kept


def merged(path: Path, activation: str, records: Sequence[Record]) -> str:
    """The file's text with these records taken over."""
    kept = read(path)
    for record in records:
        kept.add(record)
    return kept.text(activation)


def violations(target: Target, kept: Kept) -> list[str]:
    """One line for each kept input at which the layer's gradient is off by more than the bound; none if all hold."""
    lines = []
    for dtype, inputs in kept.inputs.items():
        fmt, bound = formats.get(dtype), kept.bounds[dtype]
        for bits in sorted(inputs):
            value = value_of(dtype, bits)
            x = torch.full((batches.VECTOR,), value, dtype=torch.float64).to(fmt.dtype)
            native = batches.together(target.native, x)[1].double()
            least, largest = _slopes(target, value)
            size = max(1.0, abs(least)) if kept.relative else 1.0
            for path in (batches.together, batches.in_slices):
                dx = path(target.layer, x)[1].double()
                off = torch.maximum(dx - largest, least - dx) / size
                # Comparisons are written so that NaN fails.
                holds = torch.equal(dx, native) if math.isnan(bound) else bool((off <= bound).all())
                if not holds:
                    lines.append(
                        f"{dtype} 0x{bits:0{fmt.bits // 4}x}: gradient {float(dx[0])!r}, f' {least!r}, bound {bound}"
                    )
                    break
    return lines


def _slopes(target: Target, value: float) -> tuple[float, float]:
    """f' at a value, from the left and from the right of it: different at breaks alone."""
    for entry in target.formula.breaks:
        if float(entry.at) == value:
            left, right = target.formula.slopes_at(entry)
            return min(left, right), max(left, right)
    slope = float(exact_slopes(target.formula, np.array([value]))[0])
    return slope, slope
