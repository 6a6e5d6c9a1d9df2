"""A page for each training run and the index of all, made from the records alone.

`python -m verify.training_page FOLDER` draws anew what belongs to the records in a folder. Guarantees self-contained
files, no address outside, no script, and the same bytes for the same record. Must not know how anything was trained.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from invref.errors import InputError, InvrefError
from verify import document, training_plot, training_record
from verify.exits import BAD_INPUT, PASSED
from verify.pages_html import document as whole
from verify.pages_html import table
from verify.training_findings import (
    INVERTED,
    LEVELS,
    MEANING,
    NATIVE,
    TWIN,
    WORTHLESS,
    Findings,
    Line,
    from_json,
    shown,
)
from verify.training_record import Record, Seed

TITLE = "Does training notice?"
UNFINISHED = "unfinished"
SYMBOLS = {"equivalent": "●", "undecided": "◐", "different": "✕", WORTHLESS: "✕", UNFINISHED: "○"}
"""Told apart without colour."""
CAPTIONS = {
    "loss of each step": "Shaded: from native’s lowest seed to its highest. Arms that training does not notice lie on "
    "one another.",
    "distance of the loss from native's": "Where arms part. What is too small for the digits in the file is not drawn.",
    "distance of the parameters from native's": "The norm of the difference over the norm of native’s parameters.",
    "outcome beside the margin": "Bars: 90 % intervals of the mean difference of runs from the same seed. "
    "An arrow: the bar goes on.",
}
STYLE = """.drawn{max-width:62rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.drawn path{fill:inherit;stroke:inherit;stroke-width:inherit}.drawn svg *{stroke-linejoin:round;stroke-linecap:butt}
.equivalent{color:var(--good)}.undecided,.unfinished{color:var(--some)}.different,.worthless{color:var(--bad)}
.wanted{color:inherit}.lead{font-size:1.05rem}
"""
THEME = {"#0b63c5": "--p1", "#c2410c": "--p0", "#007a5c": "--p2", "#9b3f8f": "--p3", "#7a6a00": "--native",
         "#374151": "--ink", "#9ca3af": "--soft", "#e5e7eb": "--line", "#000000": "--ink",
         "#ffffff": "--card"}  # fmt: skip
"""Colours of the pictures, and what the style sheet of the pages calls them in light and in dark."""


def page(record: Record) -> str:
    """The page of a run."""
    found = _findings(record)
    parts = [_head(record, found), _pictures(record, found)]
    if found is not None:
        parts += [_levels(found), _controls(found), _margins(found)]
    parts += [_seeds(training_plot.used(record, found)), _run(record, found)]
    return whole(title(record), "\n".join(parts), style=STYLE)


def index(records: Mapping[str, Record]) -> str:
    """The page of all runs, by name."""
    header = ("run", "verdict", *LEVELS[:2], "validation loss − native’s", "margin", "controls told apart",
              "parameters", "device", "steps", "seeds", "date")  # fmt: skip
    body = (
        f"<h1>{TITLE}</h1><p>One model trained several times from the same weights on the same batches, with nothing "
        "but the gradient of its activations changed: torch’s own, invref’s, and controls that are wrong on purpose. "
        "A run’s verdict is that of the outcome of invref’s; one step and trajectory are beside it.</p>"
        + table(header, [_row(name, record) for name, record in records.items()], (4, 5, 6, 7, 9, 10))
    )
    return whole(TITLE, body, style=STYLE)


def picture(record: Record) -> str:
    """All pictures of a run on one sheet."""
    return training_plot.sheet(record, _findings(record), title(record))


def title(record: Record) -> str:
    """What a run is called on its page."""
    return f"{TITLE} {record.settings.model}, {record.settings.dtype}"


def records_in(folder: Path) -> dict[str, Record]:
    """The records in a folder by name; files of others are none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = training_record.read(path)
        except (InputError, OSError):
            continue
    return found


def prepare(path: Path) -> None:
    """Makes a record's folder; OutputError where it cannot be written to, InputError where another's index is there."""
    folder = path.parent
    document.make_folder(folder)
    others = folder / "index.html"
    for file in (path, path.with_suffix(".html"), path.with_suffix(".svg"), others):
        document.check_writable(file)
    if others.exists() and f"<title>{TITLE}" not in others.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{others} is not an index of training runs: name another folder with --out")


def write(path: Path) -> None:
    """Writes the page and the picture of a record beside it, and the index of its folder."""
    record = training_record.read(path)
    document.write_text(path.with_suffix(".html"), page(record))
    document.write_text(path.with_suffix(".svg"), picture(record))
    document.write_text(path.with_name("index.html"), index(records_in(path.parent)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the pages of a folder anew."""
    parser = argparse.ArgumentParser(prog="python -m verify.training_page", description=main.__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the records are")
    folder = parser.parse_args(arguments).folder
    try:
        records = records_in(folder)
        if not records:
            raise InputError(
                f"no training record in {folder}: name a folder that invref-verify training --out wrote to"
            )
        for name in records:
            prepare(folder / f"{name}.json")
            write(folder / f"{name}.json")
    except (InvrefError, OSError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return PASSED


def _findings(record: Record) -> Findings | None:
    return None if record.findings is None else from_json(record.findings)


def _head(record: Record, found: Findings | None) -> str:
    settings = record.settings
    if found is None:
        count = len(record.seeds)
        said = f"{_verdict(UNFINISHED)}: {count} seed{'s' * (count != 1)} done, no verdict yet; --resume goes on"
        levels = ""
    else:
        said = f"{_verdict(found.whole)}, {escape(found.reasons)}".replace(" %", "&nbsp;%")
        levels = ", ".join(f"{level}: {_verdict(found.verdict(INVERTED, level))}" for level in LEVELS)
        levels = f"<p>invref’s arm by level: {levels}.</p>"
        if not found.sensed:
            levels += ("<p>The outcome told no control apart: taken alone it says that the margin holds, and no more. "
                       "What tells the controls apart are the other levels.</p>")  # fmt: skip
    return (
        f'<p class="soft"><a href="index.html">All runs</a></p><h1>{escape(title(record))}</h1>'
        f'<p class="lead">{said}.</p>{levels}<p class="soft">{escape(settings.model)}, {settings.parameters:,} '
        f"parameters, {escape(settings.dtype)}, {settings.steps:,} steps of {settings.batch} at a rate of up to "
        f"{settings.rate:g}, on {escape(settings.device)}.</p>"
    )


def _pictures(record: Record, found: Findings | None) -> str:
    if not record.seeds:
        return ""
    figures = [
        f"<figure><b>{escape(name)}</b>{_inlined(svg, f'{title(record)}: {name}')}"
        f"<figcaption>{CAPTIONS[name]}</figcaption></figure>"
        for name, svg in training_plot.pictures(record, found).items()
    ]
    return f'<h2>Pictures</h2><div class="grid-of drawn">{"".join(figures)}</div>'


def _inlined(svg: str, name: str) -> str:
    """A picture as part of a page: in the page's colours, with a name for those who cannot see it."""
    start = svg.index("<svg")
    opened = svg[start:].replace("<svg ", f'<svg class="plot" role="img" aria-label="{escape(name)}" ', 1)
    # Style sheets inside would be the whole page's.
    opened = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", opened, flags=re.DOTALL)
    opened = re.sub(r' xmlns(:\w+)?="[^"]*"', "", opened)
    return re.sub("|".join(THEME), lambda found: f"var({THEME[found[0]]})", opened)


HEADER = ("arm", "level", "quantity", "verdict", "mean", "90 % interval", "allowed", "p", "power", "seeds needed")


def _levels(found: Findings) -> str:
    return (
        "<h2>Levels</h2><p>One step and trajectory: the distance from native over the twin’s. Outcome: the difference "
        "from native of the same seed. Power: the probability to find equivalence with these seeds were there no "
        "difference at all.</p>"
        + table(HEADER, [_line(line) for line in found.lines if line.arm in (INVERTED, TWIN)], range(4, 10))
        + f'<p class="soft">{"; ".join(f"{arm}: {escape(MEANING[arm])}" for arm in (NATIVE, INVERTED, TWIN))}.</p>'
    )


def _line(line: Line, wanted: bool = False) -> tuple[str, ...]:
    """`wanted`: a difference is what the line is for."""
    t = line.test
    allowed = f"±{shown(t.margin)}" if line.level == "outcome" else f"at most {shown(t.margin)}"
    interval = f"{shown(t.low)} to {shown(t.high)}"
    needed = "" if t.verdict != "undecided" else "not known" if t.needed is None else f"{t.needed:,}"
    return (escape(line.arm), line.level, escape(line.quantity), _verdict(t.verdict, wanted), shown(t.mean),
            interval if shown(t.low) != shown(t.high) or t.low == t.high == 0 else shown(t.low), allowed, shown(t.p),
            "> 0.999" if t.power > 0.999 else shown(t.power), needed)  # fmt: skip


def _controls(found: Findings) -> str:
    if not found.controls:
        return "<h2>Controls</h2><p>None: this run cannot show that it would notice anything.</p>"
    rows = []
    for control in found.controls:
        levels = found.told_apart(control)
        said = f"✓ {', '.join(levels)}" if levels else '<span class="verdict different">✕ no level</span>'
        rows.append((escape(control), escape(MEANING.get(control, "")), said))
    lines = [_line(line, wanted=True) for line in found.lines if line.arm in found.controls]
    return (
        "<h2>Controls</h2><p>Wrong on purpose: each must be told apart by some level, or the run is worth nothing.</p>"
        + table(("control", "what is wrong", "told apart by"), rows)
        + f"<details><summary>every quantity of the controls</summary>{table(HEADER, lines, range(4, 10))}</details>"
    )


def _margins(found: Findings) -> str:
    rows = [(escape(name), f"±{shown(m.value)}", escape(m.rule)) for name, m in found.margins.items()]
    return (
        "<h2>Margins of the outcome</h2><p>Fixed by native’s runs alone: a tenth of their standard deviation from seed "
        "to seed, or 0.2&nbsp;% of their mean if that is larger.</p>"
        + table(("outcome", "margin", "the rule that gave it"), rows, (1,))
    )


def _seeds(seeds: Sequence[Seed]) -> str:
    if not seeds:
        return ""
    arms = [run.arm for run in seeds[0].runs]
    rows = [
        (
            str(seed.seed),
            *(_pair(seed, arm) for arm in arms),
            shown(seed.precision),
            shown(seed.batches),
            shown(seed.seconds),
        )
        for seed in seeds
    ]
    header = ("seed", *map(escape, arms), "bfloat16", "batches", "seconds")
    return (
        "<h2>Seeds</h2><p>Validation loss and accuracy at the end, by arm. Beside them, to compare one step’s gradient "
        "with: how far native’s in bfloat16 is from that in float32, and that of one batch from another’s, relative to "
        f"its norm.</p>{table(header, rows, range(1, len(header)))}"
    )


def _pair(seed: Seed, arm: str) -> str:
    run = seed.run(arm)
    return f"{run.loss:.6g} / {run.accuracy:.4g}".replace("nan", "not finite").replace("inf", "not finite")


def _run(record: Record, found: Findings | None) -> str:
    settings, run = record.settings, dict(record.run)
    device = "cpu" if settings.device == "cpu" else "cuda"
    seeds = len(training_plot.used(record, found))
    command = (f"invref-verify training --model {settings.model} --dtype {settings.dtype} --steps {settings.steps} "
               f"--device {device} --seeds {seeds} --out reports/training")  # fmt: skip
    tables = run.pop("tables", {})
    rows = [(escape(str(key)), escape(str(value))) for key, value in run.items()]
    rows += [(f"decoder table {escape(name)}", f"<span class=mono>{escape(str(digest))[:16]}</span>")
             for name, digest in tables.items()]  # fmt: skip
    return (f"<h2>How to see it again</h2><pre><code>{escape(command)}</code></pre>"
            f"<h2>Versions and machine</h2>{table(('', ''), rows)}")  # fmt: skip


def _row(name: str, record: Record) -> tuple[str, ...]:
    settings = record.settings
    link = f'<a href="{escape(name)}.html">{escape(name)}</a>'
    asked = (f"{settings.parameters:,}", escape(settings.device), f"{settings.steps:,}")
    date = escape(str(record.run.get("date", ""))[:10])
    if (found := _findings(record)) is None:
        return (link, _verdict(UNFINISHED), *[""] * 5, *asked, f"{len(record.seeds):,}", date)
    loss = next(line.test for line in found.of(INVERTED, "outcome") if line.quantity == "validation loss")
    told = sum(bool(found.told_apart(control)) for control in found.controls)
    return (link, _verdict(found.whole), *(_verdict(found.verdict(INVERTED, level)) for level in LEVELS[:2]),
            f"{shown(loss.low)} to {shown(loss.high)}", f"±{shown(loss.margin)}", f"{told} of {len(found.controls)}",
            *asked, f"{loss.seeds:,}", date)  # fmt: skip


def _verdict(word: str, wanted: bool = False) -> str:
    """A verdict with its symbol; in plain ink where a difference is what was wanted."""
    return f'<span class="verdict {"wanted" if wanted else word}">{SYMBOLS[word]} {word}</span>'


if __name__ == "__main__":
    sys.exit(main())
