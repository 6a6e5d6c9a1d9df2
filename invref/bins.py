"""The binned decoder as data: what any formula, piecewise or not, needs to turn a stored output into a derivative.

A side code names a stretch of the line on which f is monotone; a stretch is served by cells, each with an anchor, an
end of its range of y. The distance d = ±(y - anchor) is looked up by its exponent, and inside an octave by its leading
bits, in a table of small polynomials. This module guarantees that a table is whole (its hash is checked); it must not
know how the numbers were found, nor any kernel.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from invref.decoders import Float, digest, nearest
from invref.errors import FormulaError, TableError

TERMS = 6
"""Coefficients of a bin's polynomial."""
VERSION = 2
"""Of the table's format and meaning; tables of other versions are refused."""


@dataclass(frozen=True)
class Edge:
    """Where one side code ends and the next begins; whether an input equal to it belongs to the right one."""

    at: Fraction
    right_owns: bool

    def threshold(self, kind: Float) -> Any:
        """The largest float of the given kind on the left: inputs above it lie on the right."""
        candidate = nearest(self.at, kind)
        inside = Fraction(float(candidate)) < self.at if self.right_owns else Fraction(float(candidate)) <= self.at
        return candidate if inside else np.nextafter(candidate, kind(-np.inf))


@dataclass(frozen=True, eq=False)
class Cell:
    """f' by d = side * (y - anchor), for outputs from `start` on (up to the next cell of the same code).

    Octave `first` + i of d is split into 2^splits[i] bins, whose polynomials follow one another in `coefficients`
    (rows, TERMS), in ascending powers of z in [-1/2, 1/2), the place inside a bin. Smaller distances decode as
    base + slope * d, larger ones as `limit`. `at` is the anchor's x where many inputs share the outputs next to it
    (turning and flat points), None elsewhere.
    """

    code: int
    start: float
    anchor: Fraction
    side: int
    base: float
    slope: float
    first: int
    splits: tuple[int, ...]
    coefficients: npt.NDArray[np.float32]
    limit: float
    at: Fraction | None
    bound: float
    """Certified sup-norm of |polynomials - f'| in exact arithmetic over the cell; relative where |f'| > 1."""


@dataclass(frozen=True, eq=False)
class Bins:
    """A formula's binned decoder; `codes` gives the side code of each piece of the formula, from the left."""

    name: str
    text: str
    parameters: tuple[tuple[str, Fraction], ...]
    codes: tuple[int, ...]
    edges: tuple[Edge, ...]
    cells: tuple[Cell, ...]

    @property
    def sides(self) -> int:
        """How many side codes there are."""
        return len(self.edges) + 1

    @property
    def bits(self) -> int:
        """Side bits per element."""
        return (self.sides - 1).bit_length()

    @property
    def bound(self) -> float:
        """The certified bound of all cells together."""
        return max(cell.bound for cell in self.cells)

    @property
    def size(self) -> int:
        """Bytes of all coefficients."""
        return sum(cell.coefficients.nbytes for cell in self.cells)

    def cells_of(self, code: int) -> tuple[Cell, ...]:
        """The cells of one side code, by ascending y."""
        return tuple(cell for cell in self.cells if cell.code == code)


def _hex(value: float) -> str:
    return float(value).hex()


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "code": cell.code,
        "start": _hex(cell.start),
        "anchor": str(cell.anchor),
        "side": cell.side,
        "base": _hex(cell.base),
        "slope": _hex(cell.slope),
        "first": cell.first,
        "splits": list(cell.splits),
        "coefficients": base64.b64encode(cell.coefficients.astype("<f4").tobytes()).decode(),
        "limit": _hex(cell.limit),
        "at": None if cell.at is None else str(cell.at),
        "bound": _hex(cell.bound),
    }


def _cell(data: dict[str, Any]) -> Cell:
    numbers = np.frombuffer(base64.b64decode(data["coefficients"]), dtype="<f4").astype(np.float32)
    return Cell(
        code=data["code"],
        start=float.fromhex(data["start"]),
        anchor=Fraction(data["anchor"]),
        side=data["side"],
        base=float.fromhex(data["base"]),
        slope=float.fromhex(data["slope"]),
        first=data["first"],
        splits=tuple(data["splits"]),
        coefficients=numbers.reshape(-1, TERMS),
        limit=float.fromhex(data["limit"]),
        at=None if data["at"] is None else Fraction(data["at"]),
        bound=float.fromhex(data["bound"]),
    )


def to_json(bins: Bins, command: str) -> str:
    """The table's text: the same decoder gives the same bytes."""
    data: dict[str, Any] = {
        "activation": bins.name,
        "formula": bins.text,
        "parameters": {name: str(value) for name, value in bins.parameters},
        "kind": "bins",
        "version": VERSION,
        "command": command,
        "codes": list(bins.codes),
        "edges": [{"at": str(edge.at), "right_owns": edge.right_owns} for edge in bins.edges],
        "cells": [_cell_json(cell) for cell in bins.cells],
    }
    data["sha256"] = digest(data)
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str) -> Bins:
    """A decoder from its table; raises TableError if it is damaged or of another version."""
    try:
        data = json.loads(text)
        sound = data.get("sha256") == digest(data) and data["kind"] == "bins" and data["version"] == VERSION
        name = data.get("activation")
    except (ValueError, AttributeError, KeyError):
        sound, name = False, "an activation"
    if not sound:
        raise TableError(f"the decoder table of {name} is damaged or outdated: restore it or run `make tables`")
    return Bins(
        name=data["activation"],
        text=data["formula"],
        parameters=tuple((key, Fraction(value)) for key, value in data["parameters"].items()),
        codes=tuple(data["codes"]),
        edges=tuple(Edge(Fraction(edge["at"]), edge["right_owns"]) for edge in data["edges"]),
        cells=tuple(map(_cell, data["cells"])),
    )


@cache
def load(name: str) -> Bins:
    """The binned decoder that ships for the activation `name`; FormulaError when there is none."""
    table = resources.files("invref") / "tables" / f"{name}.json"
    if not table.is_file() or '"kind": "bins"' not in (text := table.read_text()):
        raise FormulaError(f"no binned decoder ships for {name!r}: make one with invref.from_formula")
    return from_json(text)
