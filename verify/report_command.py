"""`invref-verify report`: a page, a text and a data file per activation, the index, and the worst inputs.

Guarantees that each file is whole or untouched, and that a second run changes nothing outside the data's `run`.
Must not know how anything is measured or drawn.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from invref import formats
from invref.errors import InputError
from verify import document, foreign, pages_data, pages_html, pages_index, pages_markdown, pages_worst, report, sweep
from verify.exits import PASSED, VIOLATED
from verify.progress import Bar
from verify.record import Record
from verify.targets import TARGETS, Target, resolve

DTYPES = ("bfloat16", "float16", "float32")
SAMPLES = 1_000_000
MOST_SAMPLES = 100_000_000
Run = dict[str, Any]


def add_to(commands: Any) -> None:
    """Adds the subcommand to the command line's grammar."""
    parser = commands.add_parser("report", help="write a page per activation: pictures, verdicts, worst inputs")
    parser.add_argument("names", nargs="*", metavar="NAME", help="activation, as in gelu")
    parser.add_argument("--all", action="store_true", help="every activation")
    parser.add_argument("--formula", metavar="TEXT", help="a formula in x instead: our layer made from it")
    parser.add_argument("--name", help="what to call the formula")
    parser.add_argument("--out", type=Path, default=Path("reports"), metavar="DIR", help="where to write (reports)")
    parser.add_argument("--records", type=Path, metavar="PATH", help="take the records of a former run with --json")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"formats (default: {' '.join(DTYPES)})")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N",
        help=f"inputs checked in float32 ({SAMPLES:,}); the 16-bit formats are checked whole",
    )  # fmt: skip
    parser.add_argument("--json", type=document.json_path, metavar="PATH", help="write the records to PATH as well")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the reports asked for; 1 where a bound is violated, else 0."""
    dtypes = [formats.get(name).name for name in options.dtype or ()]
    if not 1 <= options.samples <= MOST_SAMPLES:
        raise InputError(f"cannot check {options.samples} samples: ask for 1 or more, up to {MOST_SAMPLES:,}")
    targets = _targets(options)
    former = _former(options.records) if options.records else None
    taken = {target.name: _chosen(former[0], target, dtypes) for target in targets} if former else {}
    for target in targets:
        _not_anothers(options.out / f"{target.name}.json", target)
    _prepare(options.out)
    if options.json:
        document.check_writable(options.json)
    start = time.monotonic()
    everything: list[Record] = []
    with Bar() as bar:
        for target in targets:
            if former:
                records, origin = taken[target.name], former[1]
            else:
                records = []
                for dtype in dtypes or DTYPES:
                    step = bar.job(f"{target.name} {dtype}")
                    samples = None if formats.get(dtype).bits == 16 else options.samples
                    records.append(sweep.run(target, dtype, samples=samples, progress=step))
                origin = document.environment(time.monotonic() - start)
            write(options.out, pages_data.build(target, sweep.oracle_of(target.formula), records, origin), records)
            everything += records
    write_index(options.out)
    if options.json:
        document.write_records(options.json, everything, time.monotonic() - start)
    report.show(everything)
    print(f"written to {options.out}: open {options.out / 'index.html'}")
    return PASSED if all(record.passed for record in everything) else VIOLATED


def write(folder: Path, data: Run, records: Sequence[Record]) -> None:
    """Writes one activation's files."""
    name = data["activation"]
    document.write_text(folder / f"{name}.html", pages_html.page(data))
    document.write_text(folder / f"{name}.md", pages_markdown.page(data))
    kept = folder / "worst" / f"{name}.txt"
    document.write_text(kept, pages_worst.merged(kept, name, records))
    # The data last: where it is, the pages are.
    document.write_text(folder / f"{name}.json", to_text(data))


def write_index(folder: Path) -> None:
    """Writes the index over all reports in the folder."""
    document.write_text(folder / "index.html", index(folder))


def index(folder: Path) -> str:
    """The index over all reports in the folder, which leads to that of the training runs where there is one."""
    training = "training/index.html"
    return pages_index.page(reports_in(folder), training if (folder / training).exists() else "")


