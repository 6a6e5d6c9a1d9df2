"""The page of one activation, as HTML made from its data alone.

Guarantees one self-contained file: no address outside it, no script. Must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from invref import formats
from verify import pages_pictures as pictures
from verify import report
from verify.pages_style import STYLE
from verify.record import ABSOLUTE, Check, Record

Data = Mapping[str, Any]

SYMBOLS = {"proved": "■", "exhausted": "●", "sampled": "◐", "unproved": "○", "failed": "✕"}
"""Told apart without colour."""

MEANING = {
    "proved": "a rigorous bound",
    "exhausted": "every finite input of the format was run",
    "sampled": "landmarks and random inputs were run",
    "unproved": "could not be bounded",
    "failed": "a bound is violated",
}


def document(title: str, body: str, script: str = "", style: str = "") -> str:
    """A whole page; `style` is for what this page alone has."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n'
        f"<body>\n{body}\n{script}</body>\n</html>\n"
    )


def page(data: Data) -> str:
    """The page of an activation."""
    records = records_of(data)
    parts = [_head(data, records), _verdicts(records), _pictures(data), _errors(data), _zooms(data), _facts(data),
             _decoder(data, records), _special(data), _worst(records), _checks(records), _versions(data)]  # fmt: skip
    return document(f"{data['activation']}: gradient report", "\n".join(part for part in parts if part))


def records_of(data: Data) -> list[Record]:
    """The records in the data, whose timings are in its `run`."""
    timings = data["run"]["timings"]
    return [Record.from_json({**record, "seconds": timings[record["dtype"]]}) for record in data["records"]]


def symbol(record: Record) -> str:
    """The verdict as its symbol alone."""
    word = record.verdict
    said = f'role="img" aria-label="{word}" title="{word}: {MEANING[word]}"'
    return f'<span class="verdict {word}" {said}>{SYMBOLS[word]}</span>'


def verdict(record: Record) -> str:
    """The verdict with its symbol."""
    word = record.verdict
    return f'<span class="verdict {word}" title="{MEANING[word]}">{SYMBOLS[word]} {word}</span>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table that scrolls sideways by itself; `numeric` columns stand to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numeric else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    lines = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", header)}</tr></thead>\n<tbody>{lines}</tbody></table></div>'
    )


def _head(data: Data, records: Sequence[Record]) -> str:
    gain = f"<p>{escape(data['gain'])}</p>" if data["gain"] else ""
    return (
        f'<p class="soft"><a href="index.html">All activations</a></p><h1>{escape(data["activation"])}</h1>'
        f'<p class="soft"><code>{escape(data["label"])}</code>, forward: {escape(records[0].forward)}</p>'
        f'<div class="formula">{data["mathml"]}</div>{gain}'
    )


def _verdicts(records: Sequence[Record]) -> str:
    header = ("format", "verdict", "inputs checked", "worst error", "error floor", "native error", "excess",
              "held to", "bits per element", "not finite")  # fmt: skip
    rows = [
        (record.dtype, verdict(record), f"{record.inputs:,}", report.worst_error(record),
         *map(report.number, (record.error_floor, record.native_error, record.excess_error, record.bound)),
         str(record.bits), f"{record.nonfinite_gradients:,}")
        for record in records
    ]  # fmt: skip
    scale = "" if records[0].scale == ABSOLUTE else "Errors are divided by max(1, |f′|), since f′ is unbounded. "
    return (
        "<h2>Verdicts</h2>"
        + table(header, rows, numeric=range(2, 10))
        + f'<p class="soft">{scale}Errors are those of the gradient for an incoming gradient of 1. The error floor is '
        "half the widest range of f′ over inputs that share one stored output and side code: no decoder can do better. "
        "The native error is that of the framework’s own backward, which keeps the input.</p>"
    )


