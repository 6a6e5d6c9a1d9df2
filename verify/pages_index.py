"""The index page: every activation in one table, made from the reports' data alone.

Guarantees a plain table without scripts; the few lines of script only sort it. Must not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from verify import pages_html as html
from verify import pages_pictures as pictures
from verify import report
from verify.record import Record

Data = Mapping[str, Any]

DTYPES = ("bfloat16", "float16", "float32")

_SORT = """<script>
document.querySelectorAll('.index th[data-sort] button').forEach(button => button.onclick = () => {
  const th = button.parentElement, body = th.closest('table').tBodies[0], column = th.dataset.sort
  const up = th.getAttribute('aria-sort') != 'ascending'
  const key = row => {
    const v = row.querySelector(`[data-c="${column}"]`)?.dataset.v ?? ''
    return v !== '' && isFinite(v) ? +v : v
  }
  const rows = [...body.rows].sort((a, b) => { const p = key(a), q = key(b)
    return (typeof p == typeof q ? (p > q) - (p < q) : typeof p == 'number' ? -1 : 1) * (up ? 1 : -1) })
  th.closest('thead').querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'))
  th.setAttribute('aria-sort', up ? 'ascending' : 'descending')
  body.append(...rows)
})
</script>
"""


def page(reports: Sequence[Data], training: str = "") -> str:
    """The text of index.html; `training`: where the index of training runs is, if there is one."""
    first = ("activation", "", "pieces", "bits", "decoder in float32")
    above = "".join("<th></th>" for _ in first) + "".join(f'<th colspan="4">{dtype}</th>' for dtype in DTYPES)
    titles = [*first, *(title for _ in DTYPES for title in ("", "floor", "worst", "native"))]
    heads = "".join(_head(i, title) for i, title in enumerate(titles))
    rows = "".join(_row(data) for data in reports)
    body = (
        "<h1>Gradients from outputs: every activation</h1>"
        "<p>How far each layer’s gradient, decoded from its stored output, is from the true derivative. The floor is "
        "what no decoder of that output can beat; native is the error of the framework’s own backward, which keeps the "
        f"input. Bits are side bits per element.</p>{_legend()}{_link(training)}"
        f'<div class="wide index"><table><thead><tr>{above}</tr>\n<tr>{heads}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>{_versions(reports)}"
    )
    return html.document("Every activation", body, _SORT)


def _head(column: int, title: str) -> str:
    if column == 1:
        return "<th></th>"
    label = "" if title else ' aria-label="verdict"'
    kind = ' class="n"' if title not in ("activation", "decoder in float32", "") else ""
    return f'<th{kind} data-sort="{column}"><button{label}>{escape(title) or "●"}</button></th>'


def _row(data: Data) -> str:
    records = {record.dtype: record for record in html.records_of(data)}
    any_record = next(iter(records.values()))
    name = escape(data["activation"])
    widest = max(record.bits for record in records.values())
    decoder = records["float32"].decoder if "float32" in records else any_record.decoder
    shown = escape(decoder + (f" ({data['gain']})" if data["gain"] else ""))
    cells = [
        _cell(0, data["activation"], f'<a href="{name}.html">{name}</a>'),
        f'<td><a href="{name}.html" tabindex="-1">{pictures.thumbnail(data)}</a></td>',
        _cell(2, len(data["pieces"]), str(len(data["pieces"])), "n"),
        _cell(3, widest, str(widest), "n"),
        _cell(4, decoder, shown, "wrap"),
    ]
    for k, dtype in enumerate(DTYPES):
        cells += _of(records.get(dtype), 5 + 4 * k)
    return f"<tr>{''.join(cells)}</tr>\n"


def _of(record: Record | None, column: int) -> list[str]:
    if record is None:
        return ["<td></td>"] * 4
    return [
        _cell(column, record.verdict, html.symbol(record)),
        _cell(column + 1, record.error_floor, report.number(record.error_floor), "n"),
        _cell(column + 2, record.worst_error, report.worst_error(record), "n"),
        _cell(column + 3, record.native_error, report.number(record.native_error), "n"),
    ]


def _cell(column: int, value: Any, shown: str, css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    plain = "" if value is None else f"{value:.3e}" if isinstance(value, float) else str(value)
    return f'<td{kind} data-c="{column}" data-v="{escape(plain)}">{shown}</td>'


def _legend() -> str:
    words = [f'<span class="verdict {w}">{html.SYMBOLS[w]} {w}</span>: {m}' for w, m in html.MEANING.items()]
    return f'<p class="soft">{"; ".join(words)}.</p>'


def _link(training: str) -> str:
    return f'<p><a href="{escape(training)}">Does training notice?</a></p>' if training else ""


def _versions(reports: Sequence[Data]) -> str:
    return f'<p class="soft">{"; ".join(sorted({_line(data) for data in reports}))}</p>' if reports else ""


def _line(data: Data) -> str:
    return ", ".join(f"{escape(str(key))} {escape(str(value))}" for key, value in data["environment"].items())
