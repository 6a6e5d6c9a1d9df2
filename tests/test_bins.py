import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from flint import arb

from invref import binpoly, bins, enclosure, formulas, pieces
from invref.arcs import Arc
from invref.binfit import fit, main
from invref.errors import FormulaError, ProofError, TableError
from invref.kernels.binned import tables

SHIPPED = ("tanhshrink", "laplace")


@pytest.fixture(scope="module")
def gelu():
    return fit("gelu")


def test_codes_and_edges_follow_the_landmarks(gelu):
    assert gelu.codes == (0, 1)
    assert gelu.bits == 1
    (edge,) = gelu.edges
    assert math.isclose(float(edge.at), float(pieces.turning_points("gelu")[0].x), rel_tol=2.0**-52)  # one ulp
    assert fit("tanhshrink").codes == (0, 0)
    assert fit("tanhshrink").bits == 0
    assert fit("x*tanh(gelu(x))").codes == (0, 1, 2)
    hardswish = fit("hardswish")
    assert hardswish.codes == (0, 1, 2, 3)
    owners = [b.right_owns for b in formulas.get("hardswish").breaks]
    assert [edge.right_owns for edge in hardswish.edges[::2]] == owners


def test_too_many_codes_are_refused():
    steps = "where(x > 1, x + 1, x)"
    for k in range(2, 18):
        steps = f"where(x > {k}, x + {k}, {steps})"
    with pytest.raises(FormulaError, match="at most 16"):
        fit(steps)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_threshold_is_the_largest_float_on_the_left(kind):
    third = bins.Edge(Fraction(1, 3), False)
    assert Fraction(float(third.threshold(kind))) < Fraction(1, 3)
    assert Fraction(float(np.nextafter(third.threshold(kind), kind(1)))) > Fraction(1, 3)
    assert bins.Edge(Fraction(1), False).threshold(kind) == 1
    assert bins.Edge(Fraction(1), True).threshold(kind) == np.nextafter(kind(1), kind(0))


def test_json_gives_the_decoder_back(gelu):
    text = bins.to_json(gelu, "a command")
    again = bins.from_json(text)
    assert bins.to_json(again, "a command") == text
    assert again.bound == gelu.bound
    assert again.size == gelu.size < 10_000


def test_damage_and_other_versions_are_detected(gelu, monkeypatch):
    text = bins.to_json(gelu, "a command")
    with pytest.raises(TableError, match="gelu is damaged or outdated"):
        bins.from_json(text.replace('"side": 1', '"side": -1', 1))
    with pytest.raises(TableError):
        bins.from_json(text[:1000])
    with pytest.raises(TableError):
        bins.from_json(json.dumps([1]))
    monkeypatch.setattr(bins, "VERSION", bins.VERSION + 1)
    with pytest.raises(TableError):
        bins.from_json(text)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tables_regenerate_to_the_same_bytes(name, tmp_path, capsys):
    main([name], tmp_path)
    table = bins.resources.files("invref") / "tables" / f"{name}.json"
    assert (tmp_path / f"{name}.json").read_text() == table.read_text()
    assert "certified" in capsys.readouterr().out
    assert bins.load(name).text == formulas.get(name).text


def test_tables_that_do_not_ship_are_named():
    with pytest.raises(FormulaError, match="from_formula"):
        bins.load("gelu")
    with pytest.raises(FormulaError, match="from_formula"):
        bins.load("nothing")