def _figure(svg: str, title: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><b>{escape(title)}</b>{svg}{below}</figure>"


def _pictures(data: Data) -> str:
    several = len(data["curves"]) > 1
    return (
        '<h2>The function and its derivative from the output</h2><div class="grid-of">'
        + _figure(
            pictures.function(data), "f (solid) and f′ (dashed)", "One colour a monotone piece." if several else ""
        )
        + _figure(
            pictures.from_output(data),
            "f′ as a function of the stored output",
            "Lines: the exact inverse. Circles: what the layer’s backward gives.",
        )
        + "</div>"
    )


def _errors(data: Data) -> str:
    records = {record.dtype: record for record in records_of(data)}
    figures = []
    for dtype, found in data["errors"].items():
        record = records[dtype]
        numbers = [("worst", report.worst_error(record)), ("floor", report.number(record.error_floor)),
                   ("native", report.number(record.native_error))]  # fmt: skip
        caption = ", ".join(f'{name} <span class="whole">{number}</span>' for name, number in numbers)
        shown = f"{found['inputs']:,} inputs in {len(found['ours'])} columns"
        whole = "all" if found["inputs"] == formats.get(dtype).finite_count else "runs of neighbours"
        figures.append(
            _figure(
                pictures.errors(data, dtype, report.worst_error(record)),
                dtype,
                f"Of the whole run: {caption}. Drawn: {shown}, {whole}.",
            )
        )
    return (
        "<h2>Error against input</h2><p>Shaded: the error floor. Solid: this layer’s backward, from the output. "
        "Dashed: the native error. The outermost columns hold all that lies beyond. A line may run below the floor "
        "where inputs that share a code lie in several columns.</p>"
        f'<div class="grid-of">{"".join(figures)}</div>'
    )


def _zooms(data: Data) -> str:
    parts = []
    for index, zoomed in enumerate(data["zooms"]):
        figures = [_figure(pictures.zoom(data, dtype, index), dtype) for dtype, rows in zoomed.items() if len(rows) > 4]
        if figures:
            parts.append(f'<div class="grid-of">{"".join(figures)}</div>')
    if not parts:
        return ""
    several = "s" if len(parts) > 1 else ""
    return (
        f"<h2>At the turning point{several}</h2><p>Each bar is one stored code: the derivatives of all inputs that "
        f"share it. Half the longest bar is the error floor. Circles: what is decoded.</p>{''.join(parts)}"
    )


def _facts(data: Data) -> str:
    rows = [
        (str(p["index"]), f"({_end(p['left'])}, {_end(p['right'])})", piece_kind(p),
         f"{_number(p['left_limit'])} → {_number(p['right_limit'])}", str(data["codes"][p["index"]]))
        for p in data["pieces"]
    ]  # fmt: skip
    marks = [[kind, *map(_mono, numbers)] for kind, *numbers in map(landmark_cells, data["landmarks"])]
    used = 1 + max((k for mark in marks for k, cell in enumerate(mark) if "></" not in cell), default=0)
    landmarks = (
        table(LANDMARKS[:used], [mark[:used] for mark in marks])
        if marks
        else "<p>Nowhere: f is monotone on the whole line.</p>"
    )
    return (
        "<h2>Pieces and turning points</h2>"
        + table(("piece", "interval", "f", "values", "side code"), rows)
        + "<h3>Where one piece ends and the next begins</h3>"
        + landmarks
    )


def _decoder(data: Data, records: Sequence[Record]) -> str:
    kinds = [(r.dtype, escape(r.decoder) or "-", str(r.bits), report.number(report.decoder_error(r))) for r in records]
    text = "<h2>Decoder</h2>" + table(("format", "kind", "side bits", "measured decoder error"), kinds, (2, 3))
    rows = [(d["part"], escape(d["form"]), d["degree"], report.number(d["bound"], "≤")) for d in data["decoder"]]
    if rows:
        text += table(("part", "form", "degree", "certified sup-norm"), rows, (2, 3))
    return text


def _special(data: Data) -> str:
    tables = []
    for dtype, rows in data["special"].items():
        cells = [(escape(r["input"]), r["y"], r["ours"], r["native"], r["exact"]) for r in rows]
        header = ("input", "output", "gradient", "native gradient", "f′")
        tables.append(f"<div><h3>{dtype}</h3>{table(header, cells, range(1, 5))}</div>")
    return (
        '<h2>Zeros, subnormals, the largest values, infinities, NaN</h2><div class="grid-of tables">'
        + "".join(tables)
        + "</div>"
    )


def _worst(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        where = report.place(record.worst_input) if record.worst_input else "no single input"
        at = f"{report.worst_error(record)} at <span class=mono>{escape(where)}</span>"
        parts.append(f"<h3>{record.dtype}</h3><p>{at}</p><pre><code>{escape(record.reproduce)}</code></pre>")
    return "<h2>Worst inputs, and how to see them again</h2>" + "".join(parts)


def _checks(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        rows = [
            (escape(c.name), report.number(c.measured), report.number(c.bound), _mark(c),
             f"<span class=mono>{c.worst.bits}</span>" if c.worst else "")
            for c in record.checks
        ]  # fmt: skip
        summary = f"{record.dtype}: {report.held([record])}, {escape(record.coverage)}"
        opened = " open" if record.failures else ""
        inner = table(("check", "measured", "bound", "", "worst input"), rows, (1, 2))
        parts.append(f"<details{opened}><summary>{summary}</summary>{inner}</details>")
    return "<h2>Every check</h2>" + "".join(parts)


def _mark(check: Check) -> str:
    if not check.holds:
        return "✕ violated"
    return "measured only" if check.bound is None else "✓"


def _versions(data: Data) -> str:
    values = [(escape(str(key)), escape(str(value))) for key, value in data["environment"].items()]
    values += [
        (f"decoder table {escape(name)}", f"<span class=mono>{digest[:16]}</span>")
        for name, digest in data["tables"].items()
    ]
    return "<h2>Versions and machine</h2>" + table(("", ""), values)


def piece_kind(piece: Data) -> str:
    """What f does on a piece."""
    return "constant" if piece.get("plateau") else "increasing" if piece["increasing"] else "decreasing"


LANDMARKS = ("", "x", "f", "f″", "f′ from the left", "f′ from the right")


def landmark_cells(mark: Data) -> list[str]:
    """What a landmark is, where, and what f and its derivatives are there."""
    words = {"flat": "flat point", "break": "break"}
    kind = words.get(mark["kind"]) or ("minimum" if mark["minimum"] else "maximum")
    numbers = [str(mark.get(key) or "") for key in ("x", "y", "curvature", "left_slope", "right_slope")]
    if "y_right" in mark:
        numbers[1] += f" → {mark['y_right']}"
    return [kind, *(number.replace("-", "−") for number in numbers)]


def _end(text: str) -> str:
    return {"inf": "∞", "-inf": "−∞"}.get(text) or _short(text)


def _number(text: str) -> str:
    return {"inf": "∞", "-inf": "−∞"}.get(text) or _short(text)


def _short(text: str) -> str:
    return f"{float(text):.6g}".replace("-", "−")


def _mono(text: str) -> str:
    return f"<span class=mono>{escape(text)}</span>"
