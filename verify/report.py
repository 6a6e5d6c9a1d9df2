"""What a verification prints: the table of verdicts, the worst inputs, and one line per violated check.

Guarantees that an error never looks smaller than it is: "≤" stands only before the worst error of a proved or exhausted
record and is rounded up, "≥" before that of a sampled one and is rounded down. Must not know how anything is measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

from rich import box
from rich.console import Console
from rich.table import Table

from verify.record import Check, Record, WorstInput

WIDE = 122
"""Columns a terminal needs for the table that has every number; below that it keeps the first `NARROW` columns."""

NARROW = 7
LONGEST_NAME = 12
"""Longer names, as formulas give, are cut in the table."""

DECODER_CHECK = "decoder error"

_SIGN = {"proved": "≤", "exhausted": "≤", "sampled": "≥"}
_ROUNDING = {"≤": ROUND_CEILING, "≥": ROUND_FLOOR, "": ROUND_HALF_EVEN}
_STYLE = {"proved": "green", "exhausted": "green", "sampled": "yellow", "unproved": "yellow", "failed": "bold red"}


def number(value: float | None, sign: str = "") -> str:
    """`value` to three digits, rounded the way that keeps the statement made by `sign` ("≤", "≥" or "") true."""
    if value is None:
        return "-"
    exact = Decimal(value)
    if not exact.is_finite() or not exact:
        return f"{sign} {value:g}".strip()
    return f"{sign} {Context(prec=3, rounding=_ROUNDING[sign]).plus(exact):.2e}".strip()


def worst_error(record: Record) -> str:
    """The worst error with the sign that the verdict allows, as in "≤ 1.06e-2"."""
    return number(record.worst_error, _SIGN.get(record.verdict, ""))


def decoder_error(record: Record) -> float | None:
    """The measured decoder error, None where that was not measured."""
    return next((check.measured for check in record.checks if check.name.startswith(DECODER_CHECK)), None)


def short_hex(worst: WorstInput) -> str:
    """An input as a hexadecimal float without trailing zeros."""
    return re.sub(r"\.?0*p", "p", worst.hex)


def place(worst: WorstInput) -> str:
    """An input in one phrase: decimal, hexadecimal float, bits and piece."""
    return f"x = {worst.value!r} = {short_hex(worst)} (bits {worst.bits}, piece {worst.piece})"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


_COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("activation", lambda record: _short(record.activation)),
    ("dtype", lambda record: record.dtype),
    ("inputs", lambda record: f"{record.inputs:,}"),
    ("verdict", lambda record: f"[{_STYLE[record.verdict]}]{record.verdict}[/]"),
    ("worst error", worst_error),
    ("floor", lambda record: number(record.error_floor)),
    ("native", lambda record: number(record.native_error)),
    ("decoder", lambda record: number(decoder_error(record))),
    ("excess", lambda record: number(record.excess_error)),
    ("non-finite", lambda record: str(record.nonfinite_gradients)),
    ("seconds", lambda record: f"{record.seconds:.1f}"),
)
_LEFT = {"activation", "dtype", "verdict"}


def table(records: Sequence[Record], width: int) -> Table:
    """The verdicts, one row per record, in as many columns as `width` characters hold."""
    wide = width >= WIDE
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, int(wide), 0, 0), show_edge=False)
    columns = _COLUMNS if wide else _COLUMNS[:NARROW]
    for title, _ in columns:
        result.add_column(title, justify="left" if title in _LEFT else "right", no_wrap=True)
    for record in records:
        result.add_row(*(cell(record) for _, cell in columns))
    return result


def console() -> Console:
    """Standard output; a pipe has no width of its own and gets the wide table."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def show(records: Sequence[Record]) -> None:
    """Prints the table, where each worst error lies, each violated check, and one closing line."""
    screen = console()
    screen.print(table(records, screen.width))
    print(*worst_lines(records), *violations(records), sep="\n")
    print(f"{held(records)} over {sum(record.inputs for record in records):,} inputs")


def held(records: Sequence[Record]) -> str:
    """How many of the checks that have a bound hold, and how many others only tell a measurement."""
    bounded = [check for record in records for check in record.bounded]
    told = sum(len(record.checks) for record in records) - len(bounded)
    measured = f" ({told} more measured only)" if told else ""
    return f"{sum(check.holds for check in bounded)} of {len(bounded)} checks hold{measured}"


def worst_lines(records: Sequence[Record]) -> list[str]:
    """Where each record's worst error lies."""
    return [f"{r.activation} {r.dtype}: worst at {place(r.worst_input)}" for r in records if r.worst_input]


def violations(records: Sequence[Record]) -> list[str]:
    """One line for each violated check, and one for each record that bounds nothing."""
    lines = [_violation(record, check) for record in records for check in record.failures]
    unbounded = [record for record in records if not record.passed and not record.failures]
    return lines + [f"NOT BOUNDED {r.activation} {r.dtype}: {r.verdict}; repeat: {r.reproduce}" for r in unbounded]


def _violation(record: Record, check: Check) -> str:
    """What, measured, bound, where, and how to reproduce it."""
    bound = "" if check.bound is None else f", bound {check.bound:.6g}"
    where = f", at {place(check.worst)}" if check.worst else ""
    whole, _, _ = record.reproduce.partition(" --input ")
    command = f"{whole} --input {check.worst.bits}" if check.worst else whole
    return (
        f"VIOLATED {record.activation} {record.dtype}: {check.name}: measured {check.measured:.6g}{bound}{where}; "
        f"reproduce: {command}"
    )
