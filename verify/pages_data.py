"""Everything a report says, as one JSON-ready object: facts, measured numbers, records, versions.

Guarantees that pages can be drawn from it alone, and that dates and timings are in its `run` and nowhere else.
Must not know how a page looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verify import batches, pages_facts, pages_measure
from verify.oracle import Oracle
from verify.record import Record
from verify.targets import Target

Data = dict[str, Any]

KIND = "invref report 1"
"""Marks a data file as ours."""

_TIMED = ("date", "seconds")


def build(target: Target, oracle: Oracle, records: Sequence[Record], run: Mapping[str, Any]) -> Data:
    """The report of one target; `run` is the document's of the run that made `records`."""
    scale = records[0].scale
    measured = pages_measure.Measured(target, oracle, scale)
    drawn = [fmt for fmt in pages_measure.formats_drawn() if fmt.name in {record.dtype for record in records}]
    with batches.one_thread():
        facts = pages_facts.of(target)
        turns = [mark for mark in facts["landmarks"] if mark["kind"] == "turning"]
        data: Data = {
            "kind": KIND,
            "activation": target.name,
            "label": target.label,
            "scale": scale,
            "gain": records[0].gain,
            **facts,
            "axis": {"reach": pages_measure.REACH, "bend": pages_measure.BEND},
            "drawn": list(measured.drawn),
            "curves": measured.curves(),
            "decoded": measured.decoded(),
            "errors": {fmt.name: measured.errors(fmt) for fmt in drawn},
            "zooms": [{fmt.name: measured.zoom(fmt, index) for fmt in drawn} for index in range(len(turns))],
            "special": {fmt.name: measured.special(fmt) for fmt in drawn},
        }
    plain = [record.to_json() for record in records]
    timings = {record["dtype"]: record.pop("seconds") for record in plain}
    tables = run.get("tables", {})
    data["records"] = plain
    data["environment"] = {key: value for key, value in run.items() if key not in (*_TIMED, "tables")}
    data["tables"] = {name: tables[name] for name in sorted(pages_facts.table_names(target)) if name in tables}
    data["run"] = {**{key: run[key] for key in _TIMED if key in run}, "timings": timings}
    return data
