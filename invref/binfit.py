"""From a formula to its binned decoder: pieces to side codes and cells, bins fitted in exact points, bounds certified.

`python -m invref.binfit NAME ...` writes the tables that ship, byte for byte the same each time. Takes any formula
whose pieces can be isolated, with breaks and plateaus; a side code is spent at every turning point, break and plateau.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from fractions import Fraction
from importlib import resources
from pathlib import Path

import mpmath
import numpy as np
import sympy
from flint import arb

from invref import bincertify, binpoly, formulas
from invref.arcs import BITS, LARGEST, Arc
from invref.bins import TERMS, Bins, Cell, Edge, to_json
from invref.engines import ARB, coefficients, evaluate, precision, to_arb, to_mpf, variable
from invref.errors import FormulaError, ProofError
from invref.formats import FORMATS
from invref.formulas import Formula
from invref.pieces import Landmark, Piece, landmarks, limit, pieces

DIGITS = 60
MOST_CODES = 16
NEARLY_FLAT = 2.0**-6
WORTH_COUNTING = 2.0**-21
"""Where f' is small and changes by more than this within one float32 of y, the outputs there are counted, too."""
LARGEST_FLOAT = float(np.finfo(np.float32).max)
HALVINGS = 60
NARROW = 2.0**-60
"""Of the search for the x in the middle of a piece: y there is rounded to float32 anyway."""


def sides(formula: Formula) -> tuple[tuple[int, ...], tuple[Edge, ...]]:
    """The side code of each piece of a formula, from the left, and the edges between codes."""
    codes, edges = [0], []
    for mark, before in zip(landmarks(formula, DIGITS), pieces(formula, DIGITS), strict=False):
        if mark.kind == "flat":
            codes.append(codes[-1])
        else:
            codes.append(codes[-1] + 1)
            owner = mark.kind == "break" and formula.breaks[before.branch].right_owns
            edges.append(Edge(_exact(mark), owner))
    if codes[-1] >= MOST_CODES:
        raise FormulaError(
            f"{formula.name[:60]} needs {codes[-1] + 1} side codes: use a formula with at most {MOST_CODES}"
        )
    return tuple(codes), tuple(edges)


def fit(formula: str | Formula) -> Bins:
    """The binned decoder of a formula, certified. FormulaError when its slope changes too fast to be tabulated."""
    formula = formulas.get(formula)
    codes, edges = sides(formula)
    parts = pieces(formula, DIGITS)
    cells = [
        cell
        for code in range(codes[-1] + 1)
        for cell in _cells(formula, code, [p for p in parts if codes[p.index] == code])
    ]
    return Bins(formula.name, formula.text, formula.parameters, codes, edges, tuple(cells))


def _exact(mark: Landmark) -> Fraction:
    return mark.exact if mark.exact is not None else _fraction(mark.x)


def _fraction(number: mpmath.mpf) -> Fraction:
    """A number of many digits as a fraction that is as long as its digits."""
    with mpmath.workdps(DIGITS):
        return Fraction(mpmath.nstr(number, DIGITS - 10))


def _cells(formula: Formula, code: int, parts: list[Piece]) -> list[Cell]:
    """The cells of one code by ascending y: each piece is split in the middle where both its ends are finite."""
    if parts[0].plateau:
        return [Cell(code, -math.inf, Fraction(0), 1, 0.0, 0.0, 0, (), _no_rows(), 0.0, None, 0.0)]
    made: list[tuple[float, Arc, Landmark | None]] = []
    marks = landmarks(formula, DIGITS)
    for piece in parts:
        left = marks[piece.index - 1] if piece.index else None
        right = marks[piece.index] if piece.index < len(marks) else None
        for part, *ends in _split(formula, piece, left, right):
            made += _arcs(formula, part, *ends)
    made.sort(key=lambda row: row[0])
    stops = [*(start for start, _, _ in made[1:]), math.inf]
    cells = [_cell(code, *row, _until(*row[:2], stop)) for row, stop in zip(made, stops, strict=True)]
    return [replace(cells[0], start=-math.inf), *cells[1:]]


def _until(start: float, arc: Arc, stop: float) -> float:
    """The largest distance that is looked up on an arc that serves the outputs from start to stop."""
    if arc.last is None:
        return math.inf
    end = stop if arc.side > 0 else start
    return float(abs(Fraction(end) - Fraction(*_ratio(arc.anchor)))) if math.isfinite(end) else math.inf


def _no_rows() -> np.ndarray:
    return np.zeros((0, TERMS), dtype=np.float32)