@pytest.mark.parametrize("name", ["gelu", "tanhshrink", "hardswish", "x**3 + x", "log(1 + x*x)", "x*(1/2+atan(x)/pi)"])
def test_certified_bounds_are_small_and_hold_at_points(name):
    """Every polynomial in exact arithmetic, at the inverse of random outputs."""
    decoder, formula = fit(name), formulas.get(name)
    assert decoder.bound <= 2.0**-22
    drawn = np.random.default_rng(0)
    for part, code in zip(pieces.pieces(name, 60), decoder.codes, strict=True):
        if part.plateau:
            continue
        for _ in range(20):
            left = float(part.left) if math.isfinite(part.left) else min(float(part.right), 0.0) - 6
            right = float(part.right) if math.isfinite(part.right) else max(float(part.left), 0.0) + 6
            x = float(drawn.uniform(left, right))
            y = enclosure.value(name, x, 40)
            cell = [c for c in decoder.cells_of(code) if c.start <= float(y)][-1]
            slope = float(formula.evaluate(arb(x), formulas.ARB, 1))
            got = evaluated(cell, cell.side * (y - arb(str(cell.anchor.numerator)) / arb(str(cell.anchor.denominator))))
            assert abs(got - slope) / max(1, abs(slope)) <= decoder.bound * (1 + 1e-9) + 1e-15


def evaluated(cell, d):
    exponent = math.floor(math.log2(float(d))) if d > 0 else -1000
    if exponent < cell.first:
        return cell.base + cell.slope * float(d)
    octave = exponent - cell.first
    if octave >= len(cell.splits):
        return cell.limit
    splits = cell.splits[octave]
    place = (d / arb(2) ** exponent - 1) * 2**splits
    j = int(float(place))
    row = sum(1 << k for k in cell.splits[:octave]) + j
    z = float(place - j) - 0.5
    return sum(float(c) * z**k for k, c in enumerate(cell.coefficients[row]))


def test_plateaus_decode_to_zero():
    decoder = fit("where(x > 1, 3, where(x < -1, -1, x + 1))")
    assert decoder.codes == (0, 1, 2)
    assert all(cell.limit == cell.base == 0 and not cell.splits for cell in (decoder.cells[0], decoder.cells[-1]))


def test_a_slope_too_fast_to_tabulate_is_refused():
    with pytest.raises(FormulaError, match="changes too fast"):
        fit("x + 9/10000000 * tanh(1000000 * (x - 1))")


def test_tables_are_small_and_complete(gelu):
    laid_out = tables(gelu)
    assert laid_out.rows.isfinite().all()
    assert laid_out.octaves.numel() == 256 * gelu.sides * laid_out.slots
    assert ((laid_out.octaves >> 5) < len(laid_out.rows)).all()
    assert tables(replace(gelu)) is not laid_out


def test_scaffold_runs_out_to_the_ends():
    arc = Arc(formulas.get("x**3").expression, True, arb(0), 1, arb(0), 1, None, math.inf, 2.0**-149)
    distances = [point[1] for point in arc.scaffold]
    assert distances == sorted(distances)
    assert distances[-1] > 128 * math.log(2)
    # This only places the nodes: what is fitted to them is certified afterwards.
    assert all(math.isclose(float(arc.at(arc.x_at(arc.u_of(d)))[0]), d, rel_tol=1e-2) for d in (1e-9, 1e-3, 1.0, 1e20))


def test_bins_that_end_before_the_next_cell_prove_nothing(monkeypatch):
    octaves = binpoly.octaves
    monkeypatch.setattr(binpoly, "octaves", lambda arc: octaves(arc)[: None if arc.last is None else -1])
    with pytest.raises((FormulaError, ProofError), match="the bins end at distance"):
        fit("x*sigmoid(x/4)")
    monkeypatch.setattr(binpoly, "octaves", lambda arc: [o for o in octaves(arc) if o.exponent != -4])
    with pytest.raises((FormulaError, ProofError), match="a gap at distance"):
        fit("x*sigmoid(x/4)")


def test_a_sharp_step_beside_a_smooth_slope_is_split_further():
    assert fit("x*sigmoid(x) + 0.1*tanh(5*x-20)").bound <= 2.0**-22


@pytest.mark.parametrize("text", ["x*sigmoid(x/1000)", "x*sigmoid(100000*x)", "1e15*tanh(1e-15*x)", "x*sigmoid(x/4)"])
def test_formulas_of_any_scale_are_tabulated(text):
    assert fit(text).bound <= 2.0**-22
