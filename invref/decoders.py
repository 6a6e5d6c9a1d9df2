"""The decoder as data: everything backward needs to turn a stored output into a derivative.

A decoder is read from a table that `python -m invref.fit` generates; nothing in it is typed by hand. This module
guarantees that a table is whole (its hash is checked) and splits the turning value into floats of the format that
computes; it must not know how the numbers were found, nor any kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from invref.errors import FormulaError, TableError

Float = type[np.float32] | type[np.float64]


@dataclass(frozen=True)
class Segment:
    """A rational function of z = u - centre: numerator over 1 + z * denominator, coefficients in ascending powers."""

    centre: float
    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    bound: float
    """Certified sup-norm of |segment - g| in exact arithmetic, over the whole segment."""


DEGREE = 5
CELLS_RIGHT, CELLS_LEFT, CELLS_TAIL = 17, 5, 9
"""With one cell of ones after the first these are 32, what two vector registers hold."""


@dataclass(frozen=True)
class Cells:
    """g on a grid of 32 cells: in each a polynomial in z, ascending powers, times m.

    A place is u * scale + offset, its whole part the cell and the rest z. Right of the turning point u = t with the
    first scale from cell 0 on, at `end_t` reaching a cell of ones; on the left u = -t with the second scale, and for
    outputs above `split` u = sqrt(-y) with the third. m is y in that tail, else 1.
    """

    split: float
    scales: tuple[float, float, float]
    rows: tuple[tuple[float, ...], ...]
    bound: float
    """Certified sup-norm of |cells - g| in exact arithmetic, over everything."""


@dataclass(frozen=True)
class Clamp:
    """Distances d = y - y* below `cut` decode as base + slope * max(d, 0).

    So the lowest codes give the middle of what they stand for, also those that were rounded to below y*.
    """

    cut: float
    base: float
    slope: float = 0.0


@dataclass(frozen=True, eq=False)
class Decoder:
    """g(y, s) of an activation with one smooth minimum, in the signed root t = ±sqrt(y - y*).

    Three segments, each c + m * P(z) / Q(z): `turn` around the turning point (u = t, m = t, c = 0), `tail` for left
    outputs above `tail_y` (u = sqrt(-y), m = y, c = 0) and `head` for t above `head_t` (u = t, m = end_t - t, c = 1;
    exactly 1 from `end_t` on). `series` is the Taylor polynomial of g in t at the turning point, good to
    `series_bound` for |t| <= `series_radius`; float64 uses it there.
    """

    activation: str
    formula: str
    turning_x: str
    turning_y: str
    tail_y: float
    head_t: float
    end_t: float
    tail: Segment
    turn: Segment
    head: Segment
    cells: Cells
    series: tuple[float, ...]
    series_radius: float
    series_bound: float
    clamps: Mapping[str, Clamp]

    def turning_value(self, kind: Float) -> tuple[Any, Any]:
        """y* as an unevaluated sum of two floats of the given kind."""
        exact = Fraction(self.turning_y)
        high = nearest(exact, kind)
        return high, nearest(exact - Fraction(float(high)), kind)

    def threshold(self, kind: Float) -> Any:
        """The largest float of the given kind that is not above x*: inputs above it lie on the right piece."""
        return _not_above(self.turning_x, kind)  # type: ignore[arg-type]


@cache
def _not_above(text: str, kind: Float) -> Any:
    exact = Fraction(text)
    candidate = nearest(exact, kind)
    return candidate if Fraction(float(candidate)) <= exact else np.nextafter(candidate, kind(-np.inf))


def nearest(exact: Fraction, kind: Float) -> Any:
    """`exact` rounded to the nearest float of the given kind, once (a float64 on the way would round twice)."""
    guess = kind(float(exact))
    around = (np.nextafter(guess, kind(-np.inf)), guess, np.nextafter(guess, kind(np.inf)))
    return min(around, key=lambda v: abs(Fraction(float(v)) - exact))


def _hex(value: float) -> str:
    return float(value).hex()


def _segment_json(segment: Segment) -> dict[str, Any]:
    return {
        "centre": _hex(segment.centre),
        "numerator": [_hex(c) for c in segment.numerator],
        "denominator": [_hex(c) for c in segment.denominator],
        "bound": _hex(segment.bound),
    }


def _numbers(texts: list[str]) -> tuple[float, ...]:
    return tuple(map(float.fromhex, texts))


def _segment(data: dict[str, Any]) -> Segment:
    numerator, denominator = _numbers(data["numerator"]), _numbers(data["denominator"])
    return Segment(float.fromhex(data["centre"]), numerator, denominator, float.fromhex(data["bound"]))


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of a table's content, the hash itself left out."""
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_json(decoder: Decoder, command: str) -> str:
    """The table's text: the same decoder gives the same bytes."""
    data: dict[str, Any] = {
        "activation": decoder.activation,
        "formula": decoder.formula,
        "command": command,
        "turning_x": decoder.turning_x,
        "turning_y": decoder.turning_y,
        **{key: _hex(getattr(decoder, key)) for key in ("tail_y", "head_t", "end_t")},
        **{key: _segment_json(getattr(decoder, key)) for key in ("tail", "turn", "head")},
        "cells": {
            "split": _hex(decoder.cells.split),
            "scales": [_hex(c) for c in decoder.cells.scales],
            "rows": [[_hex(c) for c in row] for row in decoder.cells.rows],
            "bound": _hex(decoder.cells.bound),
        },
        "series": [_hex(c) for c in decoder.series],
        "series_radius": _hex(decoder.series_radius),
        "series_bound": _hex(decoder.series_bound),
        "clamps": {name: {key: _hex(v) for key, v in asdict(c).items()} for name, c in decoder.clamps.items()},
    }
    data["sha256"] = digest(data)
    return json.dumps(data, indent=2) + "\n"


def from_json(text: str) -> Decoder:
    """A decoder from its table; raises TableError if the content does not match its hash."""
    data = json.loads(text)
    if data.get("sha256") != digest(data):
        raise TableError(
            f"the decoder table of {data.get('activation')} does not match its hash: restore it or run `make tables`"
        )
    fields: dict[str, Any] = {key: data[key] for key in ("activation", "formula", "turning_x", "turning_y")}
    for key in ("tail_y", "head_t", "end_t", "series_radius", "series_bound"):
        fields[key] = float.fromhex(data[key])
    for key in ("tail", "turn", "head"):
        fields[key] = _segment(data[key])
    cells = data["cells"]
    grid = Cells(
        float.fromhex(cells["split"]),
        _numbers(cells["scales"]),  # type: ignore[arg-type]
        tuple(_numbers(row) for row in cells["rows"]),
        float.fromhex(cells["bound"]),
    )
    clamps = {name: Clamp(*map(float.fromhex, c.values())) for name, c in data["clamps"].items()}
    return Decoder(**fields, cells=grid, series=_numbers(data["series"]), clamps=clamps)


@cache
def load(name: str) -> Decoder:
    """The decoder that ships for the activation `name`; raises FormulaError that lists those there are."""
    tables = resources.files("invref") / "tables"
    table = tables / f"{name}.json"
    if not table.is_file():
        known = ", ".join(sorted(t.name.removesuffix(".json") for t in tables.iterdir() if t.name.endswith(".json")))
        raise FormulaError(f"no decoder table for {name!r}: use one of {known}")
    return from_json(table.read_text())