def _split(
    formula: Formula, piece: Piece, left: Landmark | None, right: Landmark | None
) -> list[tuple[Piece, Landmark | None, Landmark | None]]:
    """A piece with its ends, parted where it is nearly flat: where many inputs share an output inside it."""
    found: list[tuple[Piece, Landmark | None, Landmark | None]] = []
    expression = formula.branches[piece.branch].expression
    arcs = [arc for _, arc, _ in _arcs(formula, piece, left, right)]
    points = sorted((float(arc.x_at(point[0])), abs(point[3])) for arc in arcs for point in arc.scaffold)
    for (a, before), (_, slope), (b, after) in zip(points, points[1:], points[2:], strict=False):
        if not slope < min(before, after, NEARLY_FLAT):
            continue
        x = _inflection(expression, a, b)
        with precision(BITS, 16):
            f = coefficients(evaluate(expression, variable(arb(x), 4), ARB))
            y, ulp = to_mpf(f[0]), FORMATS["float32"].ulp(float(f[0]))
        reach = min((ulp / 2 / max(abs(float(f[3])), 1e-300)) ** (1 / 3), ulp / 2 / max(abs(float(f[1])), 1e-300))
        if 3 * abs(float(f[3])) * reach**2 > WORTH_COUNTING and float(f[0]) != 0:
            mark = Landmark(-1, "flat", mpmath.mpf(x), Fraction(x), 3, False)
            found.append((replace(piece, right=mark.x, right_limit=y), left, mark))
            piece, left = replace(piece, left=mark.x, left_limit=y), mark
    return [*found, (piece, left, right)]


def _inflection(expression: sympy.Expr, a: float, b: float) -> float:
    """Where f'' changes its sign between two inputs."""

    def bend(x: float) -> float:
        with precision(BITS, 16):
            return float(coefficients(evaluate(expression, variable(arb(x), 3), ARB))[2])

    rising = bend(b) > 0
    for _ in range(HALVINGS):
        x = (a + b) / 2
        a, b = (a, x) if (bend(x) > 0) == rising else (x, b)
    return b


def _arcs(
    formula: Formula, piece: Piece, left: Landmark | None, right: Landmark | None
) -> list[tuple[float, Arc, Landmark | None]]:
    """(least y served, arc, anchor's landmark) of a piece between two landmarks."""
    expression = formula.branches[piece.branch].expression
    with precision(BITS, 16):
        ends = [
            (left, piece.left_limit, _anchor(expression, left), 1),
            (right, piece.right_limit, _anchor(expression, right), -1),
        ]
        finite = [end for end in ends if mpmath.isfinite(end[1])]
        if len(finite) == 1:
            mark, y, anchor, direction = finite[0]
            origin = to_arb(mark.x) if mark else _inner(piece)
            arc = _arc(formula, piece, expression, mark, origin, _point(y, anchor), direction, None)
            return [(float(min(piece.left_limit, piece.right_limit)), arc, mark)]
        y, x = _middle(expression, piece)
        if not finite:
            both: list[tuple[float, Arc, Landmark | None]] = []
            for direction in (1, -1):
                arc = _arc(formula, piece, expression, None, x, y, direction, None, regular=True)
                start = -math.inf if arc.side < 0 else float(np.float32(float(y)))
                both.append((start, arc, None))
            return both
        result = []
        for mark, limit_y, anchor, direction in ends:
            at = _point(limit_y, anchor)
            if mark:
                origin = to_arb(mark.x)
                last = math.log(float(abs(x - origin)))
            else:
                origin, last = x, 0.0
            arc = _arc(formula, piece, expression, mark, origin, at, direction, last)
            start = float(y) if arc.side < 0 else float(limit_y)
            result.append((start, arc, mark))
        return result


def _anchor(expression: sympy.Expr, mark: Landmark | None) -> arb | None:
    """f at a landmark on one of its sides."""
    if mark is None:
        return None
    return evaluate(expression, to_arb(_rational(mark)), ARB)


def _rational(mark: Landmark) -> object:
    if mark.exact is None:
        return mark.x
    return sympy.Rational(mark.exact.numerator, mark.exact.denominator)


def _point(limit_y: mpmath.mpf, anchor: arb | None) -> arb:
    return arb((to_arb(limit_y) if anchor is None else anchor).mid())


def _inner(piece: Piece) -> arb:
    """Some x on a piece without finite ends of x at its anchor."""
    if mpmath.isfinite(piece.left):
        return to_arb(piece.left + 1)
    return to_arb(piece.right - 1) if mpmath.isfinite(piece.right) else arb(0)


