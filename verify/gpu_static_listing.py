"""What a compiled kernel's listing says: registers, spills, the widths of loads and stores, and how many instructions.

Reads what `cuobjdump` prints of a cubin, and AMD's assembly text. Instructions are counted from the entry to the exit,
those of guarded side paths in between included; what lies beyond the exit is only jumped to in rare cases. Must not
know any kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

BYTES = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Listing:
    """A kernel's figures; widths in bytes, sorted, one for each instruction of a thread; fused: multiply-adds."""

    registers: int
    spills: int
    shared: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    instructions: int
    fused: int


def nvidia(usage: str, sass: str) -> Listing:
    """From `cuobjdump -res-usage` and `-sass`."""
    number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    lines = instructions(sass)
    body = lines[: lines.index("EXIT") + 1]
    names = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in body]
    local = sum(name.startswith(("LDL", "STL")) for name in names)
    return Listing(
        registers=number["REG"],
        spills=number["STACK"] + number["LOCAL"] + local,
        shared=number["SHARED"],
        loads=_sorted(_sass_width(name) for name in names if name.startswith("LDG")),
        stores=_sorted(_sass_width(name) for name in names if name.startswith("STG")),
        instructions=len(body),
        fused=sum(2 if name.startswith("FFMA2") else name.startswith("FFMA") for name in names),
    )


def instructions(sass: str) -> list[str]:
    """The instructions of a listing by `cuobjdump -sass`."""
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", sass, re.MULTILINE)


def amd(text: str) -> Listing:
    """From the assembly text with its metadata."""
    number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    lines = re.findall(r"^\t([svgbd][a-z]*_\w+)", text, re.MULTILINE)
    names = lines[: lines.index("s_endpgm") + 1]
    return Listing(
        registers=number["vgpr_count"],
        spills=number["vgpr_spill_count"] + number["sgpr_spill_count"] + number["private_segment_fixed_size"],
        shared=number["group_segment_fixed_size"],
        loads=_sorted(_amd_width(name) for name in names if re.match(r"(global|buffer|flat)_load", name)),
        stores=_sorted(_amd_width(name) for name in names if re.match(r"(global|buffer|flat)_store", name)),
        instructions=len(names),
        fused=sum(2 if "_pk_fma" in name else bool(re.match(r"v_(fma|fmac)_f32", name)) for name in names),
    )


def _sorted(widths: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(widths))


def _sass_width(name: str) -> int:
    parts = name.split(".")
    bits = [int(part.lstrip("US")) for part in parts if re.fullmatch(r"[US]?(8|16|64|128)", part)]
    return bits[0] // 8 if bits else 4


def _amd_width(name: str) -> int:
    kind = re.search(r"(?:load|store)_(?:u?(byte|short)|(dword(?:x\d)?))", name)
    if kind is None:
        raise ValueError(f"a load or store of unknown width: {name}")
    return BYTES[kind.group(1) or kind.group(2)]
