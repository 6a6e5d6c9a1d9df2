"""The accuracy table of the framework's own activations, forward and backward, as Markdown beside its records.

`invref-verify gradient --native --all` measures everything and writes both; `python -m verify.native [RESULTS OUT]`
writes the Markdown again, from reports/native.json to reports/native.md or from any records to any file. Must not
measure anything, and holds no date: the same records give the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verify import document, report
from verify.record import Check, Record, WorstInput

RESULTS = Path(__file__).parents[1] / "reports" / "native.json"

TITLE = "# Accuracy of the framework's own activations"
_TEXT = """\
Every finite input of each format (where values are marked "≥", only landmarks, their neighbourhoods and a random
sample), compared with the exact function and its exact derivative. An error of the output is in units in the last
place (ulp) of the exact value in that format: 0.5 is correct rounding. An error of the gradient is |dx - f'(x)| for a
`grad_output` of 1, over the inputs where the gradient is finite; those marked * are divided by max(1, |f'(x)|),
because f' has no bound. A gradient that is infinite or NaN at a finite input is counted apart, with the first such
input. Inputs are given as the value printed by `float.hex`."""

_HEADER = (
    "activation", "format", "output: worst ulps", "at x", "gradient: worst error", "at x", "non-finite gradients",
    "inputs",
)  # fmt: skip
_RULE = ("---", "---", "---:", "---", "---:", "---", "---", "---:")


def table(records: Sequence[Record], run: dict[str, Any]) -> str:
    """The whole file: title, how to read it, one row per record, and what it was measured on."""
    rows = [_HEADER, _RULE, *map(_row, records)]
    lines = [TITLE, "", _TEXT, "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [f"torch {run['torch']}, Python {run['python']}, {run['cpu']}.", ""]
    lines += ["Any row again: `invref-verify gradient NAME --native --dtype FORMAT`; one input: add `--input BITS`."]
    return "\n".join(lines) + "\n"


def _row(record: Record) -> tuple[str, ...]:
    mark = "" if record.scale == "absolute" else "*"
    ulps = "-" if record.forward_error_ulps is None else f"{_sign(record)}{record.forward_error_ulps:.4g}"
    return (
        record.activation,
        record.dtype,
        ulps,
        _at(record.forward_worst),
        report.worst_error(record) + mark,
        _at(record.worst_input),
        _nonfinite(record),
        f"{record.inputs:,}",
    )


def _sign(record: Record) -> str:
    return "≥ " if record.verdict == "sampled" else ""


def _at(worst: WorstInput | None) -> str:
    return f"`{report.short_hex(worst)}`" if worst else "-"


def _nonfinite(record: Record) -> str:
    found = next((check for check in record.checks if check.name == "finite gradients"), None)
    if not isinstance(found, Check) or not found.measured:
        return "0"
    return f"{found.measured:,.0f}, first at {_at(found.worst)}"


def write(results: Path, out: Path) -> None:
    """Writes the table of the records in `results` to `out`."""
    run = json.loads(results.read_text(encoding="utf-8"))["run"]
    document.write_text(out, table(document.read(results), run))


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("python -m verify.native [RESULTS.json OUT.md]")
    write(*map(Path, sys.argv[1:]) if sys.argv[1:] else (RESULTS, RESULTS.with_suffix(".md")))
