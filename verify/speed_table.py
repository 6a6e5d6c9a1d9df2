"""Speed measurements as text: tables for a terminal and for Markdown, lines for missed targets, and CSV.

`python -m verify.speed_table [RESULTS OUT]` writes the Markdown again, from reports/speed.json to reports/speed.md or
from any results to any file. Must not measure anything, and holds no date of its own: the same results, the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from verify import document
from verify.speed_record import COLD, COPY, IMPORT, NATIVE, OURS, THEIRS, WARM, Kind, Timing
from verify.speed_stats import Spread

NOTE = "note"
RESULTS = Path(__file__).parents[1] / "reports" / "speed.json"
TITLE = "# Speed"
_TEXT = """\
Forward and backward together, in turns with torch's own layer on the same numbers: medians, and in parentheses the 20th
and 80th percentile. A ratio is the median of the ratios of pairs, below 1 where the contestant is faster than torch.
`docs/speed.md` says how everything is measured and what the columns mean."""
MACHINE = (
    "cpu", "cores", "gpu", "load", "platform", "python", "torch", "numpy", "llvmlite", "triton", "invref", "date",
)  # fmt: skip
"""What of the run stands in every line of the CSV."""
_SPREADS = ("seconds", "ratio", "to_copy", "overhead")
_PARTS = ("p20", "p50", "p80")
_PLAIN = ("gigabytes", "share", "kept", "error_input", "error_weight", "others")
_CASE = ("kind", "activation", "dtype", "device", "threads", "n", "contestant", "rounds", "loops")
COLUMNS = (
    *MACHINE, *_CASE, *(f"{name}_{part}" for name in _SPREADS for part in _PARTS), *_PLAIN, "target", "missed", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table: the first `left` columns are text."""

    title: str
    header: tuple[str, ...]
    left: int
    rows: Sequence[tuple[str, ...]]


def duration(seconds: float) -> str:
    """Seconds to three digits in the unit that suits them, as in "1.23 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= 0.9995 * size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-6)} µs"


def around(spread: Spread | None, shown: Callable[[float], str] | None = None) -> str:
    """A median with its percentiles, as in "1.051 (1.030–1.083)"; "-" where there is none."""
    if spread is None:
        return "-"
    show = shown or factor
    return f"{show(spread.middle)} ({show(spread.low)}–{show(spread.high)})"


def factor(value: float) -> str:
    """A ratio to three decimals, or to three digits from 10."""
    return f"{value:.3f}" if value < 10 else _three(value)


def size(n: int) -> str:
    """A power of two as such, another number as it is."""
    return f"2^{n.bit_length() - 1}" if n > 0 and n & (n - 1) == 0 else f"{n:,}"


def sheets(timings: Sequence[Timing]) -> list[Sheet]:
    """The tables of whatever was measured."""
    makers: dict[Kind, Callable[[list[Timing]], Sheet]] = {
        "layer": _layers, "small": _small, "first": _first, "step": _steps, "peer": _peers,
    }  # fmt: skip
    by_kind = {kind: [t for t in timings if t.kind == kind] for kind in makers}
    return [make(by_kind[kind]) for kind, make in makers.items() if by_kind[kind]]


def disturbed(timings: Sequence[Timing]) -> list[str]:
    """A line where something else ran during measurements."""
    count = sum(t.disturbed for t in timings)
    return [f"{count} of {len(timings)} timings were disturbed: repeat them while nothing else runs"] if count else []


def missed(timings: Sequence[Timing]) -> list[str]:
    """A line for each target that was not met."""
    lines = []
    for t in timings:
        if t.missed and t.target is not None:
            ratio = t.kind == "layer"
            show = (lambda value: f"{value:.3f}") if ratio else duration
            what = {"layer": "invref / torch", "small": "more than torch", "first": f"first call, {t.contestant}"}[
                t.kind
            ]
            measured = "not measured" if t.measured is None else show(t.measured)
            where = f"{t.activation} {t.dtype} n = {size(t.n)}, {_threads(t.threads)}"
            lines.append(f"MISSED {where}: {what}: {measured}, target {f'{t.target:g}' if ratio else show(t.target)}")
    return lines


def summary(timings: Sequence[Timing]) -> str:
    """How many targets were met."""
    aimed = [t for t in timings if t.target is not None]
    return f"{sum(not t.missed for t in aimed)} of {len(aimed)} targets met"


def screen(sheet: Sheet) -> Table:
    """A table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, title=sheet.title,
                  title_justify="left", title_style="bold")  # fmt: skip
    for place, name in enumerate(sheet.header):
        text = place < sheet.left or name == NOTE
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def markdown(timings: Sequence[Timing], run: dict[str, Any]) -> str:
    """The whole file: title, how to read it, the tables, missed targets, and what it was measured on."""
    lines = [TITLE, "", _TEXT, ""]
    for sheet in sheets(timings):
        marks = ["---" if i < sheet.left or name == NOTE else "---:" for i, name in enumerate(sheet.header)]
        lines += [f"## {sheet.title}", ""]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in (sheet.header, marks, *sheet.rows)]
        lines.append("")
    lines += [f"{summary(timings)}.", ""]
    told = [*missed(timings), *disturbed(timings)]
    lines += [*(f"- {line}" for line in told), ""] if told else []
    return "\n".join([*lines, machine(run), ""])