def reports_in(folder: Path) -> list[Run]:
    """The data of the reports in a folder, in the catalogue's order and others by name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        data = _data(path)
        if data is not None:
            found[path.stem] = data
    order = {name: place for place, name in enumerate(TARGETS)}
    return [found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))]


def _data(path: Path) -> Run | None:
    """The data of a report; None where the file is somebody else's."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("kind") == pages_data.KIND else None


def _not_anothers(path: Path, target: Target) -> None:
    """InputError where the data file would replace a file that is no report, or the report of another formula."""
    if not path.exists():
        return
    data = _data(path)
    if data is None:
        raise InputError(f"{path} is no report: move it, or name another folder with --out")
    if target.role == "formula" and data["formula"] != target.formula.text:
        raise InputError(f"{path} reports another formula, {data['formula'][:60]}: give another --name or --out")


def to_text(data: Run) -> str:
    """The data file's text: a line for each list of numbers, `run` first."""
    ordered = {"run": data["run"], **data}
    text = json.dumps(ordered, indent=1, ensure_ascii=False, allow_nan=False)
    # Lists of plain numbers on one line: short to read, and a change of one number is a change of one line.
    flat = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    return flat + "\n"


def _targets(options: argparse.Namespace) -> list[Target]:
    if options.formula is not None:
        if options.names or options.all:
            raise InputError("--formula reports one formula: leave out the names and --all")
        if not options.formula.strip():
            raise InputError("--formula is empty: give a text after it, or leave it out")
        target = foreign.from_text(options.formula)
        name = options.name or target.name
        if not re.fullmatch(r"\w{1,60}", name) or name in (*TARGETS, "index", "gradient", "native"):
            raise InputError(f"{name!r} cannot name the report: give another with --name, letters and digits only")
        return [replace(target, name=name)]
    if options.name:
        raise InputError("--name is for --formula: activations have their names")
    names = [*(TARGETS if options.all else ()), *options.names]
    if not names:
        raise InputError(
            f"nothing to report: name activations ({', '.join(TARGETS)}), say --all, or give --formula TEXT"
        )
    return resolve(dict.fromkeys(names))


def _former(path: Path) -> tuple[list[Record], Run]:
    """The records of a former run and its `run`; InputError where they belong to other decoders."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records, run_of = document.read(path), dict(content["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the records in {path} ({error}): write them with gradient --json") from None
    now, then = document.tables(), run_of.get("tables", {})
    stale = [name for name in now if then.get(name) != now[name] and any(r.activation == name for r in records)]
    if stale:
        raise InputError(
            f"the records in {path} belong to other decoders of {', '.join(stale)}: run gradient --json again"
        )
    return records, run_of


def _chosen(former: Sequence[Record], target: Target, dtypes: Sequence[str]) -> list[Record]:
    order = list(formats.FORMATS)
    named = [r for r in former if r.activation == target.name and (not dtypes or r.dtype in dtypes)]
    records = [r for r in named if _is_of(r, target)]
    if named and not records:
        raise InputError(
            f"the records of {target.name} are of {named[0].target}, not of {target.label}: run gradient --json on that"
        )
    missing = [dtype for dtype in dtypes if dtype not in {record.dtype for record in records}]
    if missing or not records:
        what = f"{target.name} in {', '.join(missing)}" if missing else target.name
        raise InputError(f"the records say nothing of {what}: leave out --records, or run gradient on it with --json")
    return sorted(records, key=lambda record: order.index(record.dtype))


def _is_of(record: Record, target: Target) -> bool:
    """Whether a record is of this very layer: neither the framework's own, nor someone's, nor of another formula."""
    ours = record.decoder not in ("native", "foreign")
    return ours and (record.target, record.formula) == (target.label, target.formula.text)


def _prepare(folder: Path) -> None:
    document.make_folder(folder / "worst")
    for place in (folder, folder / "worst"):
        document.check_writable(place / "index.html")
