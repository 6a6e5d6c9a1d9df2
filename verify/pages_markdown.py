"""The report of one activation as Markdown, made from its data alone: the page's numbers without its pictures.

Must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verify import pages_html as html
from verify import report
from verify.record import ABSOLUTE, Record

Data = Mapping[str, Any]


def page(data: Data) -> str:
    """The text of NAME.md."""
    records = html.records_of(data)
    parts = [
        f"# {data['activation']}",
        f"$$\n{_lines(data['latex'])}\n$$",
        f"`{data['formula']}`; verified: `{data['label']}`, forward: {records[0].forward}.",
        data["gain"],
        "## Verdicts",
        _verdicts(records),
        "" if data["scale"] == ABSOLUTE else "Errors are divided by max(1, |f′|), since f′ is unbounded.",
        "## Pieces and turning points",
        _pieces(data),
        _landmarks(data),
        "## Decoder",
        _decoder(data, records),
        "## Worst inputs",
        *(_worst(record) for record in records),
        "## Zeros, subnormals, the largest values, infinities, NaN",
        *(_special(dtype, rows) for dtype, rows in data["special"].items()),
        "## Versions and machine",
        ", ".join(f"{key} {value}" for key, value in data["environment"].items()) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A Markdown table."""
    rule = ["---:" if i in numeric else "---" for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)
    )


def _lines(latex: str) -> str:
    return latex if r" \\ " not in latex else f"\\begin{{gathered}} {latex} \\end{{gathered}}"


def _verdicts(records: Sequence[Record]) -> str:
    header = ("format", "verdict", "inputs checked", "worst error", "error floor", "native error", "held to",
              "bits per element")  # fmt: skip
    rows = [
        (r.dtype, r.verdict, f"{r.inputs:,}", report.worst_error(r),
         *map(report.number, (r.error_floor, r.native_error, r.bound)), str(r.bits))
        for r in records
    ]  # fmt: skip
    return table(header, rows, range(2, 8))


def _pieces(data: Data) -> str:
    rows = [
        (str(p["index"]), f"({p['left']}, {p['right']})", html.piece_kind(p),
         f"{p['left_limit']} to {p['right_limit']}", str(data["codes"][p["index"]]))
        for p in data["pieces"]
    ]  # fmt: skip
    return table(("piece", "interval", "f", "values", "side code"), rows)


def _landmarks(data: Data) -> str:
    rows = [html.landmark_cells(mark) for mark in data["landmarks"]]
    used = 1 + max((k for row in rows for k, cell in enumerate(row) if cell), default=0)
    return table(html.LANDMARKS[:used], [row[:used] for row in rows]) if rows else "f is monotone on the whole line."


def _decoder(data: Data, records: Sequence[Record]) -> str:
    kinds = [(r.dtype, r.decoder or "-", str(r.bits), report.number(report.decoder_error(r))) for r in records]
    text = table(("format", "kind", "side bits", "measured decoder error"), kinds, (2, 3))
    rows = [(d["part"], d["form"], d["degree"], report.number(d["bound"], "≤")) for d in data["decoder"]]
    return text + ("\n\n" + table(("part", "form", "degree", "certified sup-norm"), rows, (2, 3)) if rows else "")


def _worst(record: Record) -> str:
    where = report.place(record.worst_input) if record.worst_input else "no single input"
    return f"{record.dtype}: {report.worst_error(record)} at {where}\n\n    {record.reproduce}"


def _special(dtype: str, rows: Sequence[Data]) -> str:
    cells = [(r["input"], r["y"], r["ours"], r["native"], r["exact"]) for r in rows]
    return f"{dtype}:\n\n" + table(("input", "output", "gradient", "native gradient", "f′"), cells, range(1, 5))