def machine(run: dict[str, Any]) -> str:
    """What it was measured on, in a sentence."""
    load = "" if run["load"] is None else f"load {run['load']:.2f} at the start, "
    gpu = f", {run['gpu']}" if run.get("gpu") else ""
    return (
        f"torch {run['torch']}, llvmlite {run['llvmlite']}, Python {run['python']}, {run['cpu']}, "
        f"{run['cores']} cores{gpu}, {load}{run['date'][:10]}."
    )


def comma_separated(timings: Sequence[Timing], run: dict[str, Any]) -> str:
    """CSV: one line per contestant and case with everything measured, in seconds, bytes and GB/s."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for timing in timings:
        values: list[Any] = [run.get(name) for name in MACHINE]
        values += [getattr(timing, name) for name in _CASE]
        for name in _SPREADS:
            spread: Spread | None = getattr(timing, name)
            values += [None] * 3 if spread is None else spread.to_json()
        values += [getattr(timing, name) for name in _PLAIN]
        writer.writerow([*values, timing.target, int(timing.missed), timing.note])
    return out.getvalue()


def _layers(timings: list[Timing]) -> Sheet:
    rows = []
    for case in _cases(timings):
        ours, theirs, copied = (_of(case, name) for name in (OURS, THEIRS, COPY))
        rows.append((
            *_where(ours), size(ours.n), _time(ours), _time(theirs), _time(copied), around(ours.ratio), _target(ours),
            _factor(ours.to_copy), _rate(copied), _share(ours), _share(theirs), _note(ours),
        ))  # fmt: skip
    header = (
        "layer", "format", "threads", "n", "invref", "torch", "copy", "invref / torch", "target", "invref / copy",
        "copy GB/s", "invref's share", "torch's share", NOTE,
    )  # fmt: skip
    return _sheet("One layer, forward and backward", header, 2, rows)


def _small(timings: list[Timing]) -> Sheet:
    rows = []
    for case in _cases(timings):
        ours, theirs = _of(case, OURS), _of(case, THEIRS)
        times = _time(ours), _time(theirs), around(ours.overhead, duration), _target(ours)
        rows.append((*_where(ours), str(ours.n), *times, _note(ours)))
    header = ("layer", "format", "threads", "n", "invref", "torch", "more than torch", "target", NOTE)
    return _sheet("A small tensor, forward and backward", header, 2, rows)


def _first(timings: list[Timing]) -> Sheet:
    rows = []
    for case in _cases(timings):
        cold, warm, theirs, loading = (_of(case, name) for name in (COLD, WARM, NATIVE, IMPORT))
        cells = (around(cold.seconds, duration), _target(cold), around(warm.seconds, duration), _target(warm))
        rows.append((*_where(cold), *cells, around(theirs.seconds, duration), _time(loading), _target(loading),
                     cold.note))  # fmt: skip
    header = ("layer", "format", "threads", "nothing compiled yet", "target", "from the cache", "target", NATIVE,
              IMPORT, "target", NOTE)  # fmt: skip
    return _sheet("The first call in a process, forward and backward", header, 2, rows)


def _steps(timings: list[Timing]) -> Sheet:
    rows = []
    for case in _cases(timings):
        base = case[0].kept
        for t in case:
            kept = "-" if t.kept is None else f"{t.kept / 2**20:.1f} MiB"
            part = "-" if t.kept is None or not base else f"{t.kept / base:.3f}"
            cells = (_time(t), around(t.ratio), kept, part, _error(t.error_input), _error(t.error_weight), _note(t))
            rows.append((t.contestant, *_where(t), *cells))
    header = (
        "how", "layer", "format", "threads", "time", "time / torch", "kept for backward", "kept / torch",
        "error of dx", "error of dW", NOTE,
    )  # fmt: skip
    return _sheet("A whole step: linear, activation, linear", header, 3, rows)


def _peers(timings: list[Timing]) -> Sheet:
    rows = [
        (t.contestant, *_where(t), size(t.n), _time(t), around(t.ratio), _error(t.error_input), _note(t))
        for t in timings
    ]
    header = ("peer", "layer", "format", "threads", "n", "time", "time / torch", "error of dx", NOTE)
    return _sheet("What else there is, forward and backward", header, 3, rows)


def _sheet(title: str, header: tuple[str, ...], left: int, rows: Sequence[tuple[str, ...]]) -> Sheet:
    """A table without its last column, the notes, where nobody has one."""
    if any(row[-1] for row in rows):
        return Sheet(title, header, left, rows)
    return Sheet(title, header[:-1], left, [row[:-1] for row in rows])


def _cases(timings: Iterable[Timing]) -> list[list[Timing]]:
    """The timings of each case together."""
    found: dict[tuple[Any, ...], list[Timing]] = {}
    for timing in timings:
        found.setdefault(timing.case, []).append(timing)
    return list(found.values())


def _of(case: Sequence[Timing], contestant: str) -> Timing:
    """A contestant of a case; one without numbers where it has not run."""
    found = next((timing for timing in case if timing.contestant == contestant), None)
    return found or Timing(*case[0].case, contestant, note=case[0].note)


def _where(timing: Timing) -> tuple[str, str, str]:
    return timing.activation, timing.dtype, "-" if timing.device != "cpu" else str(timing.threads)


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _time(timing: Timing) -> str:
    return "-" if timing.seconds is None else duration(timing.seconds.middle)


def _note(timing: Timing) -> str:
    busy = f"{timing.others:.1f} cores busy with other work" if timing.disturbed else ""
    return "; ".join(part for part in (timing.note, busy) if part)


def _target(timing: Timing) -> str:
    if timing.target is None:
        return "-"
    demanded = f"{timing.target:.2f}" if timing.kind == "layer" else duration(timing.target)
    return f"≤ {demanded}{', missed' if timing.missed else ''}"


def _factor(spread: Spread | None) -> str:
    return "-" if spread is None else factor(spread.middle)


def _rate(timing: Timing) -> str:
    return "-" if timing.gigabytes is None else _three(timing.gigabytes)


def _share(timing: Timing) -> str:
    return "-" if timing.share is None else f"{_three(100 * timing.share)} %"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _three(value: float) -> str:
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:.0f}"


def _cells(row: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def write(results: Path, out: Path) -> None:
    """Writes the Markdown of the results in a JSON file."""
    data = json.loads(results.read_text(encoding="utf-8"))
    document.write_text(out, markdown([Timing.from_json(line) for line in data["timings"]], data["run"]))


if __name__ == "__main__":
    if len(sys.argv) not in (1, 3):
        sys.exit("python -m verify.speed_table [RESULTS.json OUT.md]")
    write(*map(Path, sys.argv[1:]) if sys.argv[1:] else (RESULTS, RESULTS.with_suffix(".md")))
