"""Results of `invref-verify memory` as tables: on the screen and as a page. Must not know how anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from verify.memory_measure import (
    AROUND,
    BUDGETED,
    CHECKPOINT,
    COMPILED,
    FORCED,
    FUNCTIONS,
    NATIVE,
    PLANNED,
    Line,
    Result,
)

MIB = 1 << 20
COLUMNS = ("how", "kept MiB", "kept / native", "step", "step / native", "peak MiB")

HEADING = """# What models keep for backward

Made by `{command}` with {versions}. Models are transformers' with random weights, without the head that makes words of
the last layer; bytes are those of unique storages that autograd keeps, parameters and the batch itself left out. Times
are medians of interleaved steps (20 to 80 %), forward and backward; below 1 is faster than native. How to read this and
measure a model of your own: [docs/memory.md](../docs/memory.md).

"""

REFERENCES = """## Beside the published figures

| published for | where | figure | here, as planned | what differs |
| --- | --- | ---: | ---: | --- |
| BERT-base, GELU | arXiv 2407.15545 | -23.1 % | {bert} | theirs: the whole model at its published width; {here} |
| Mistral 7B, SiLU | arXiv 2407.15545 | -15.7 % | {mistral} | theirs: as above, with grouped keys; {here} |

"""


def screen(result: Result) -> Table:
    """One model's contestants."""
    sizes = f"batch {result.batch} x {result.length}, {result.parameters / 1e6:.1f} M parameters, {result.device}"
    table = Table(title=f"{result.model}, {result.dtype}: {sizes}", title_justify="left")
    for number, column in enumerate((*COLUMNS, "note")):
        table.add_column(column, justify="right" if 0 < number < len(COLUMNS) else "left")
    for cells in _rows(result):
        table.add_row(*cells)
    return table


def sites(result: Result) -> Table:
    """One model's activations: what each keeps, and what became of it."""
    table = Table(title=f"{result.model}, {result.dtype}: sites", title_justify="left")
    for column in ("where", "what", "formula", "bits", "native MiB", "inverted MiB", "plan"):
        table.add_column(column, justify="right" if "MiB" in column or column == "bits" else "left")
    for site in result.plan["sites"]:
        table.add_row(*_site(site))
    return table


def markdown(results: Sequence[Result], command: str, about: dict[str, Any]) -> str:
    """The page: a summary, then each model."""
    versions = f"torch {about['torch']}, transformers {about['transformers']}, {about.get('gpu') or about['cpu']}"
    parts = [HEADING.format(command=command, versions=versions), "## Summary\n\n"]
    names = (PLANNED, FORCED, FUNCTIONS, CHECKPOINT, AROUND, COMPILED, BUDGETED)
    shown = [name for name in names if any(result.line(name) for result in results)]
    parts += _table(["model", "format", "dropout", "native MiB", *shown], [_summary(r, shown) for r in results])
    found = {r.model: r for r in results if r.dtype == "float32" and not r.dropout}
    figures = {name: _change(found.get(name)) for name in ("bert", "mistral")}
    parts.append(REFERENCES.format(here="here: two layers, narrower, without dropout and head", **figures))
    for result in results:
        parts.append(f"## {result.model}, {result.dtype}{'' if result.dropout else ', without dropout'}\n\n")
        parts += _table([*COLUMNS, "note"], list(_rows(result)))
        seen = [site for site in result.plan["sites"] if not site["taken"]]
        if seen:
            parts += ["Left native:\n\n", *(f"- `{s['name']}` ({s['what']}): {s['why']}\n" for s in seen), "\n"]
    return "".join(parts)


def said(result: Result) -> str:
    """One model in a line."""
    plan = result.plan
    taken = sum(site["taken"] for site in plan["sites"])
    return (
        f"{result.model}, {result.dtype}: {_change(result)} kept for backward "
        f"({_mib(plan['native'])} to {_mib(plan['planned'])} MiB), "
        f"{taken} of {len(plan['sites'])} activations converted"
    )


def _summary(result: Result, shown: Sequence[str]) -> list[str]:
    native = _mib(result.plan["native"])
    changes = [_percent(line, result) for line in map(result.line, shown)]
    return [result.model, result.dtype, "yes" if result.dropout else "no", native, *changes]


def _percent(line: Line | None, result: Result) -> str:
    if line is None:
        return ""
    return "failed" if line.kept is None else f"{line.kept / result.plan['native'] - 1:+.1%}".replace("%", " %")


def _change(result: Result | None) -> str:
    if result is None:
        return "not measured"
    return f"{result.plan['planned'] / result.plan['native'] - 1:+.1%}".replace("%", " %")


def _rows(result: Result) -> Iterator[list[str]]:
    native = result.plan["native"]
    for line in result.lines:
        kept = ("", "") if line.kept is None else (_mib(line.kept), f"{line.kept / native:.3f}")
        time = "" if line.seconds is None else f"{1e3 * line.seconds[1]:.1f} ms"
        ratio = ""
        if line.ratio is not None:
            low, middle, high = line.ratio
            ratio = "1" if line.name == NATIVE else f"{middle:.3f} ({low:.3f} to {high:.3f})"
        yield [line.name, *kept, time, ratio, "" if line.peak is None else _mib(line.peak), line.note]


def _site(site: dict[str, Any]) -> list[str]:
    bits = "" if site["bits"] is None else str(site["bits"])
    sizes = [_mib(site["before"]), _mib(site["after"])] if bits else ["", ""]
    return [site["name"], site["what"], site["formula"], bits, *sizes, "taken" if site["taken"] else site["why"]]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---" if number == 0 else "---:" for number in range(len(columns))], *rows]
    return [f"| {' | '.join(cells)} |\n" for cells in lines] + ["\n"]


def _mib(count: int) -> str:
    return f"{count / MIB:.2f}"
