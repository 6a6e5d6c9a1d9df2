"""`invref-verify speed`: what is timed, for how long, and where the results go.

Guarantees that whatever can be wrong with the arguments is found before the work starts, and that a missed target is
printed whatever else is asked for. Must not know how time is taken.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from invref import formats
from invref.catalogue import ROWS, Row
from invref.errors import InputError
from verify import devices, document, speed_cases, speed_clock, speed_first, speed_peers, speed_step, speed_table
from verify.exits import PASSED, VIOLATED
from verify.progress import Bar
from verify.speed_cases import Visits
from verify.speed_compile import reason
from verify.speed_record import COLD, IMPORT, NATIVE, OURS, WARM, Case, Kind, Timing
from verify.speed_stats import spread

NAMES = ("gelu", "gelu_tanh", "silu", "mish")
DTYPES = ("float32", "bfloat16")
SIZES = (1 << 16, 1 << 20, 1 << 22, 1 << 24)
MOST = 1 << 30
PARTS = ("layers", "small", "first", "step")
SECONDS = 2.0
MOST_SECONDS = 3600.0
STEM = "speed"
PIPE = 200
"""Columns of the tables in a pipe."""
Measure = Callable[[Row, int, str, str, int, float], list[Timing] | Visits]
Text = Callable[[list[Timing], dict[str, Any]], str]


def add_to(commands: Any) -> None:
    """Adds the subcommand's grammar to the parser's `commands`."""
    speed = commands.add_parser("speed", help="time layers against torch's own, a plain copy, and a whole step")
    speed.add_argument("names", nargs="*", metavar="NAME", help=f"activation (default: {' '.join(NAMES)})")
    speed.add_argument("--all", action="store_true", help="every activation")
    speed.add_argument(
        "--dtype", nargs="+", default=list(DTYPES), metavar="DTYPE",
        help=f"formats ({', '.join(formats.FORMATS)}; default: {' '.join(DTYPES)})",
    )  # fmt: skip
    speed.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    speed.add_argument(
        "--threads", nargs="+", type=int, metavar="N", help="numbers of threads (1, and as many as there are cores)"
    )
    speed.add_argument(
        "--sizes", nargs="+", type=int, default=list(SIZES), metavar="N",
        help="elements of the tensors (2^16, 2^20, 2^22, 2^24)",
    )  # fmt: skip
    speed.add_argument(
        "--parts", nargs="+", default=list(PARTS), metavar="PART", help=f"what to time ({', '.join(PARTS)}; all)"
    )
    speed.add_argument("--peers", action="store_true", help="time what else is publicly available, too")
    speed.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"for each measurement ({SECONDS:g})"
    )
    speed.add_argument("--strict", action="store_true", help="exit with 1 where a target is missed")
    speed.add_argument("--json", type=document.json_path, metavar="PATH", help="write the measurements to PATH")
    speed.add_argument("--csv", type=Path, metavar="PATH", help="write them as CSV to PATH")
    speed.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables to PATH")
    speed.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios to PATH, an .svg file")
    speed.add_argument("--out", type=Path, metavar="DIR", help=f"write all there is into DIR, as {STEM}.json and so on")
    speed.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit code."""
    works = list(_cases(options))
    outputs = _outputs(options)
    about: dict[str, Any] = {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    if options.device != "cpu":
        about["gpu"] = torch.cuda.get_device_name(options.device)
    start = time.monotonic()
    with Bar() as bar:
        timings = _measured(works, bar.job("speed"))
    about |= {**document.environment(time.monotonic() - start), "triton": document.installed("triton")}
    for path, text in outputs:
        if text is _svg and not any(t.kind == "layer" and t.ratio for t in timings):
            print(f"invref-verify: no layer could be timed: nothing was drawn to {path}", file=sys.stderr)
            continue
        document.write_text(path, text(timings, about))
    # A pipe has no width; what is read there may be as wide as it needs.
    screen = Console() if sys.stdout.isatty() else Console(width=PIPE)
    for sheet in speed_table.sheets(timings):
        screen.print(speed_table.screen(sheet))
        print()
    missed = speed_table.missed(timings)
    print(
        *missed,
        *speed_table.disturbed(timings),
        f"{speed_table.summary(timings)}; {speed_table.machine(about)}",
        sep="\n",
    )
    return VIOLATED if missed and options.strict else PASSED


def _measured(works: Sequence[tuple[Case, Visits]], step: Callable[[int, int], None]) -> list[Timing]:
    """The lines of all measurements, in order, which are gone on with in turns until all have theirs."""
    lines: dict[int, list[Timing]] = {}
    done, total = 0, sum(speed_cases.VISITS if place[0] in speed_cases.VISITED else 1 for place, _ in works)
    while len(lines) < len(works):
        for i, (place, work) in enumerate(works):
            if i in lines:
                continue
            # Told between measurements only: drawing takes a core.
            step(min(done, total), total)
            done += 1
            if (found := _timed(place, work)) is not None:
                lines[i] = found
    step(total, total)
    return [line for i in range(len(works)) for line in lines[i]]


def _cases(options: argparse.Namespace) -> Iterator[tuple[Case, Visits]]:
    """Every measurement, in order; InputError where something cannot be measured."""
    if not 0 < options.seconds <= MOST_SECONDS:
        raise InputError(f"cannot spend {options.seconds:g} seconds: ask for more than 0, up to {MOST_SECONDS:g}")
    wanted = [*(ROWS if options.all else ()), *options.names] or list(NAMES)
    rows = [ROWS[name] for name in _known("activation", wanted, ROWS)]
    dtypes = _known("dtype", options.dtype, formats.FORMATS)
    parts = _known("part", options.parts, PARTS)
    sizes = sorted(set(options.sizes))
    if sizes[0] < 1 or sizes[-1] > MOST:
        wrong = sizes[0] if sizes[0] < 1 else sizes[-1]
        raise InputError(f"cannot time a tensor of {wrong:,} elements: ask for 1 or more, up to {MOST:,}")
    counts, device = _threads(options.threads), str(devices.named(options.device))
    if device != "cpu":
        counts = counts[-1:]
    every = [(row, dtype, count) for row in rows for dtype in dtypes for count in counts]
    most = [(row, dtype, counts[-1]) for row in rows for dtype in dtypes]
    middle = max((size for size in sizes if size <= speed_peers.SIZE), default=sizes[0])
    for part in [part for part in PARTS if part in parts] + ["peers"] * options.peers:
        for row, dtype, count in every if part in ("layers", "small", "peers") else most:
            for n in sizes if part == "layers" else [_SIZES.get(part, middle)]:
                place = _KINDS[part], row.name, dtype, device, count, n
                yield place, _work(_MEASURES[part], row, n, dtype, device, count, options.seconds)


def _work(measure: Measure, *arguments: Any) -> Visits:
    found = measure(*arguments)
    return found if isinstance(found, list) else (yield from found)


def _timed(place: Case, work: Visits) -> list[Timing] | None:
    """A visit with its number of threads: None before the last; where it fails, a line that says why."""
    try:
        with speed_clock.threads(place[4]):
            next(work)
        return None
    except StopIteration as last:
        return list(last.value)
    except Exception as error:  # whatever a layer, a compiler or a device raises: the other cases go on
        return [Timing(*place, COLD if place[0] == "first" else OURS, note=reason(error))]


def _first(row: Row, n: int, dtype: str, device: str, threads: int, _seconds: float) -> list[Timing]:
    call = row.module if row.module.endswith(")") else f"{row.module}()"
    found = speed_first.seconds(call, dtype, device, threads, n=n)
    timing = partial(Timing, "first", row.name, dtype, device, threads, n)
    labels = {COLD: "cold", WARM: "warm", NATIVE: "torch", IMPORT: "import"}
    return [timing(label, rounds=len(found[key]), loops=1, seconds=spread(found[key])) for label, key in labels.items()]


_KINDS: dict[str, Kind] = {"layers": "layer", "small": "small", "first": "first", "step": "step", "peers": "peer"}
_SIZES = {"small": speed_cases.SMALL, "first": speed_first.N, "step": speed_step.TOKENS}
_MEASURES: dict[str, Measure] = {
    "layers": speed_cases.layer,
    "small": speed_cases.small,
    "first": _first,
    "step": speed_step.measure,
    "peers": speed_peers.measure,
}


def _known(what: str, wanted: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names wanted, each once; InputError that offers the nearest for one that is unknown."""
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            remedy = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(f"unknown {what} {name!r}: {remedy}There are {', '.join(names)}")
    return list(dict.fromkeys(wanted))


def _threads(wanted: Sequence[int] | None) -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted(set(wanted or (1, cores)))
    for count in (counts[0], counts[-1]):
        if not 1 <= count <= cores:
            raise InputError(f"cannot time {count} threads on {cores} cores: ask for 1 to {cores}")
    return counts


def _outputs(options: argparse.Namespace) -> list[tuple[Path, Text]]:
    """The files to write and what makes their text; errors where one cannot be written or drawn."""
    paths = {"json": options.json, "csv": options.csv, "md": options.markdown, "svg": options.plot}
    if options.out:
        if any(paths.values()):
            raise InputError("--out names all files: leave out --json, --csv, --markdown and --plot")
        document.make_folder(options.out)
        paths = {ending: options.out / f"{STEM}.{ending}" for ending in paths}
        if "layers" not in options.parts:
            paths["svg"] = None
    if paths["svg"]:
        if paths["svg"].suffix != ".svg":
            raise InputError(f"cannot draw {paths['svg']}: --plot takes the name of an .svg file")
        if "layers" not in options.parts:
            raise InputError("there is nothing to draw without layers: add them to --parts, or leave out --plot")
        _plot()
    chosen = [(Path(path), _MAKERS[ending]) for ending, path in paths.items() if path]
    for path, _ in chosen:
        document.check_writable(path)
    return chosen


def _json(timings: list[Timing], about: dict[str, Any]) -> str:
    content = {"run": about, "timings": [timing.to_json() for timing in timings]}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _svg(timings: list[Timing], about: dict[str, Any]) -> str:
    where = about.get("gpu") or about["cpu"]
    text: str = _plot().svg(timings, f"Forward and backward: medians of pairs, 20 to 80 %; {where}")
    return text


def _plot() -> Any:
    try:
        from verify import speed_plot
    except ImportError as error:
        raise InputError("the picture needs matplotlib: pip install matplotlib, or leave out --plot") from error
    return speed_plot


_MAKERS: dict[str, Text] = {"json": _json, "csv": speed_table.comma_separated, "md": speed_table.markdown, "svg": _svg}
