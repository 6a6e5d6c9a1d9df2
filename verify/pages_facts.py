"""What is proved or stated about an activation: its formula, pieces, landmarks to 30 digits, and its decoders.

Must not know what was measured, nor how a page looks.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import sympy
import torch

from invref import bins
from invref.bins import Bins, Cell
from invref.decoders import Decoder
from invref.formulas import Formula, X
from invref.kernels.binscheme import Binned
from invref.pieces import Landmark, landmarks, pieces, turning_points
from verify import pages_math
from verify.targets import Target

DIGITS = 30


def of(target: Target) -> dict[str, Any]:
    """The facts, JSON-ready."""
    formula = target.formula
    with mpmath.workdps(DIGITS + 20):
        return {
            "formula": formula.text,
            "parameters": {name: pages_math.decimal(value) for name, value in formula.parameters},
            **notation(formula),
            "pieces": [_piece(p) for p in pieces(formula)],
            "codes": list(target.codes or range(len(pieces(formula)))),
            "landmarks": _landmarks(formula),
            "decoder": _decoder(target),
        }


def notation(formula: Formula) -> dict[str, str]:
    """f and f' as MathML and as LaTeX."""
    lines = []
    for name, order in (("f", 0), ("f′", 1)):
        branches = [pages_math.tree(sympy.diff(branch.expression, X, order)) for branch in formula.branches]
        whole = (
            branches[0]
            if len(branches) == 1
            else pages_math.cases([(branch, _condition(formula, i)) for i, branch in enumerate(branches)])
        )
        lines.append(pages_math.equation(name, whole))
    return {"mathml": pages_math.mathml(*lines), "latex": r" \\ ".join(pages_math.latex(line) for line in lines)}


def _condition(formula: Formula, index: int) -> str:
    """Where a branch holds, as in "−3 < x ≤ 3"."""
    left = formula.breaks[index - 1] if index else None
    right = formula.breaks[index] if index < len(formula.breaks) else None
    if left is None and right is not None:
        return f"x {'<' if right.right_owns else '≤'} {_plain(right.at)}"
    if right is None and left is not None:
        return f"x {'≥' if left.right_owns else '>'} {_plain(left.at)}"
    assert left is not None and right is not None
    before, after = "≤" if left.right_owns else "<", "<" if right.right_owns else "≤"
    return f"{_plain(left.at)} {before} x {after} {_plain(right.at)}"


def _plain(value: Fraction) -> str:
    return pages_math.decimal(value).replace("-", "−")


def _piece(piece: Any) -> dict[str, Any]:
    numbers = {name: _digits(getattr(piece, name)) for name in ("left", "right", "left_limit", "right_limit")}
    return {"index": piece.index, "increasing": piece.increasing, "plateau": piece.plateau, **numbers}


def _landmarks(formula: Formula) -> list[dict[str, Any]]:
    """Where pieces meet: f there (on both sides where it jumps), f'' at turning points, f' on both sides of breaks."""
    parts, smooth = pieces(formula), {point.index: point for point in turning_points(formula)}
    found = []
    for index, mark in enumerate(landmarks(formula)):
        before, after = _digits(parts[index].right_limit), _digits(parts[index + 1].left_limit)
        entry = {"kind": mark.kind, "minimum": mark.minimum, "order": mark.order, "x": _where(mark), "y": before}
        if before != after:
            entry["y_right"] = after
        if index in smooth:
            entry["curvature"] = _digits(smooth[index].curvature)
        if mark.kind == "break":
            parting = next(entry for entry in formula.breaks if entry.at == mark.exact)
            entry["left_slope"], entry["right_slope"] = map(_digits, formula.slopes_at(parting))
        found.append(entry)
    return found


def _where(mark: Landmark) -> str:
    """x of a landmark, exactly where that is a decimal number."""
    exact = "" if mark.exact is None else pages_math.decimal(mark.exact)
    return _digits(mark.x) if "/" in exact or not exact else exact


def fitted(target: Target) -> Decoder | Bins | None:
    """The fitted table behind a layer in float32; None where nothing is fitted."""
    scheme: Any = target.scheme(torch.float32) if target.scheme else None
    scheme = getattr(scheme, "inner", scheme)
    found = getattr(target.layer, "bins", None) or getattr(scheme, "decoder", None)
    if found is None and isinstance(scheme, Binned):
        found = bins.load(target.name)
    return found if isinstance(found, Decoder | Bins) else None


def table_names(target: Target) -> set[str]:
    """The names under which tables that ship may serve a target: its own, and that of a decoder it shares."""
    table = fitted(target)
    shared = {table.activation} if isinstance(table, Decoder) else {table.name} if isinstance(table, Bins) else set()
    return {target.name, *shared}


def _decoder(target: Target) -> list[dict[str, Any]]:
    """One row a part of the fitted decoder: what it is, its degree, and its certified sup-norm."""
    table = fitted(target)
    if isinstance(table, Decoder):
        parts = {name: getattr(table, name) for name in ("tail", "turn", "head")}
        return [
            {
                "part": name,
                "form": "rational, centred",
                "degree": f"{len(s.numerator) - 1}/{len(s.denominator)}",
                "bound": s.bound,
            }
            for name, s in parts.items()
        ]
    return [_cell(cell) for cell in table.cells] if isinstance(table, Bins) else []


def _cell(cell: Cell) -> dict[str, Any]:
    """A row of `_decoder` for one cell of a binned decoder."""
    count, terms = cell.coefficients.shape
    return {
        "part": f"side code {cell.code}, y from {cell.start:.6g}".replace("-", "−").replace("inf", "∞"),
        "form": f"polynomials in {count} bin{'s' * (count > 1)}",
        "degree": str(terms - 1),
        "bound": cell.bound,
    }


def _digits(number: Any) -> str:
    if not mpmath.isfinite(number):
        return "inf" if number > 0 else "-inf"
    if isinstance(number, float):
        return repr(number).removesuffix(".0")
    if number == mpmath.nint(number):
        return str(int(number))
    return str(mpmath.nstr(number, DIGITS, strip_zeros=False))