def _middle(expression: sympy.Expr, piece: Piece) -> tuple[arb, arb]:
    """(y, x) near the middle of a piece's range; y is a float32."""
    lower, upper = sorted((piece.left_limit, piece.right_limit))
    if mpmath.isinf(lower):
        x = _inner(piece)
        return arb(evaluate(expression, x, ARB).mid()), x
    y = arb(float(np.float32(float((lower + upper) / 2))))
    low, high = float(piece.left), float(piece.right)
    if not lower < to_mpf(y) < upper:
        raise FormulaError(
            f"f changes by only {float(upper - lower):.2g} between x = {low:.6g} and {high:.6g}, less than float32 "
            "tells apart there: use a formula without that step"
        )
    low = min(-1.0, high - max(1.0, abs(high))) if math.isinf(low) else low
    high = max(1.0, low + max(1.0, abs(low))) if math.isinf(high) else high

    def above(x: float) -> bool:
        return bool((evaluate(expression, arb(x), ARB) > y) == piece.increasing)

    while mpmath.isinf(piece.left) and above(low) and low > -LARGEST:
        low -= high - low
    while mpmath.isinf(piece.right) and not above(high) and high < LARGEST:
        high += high - low
    end = next((float(side) for side in (piece.left, piece.right) if mpmath.isfinite(side)), 0.0)
    while high - low > NARROW * abs(low - end) and low < (x := (low + high) / 2) < high:
        low, high = (low, x) if above(x) else (x, high)
    return y, arb(low)


def _arc(
    formula: Formula,
    piece: Piece,
    expression: sympy.Expr,
    mark: Landmark | None,
    origin: arb,
    anchor: arb,
    direction: int,
    last: float | None,
    regular: bool = False,
) -> Arc:
    slope_limit = 0.0
    if last is None:
        slope_limit = float(limit(formula, direction, 1))
    side = direction if piece.increasing else -direction
    y = Fraction(*_ratio(anchor))
    return Arc(
        expression, mark is not None or regular, origin, direction, anchor, side, last, slope_limit, _reach(y, side)
    )


def _ratio(number: arb) -> tuple[int, int]:
    p, q = mpmath.libmp.to_rational(number.mid()._mpf_)
    return int(p), int(q)


def _reach(anchor: Fraction, side: int) -> float:
    """The least positive distance from the anchor to a float32 on that side."""
    if anchor == 0:
        return 2.0**-149
    near = np.float32(float(anchor))
    around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    distances = [side * (Fraction(float(v)) - anchor) for v in around]
    return float(min(d for d in distances if d > 0))


def _cell(code: int, start: float, arc: Arc, mark: Landmark | None, until: float) -> Cell:
    octaves = binpoly.octaves(arc)
    base, slope = binpoly.below(arc, octaves[0] if octaves else None)
    rows = np.concatenate([o.rows for o in octaves]).astype(np.float32) if octaves else _no_rows()
    above = arc.limit if arc.last is None else math.inf
    if abs(above) > LARGEST_FLOAT:
        last = float(binpoly.horner(octaves[-1].rows[-1:], np.array([0.5]))[0, 0]) if octaves else base
        above = max(-LARGEST_FLOAT, min(last, LARGEST_FLOAT))
    above = float(np.float32(above))
    anchor = Fraction(*_ratio(arc.anchor))
    if anchor.denominator > 1 << 200 or (mark is not None and mark.exact is None):
        with mpmath.workdps(DIGITS):
            anchor = Fraction(mpmath.nstr(mpmath.mpf(anchor.numerator) / anchor.denominator, DIGITS - 10))
    crowded = mark is not None and (arc.start == (0.0, 0.0) or mark.kind == "flat") and anchor != 0
    return Cell(
        code=code,
        start=start,
        anchor=anchor,
        side=arc.side,
        base=base,
        slope=slope,
        first=octaves[0].exponent if octaves else -127,
        splits=tuple(o.splits for o in octaves),
        coefficients=rows,
        limit=above,
        at=_exact(mark) if crowded and mark is not None else None,
        bound=_bound(arc, octaves, base, slope, above, until),
    )


def _bound(arc: Arc, octaves: list[binpoly.Octave], base: float, slope: float, above: float, until: float) -> float:
    try:
        return bincertify.bound(arc, octaves, base, slope, above, until)
    except ProofError as error:
        raise FormulaError(
            f"f' changes too fast, or is too large, to be tabulated ({error}): use a smoother formula"
        ) from error


def main(names: list[str], folder: Path | None = None) -> None:
    """Write the tables of these formulas of the catalogue into the folder (default: the package's)."""
    folder = folder or Path(str(resources.files("invref") / "tables"))
    for name in names:
        bins = fit(name)
        (folder / f"{name}.json").write_text(to_json(bins, f"python -m invref.binfit {name}"))
        print(f"{name}: {bins.size} bytes, certified |polynomials - f'| <= {bins.bound:.2e}")


if __name__ == "__main__":
    main(sys.argv[1:])
