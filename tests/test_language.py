"""Piecewise text becomes the right branches; stable rewriting changes how a formula is written, never what it is."""

from fractions import Fraction

import mpmath
import pytest
import sympy
import torch
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st

from invref import formulas
from invref.engines import ARB, MPMATH, TORCH, coefficients, evaluate, precision, to_arb, to_mpf, variable
from invref.errors import FormulaError
from invref.formulas import CATALOGUE, Formula, X
from invref.language import rational
from invref.rewriting import stable
from invref.symbols import erfc, expm1, log1p, sigmoid, softplus, tanh

BREAKS = {
    "abs(x)": [(0, False)],
    "relu(x - 1)": [(1, False)],
    "maximum(x, 0.1 * x)": [(0, False)],
    "minimum(x, 2 - x)": [(1, True)],
    "clip(x, -1, 2)": [(-1, True), (2, False)],
    "where(x > 1, x, 0)": [(1, False)],
    "where(x >= 1, x, 0)": [(1, True)],
    "where(x < 1, x, 0)": [(1, True)],
    "where(x <= 1, x, 0)": [(1, False)],
    "where(abs(x) > 1, x, 0)": [(-1, True), (1, False)],
    "where(-2 * x > 1, x, 0)": [(Fraction(-1, 2), True)],
    "where(x > 0, where(x > 0, x, 5), -x)": [(0, False)],
    "where(x >= 2, relu(x), abs(x))": [(0, False)],
    "where(2 > 1, x, 0)": [],
    "relu6(2 * x - 1)": [(Fraction(1, 2), False), (Fraction(7, 2), True)],
    "leaky_relu(-x, 0.2)": [(0, True)],
}
REWRITTEN = {
    "log(1 + exp(x))": "softplus(x)",
    "log1p(exp(x))": "softplus(x)",
    "log(exp(x) + exp(-x))": "x + softplus(-2*x)",
    "x - log(1 + exp(x))": "-softplus(-x)",
    "1 / (1 + exp(-x))": "sigmoid(x)",
    "exp(x) / (1 + exp(x))": "sigmoid(x)",
    "1 - 1 / (1 + exp(x))": "sigmoid(x)",
    "1 / sqrt(1 + exp(x))": "exp(-softplus(x)/2)",
    "(exp(x) - exp(-x)) / (exp(x) + exp(-x))": "tanh(x)",
    "(exp(2*x) - 1) / (exp(2*x) + 1)": "tanh(x)",
    "2 / (1 + exp(-2*x)) - 1": "tanh(x)",
    "1 + tanh(x)": "2*sigmoid(2*x)",
    "1 - tanh(x)": "2*sigmoid(-2*x)",
    "1 + erf(x)": "erfc(-x)",
    "0.5 - erf(x) / 2": "erfc(x)/2",
    "exp(x) - 1": "expm1(x)",
    "log(1 + x**2)": "log1p(x**2)",
    "log(1 + 1 / (1 + exp(-x)))": "log1p(sigmoid(x))",
    "x * ((1 + exp(x))**2 - 1) / ((1 + exp(x))**2 + 1)": "x*sigmoid(x + softplus(x - log(2)))",
    "x * tanh(log(1 + exp(x)))": "x*tanh(softplus(x))",
    "0.5 * x + 0.5 * x * erf(x)": "x*erfc(-x)/2",
    "x - x * erfc(x) / 2": "x*erfc(-x)/2",
}
NAMES = {"erfc": erfc, "expm1": expm1, "log1p": log1p, "sigmoid": sigmoid, "softplus": softplus, "tanh": tanh}


@pytest.mark.parametrize("text", BREAKS)
def test_breaks_are_where_the_text_says_and_belong_to_the_side_it_says(text):
    formula = Formula(text, text)
    assert [(b.at, b.right_owns) for b in formula.breaks] == BREAKS[text]
    assert len(formula.branches) == len(formula.breaks) + 1


def plain(text, x):
    """The text by Python's own arithmetic on mpmath numbers."""

    def where(condition, yes, no):
        return yes if condition else no

    names = {
        "x": x,
        "where": where,
        "abs": abs,
        "maximum": max,
        "minimum": min,
        "relu": lambda u: max(u, 0),
        "relu6": lambda u: min(max(u, 0), 6),
        "clip": lambda u, low, high: min(max(u, low), high),
        "leaky_relu": lambda u, slope: u if u > 0 else mpmath.mpf(str(slope)) * u,
    }
    return mpmath.mpf(eval(text.replace("0.1", "mpf('0.1')"), {"mpf": mpmath.mpf}, names))


@pytest.mark.parametrize("text", BREAKS)
@given(st.one_of(st.floats(-5, 5), st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0, 3.5])))
@settings(max_examples=40, deadline=None)
def test_a_piecewise_text_has_the_value_that_it_says_on_every_engine(text, x):
    formula = Formula(text, text)
    with mpmath.workdps(60), precision(200):
        truth = plain(text, mpmath.mpf(x))
        assert abs(formula.evaluate(mpmath.mpf(x), MPMATH) - truth) <= abs(truth) * mpmath.mpf(10) ** -55
        assert formula.evaluate(arb(x), ARB).overlaps(to_arb(truth))
        # Two roundings.
        found = formula.evaluate(torch.tensor([x], dtype=torch.float64), TORCH)
        assert found.item() == pytest.approx(float(truth), rel=2**-51, abs=1e-300)


@pytest.mark.parametrize("name", [name for name, row in CATALOGUE.items() if row.breaks])
@given(st.floats(-25, 25), st.floats(1e-9, 8), st.floats(0, 1), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_a_ball_across_breaks_holds_all_values_and_all_series(name, low, width, share, order):
    formula = CATALOGUE[name]
    with precision(100):
        wide = arb(low).union(arb(low) + arb(width))
        point = (arb(low) + arb(width) * arb(share)).mid()
        assert formula.evaluate(wide, ARB, order).overlaps(formula.evaluate(point, ARB, order))
        for over, at in zip(
            coefficients(formula.evaluate(variable(wide, 4), ARB)),
            coefficients(formula.evaluate(variable(point, 4), ARB)),
            strict=True,
        ):
            assert over.overlaps(at)


def test_a_tensor_keeps_its_nan_and_its_infinities_choose_the_outer_branches():
    x = torch.tensor([float("nan"), float("-inf"), float("inf")], dtype=torch.float64)
    value = CATALOGUE["hardtanh"].evaluate(x, TORCH)
    assert torch.isnan(value[0]) and value[1:].tolist() == [-1, 1]


def test_a_break_that_no_float_is_parts_the_floats_on_its_two_sides():
    formula = Formula("", "where(x > 0.1, 1, 0) * exp(0 * x)")
    below = 0.1 if Fraction(0.1) < Fraction(1, 10) else 0.09999999999999999
    x = torch.tensor([below, 0.1 + 2**-55], dtype=torch.float64)
    assert formula.evaluate(x, TORCH).tolist() == [0, 1]
    assert formula.branch_of(below) == 0 and formula.branch_of(0.1 + 2**-55) == 1


@pytest.mark.parametrize("text", REWRITTEN)
def test_what_loses_digits_in_a_tail_is_written_stably(text):
    expected = sympy.sympify(REWRITTEN[text], locals={**NAMES, "x": X})
    assert formulas.define(text).expression == expected


@pytest.mark.parametrize("text", REWRITTEN)
@given(st.floats(-30, 30))
@settings(max_examples=30, deadline=None)
def test_stable_rewriting_changes_no_value(text, x):
    written = sympy.sympify(text, locals={**NAMES, "x": X}, rational=True)
    with precision(400):
        at = arb(x)
        assert evaluate(written, at, ARB).overlaps(evaluate(formulas.define(text).expression, at, ARB))


PARTS = st.recursive(
    st.sampled_from(
        [X, sympy.exp(X), sympy.exp(-X), sympy.exp(2 * X), sympy.Integer(1), sympy.Integer(2), -sympy.Integer(1)]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] + p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] * p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] / (1 + sympy.exp(X)) + p[1] * sympy.exp(X)),
        inner.map(lambda p: 1 / (2 + sympy.exp(X) + p**2)),
        inner.map(lambda p: tanh(p) + 1),
        inner.map(lambda p: sympy.log(1 + sympy.exp(p))),
        inner.map(lambda p: 1 - sympy.erf(p)),
    ),
    max_leaves=6,
)


@given(PARTS, st.fractions(-4, 4, max_denominator=1000))
@settings(max_examples=150, deadline=None)
def test_any_expression_keeps_its_value_when_it_is_written_stably(expression, x):
    with precision(2000):
        at = to_arb(rational(x))
        before, after = evaluate(expression, at, ARB), evaluate(stable(expression), at, ARB)
        assert not before.is_finite() or (after.is_finite() and before.overlaps(after))


@pytest.mark.parametrize(
    "texts",
    [
        ["x*tanh(log(1+exp(x)))", "mish(x)", "x*((1+exp(x))**2-1)/((1+exp(x))**2+1)", "x*tanh(softplus(x))"],
        ["x/(1+exp(-x))", "x*exp(x)/(1+exp(x))", "x*(1+tanh(x/2))/2", "silu(x)"],
        ["x*(1+erf(x/sqrt(2)))/2", "x*erfc(-x/sqrt(2))/2", "x - x*erfc(x/sqrt(2))/2"],
    ],
)
def test_the_tails_do_not_depend_on_how_a_formula_was_written(texts):
    x = torch.tensor([-700.0, -300.0, -38.0, -20.0, -1.0, 1e-3, 20.0, 300.0, 800.0, 1e30], dtype=torch.float64)
    values = [formulas.define(text).evaluate(x, TORCH) for text in texts]
    for at, *found in zip(x.tolist(), *(v.tolist() for v in values), strict=True):
        with precision(4000):
            truth = float(formulas.define(texts[0]).evaluate(arb(at), ARB).mid())
        # exp of an argument up to 722 rounded once: 722 ulp; and subnormals.
        assert found == pytest.approx([truth] * len(found), rel=1000 * 2**-52, abs=1e-300)


@pytest.mark.parametrize("x", [1e30, -1e30, 1e300, -1e300])
def test_mpmath_does_not_hang_on_towers_of_exponentials(x):
    formula = formulas.define("x*tanh(exp(x))")
    with mpmath.workdps(50):
        found = [formula.evaluate(mpmath.mpf(x), MPMATH, order) for order in (0, 1)]
    assert found == ([x, 1] if x > 0 else found)


def test_macros_take_parameters_and_refuse_wrong_ones():
    assert formulas.define("elu(x, alpha=2)").branches[0].expression == 2 * expm1(X)
    assert formulas.define("leaky_relu(x, 0.2)").branches[0].expression == X / 5
    assert formulas.define("swish(x)").expression == CATALOGUE["silu"].expression
    assert not formulas.define("softplus(x)").breaks and formulas.define("softplus(x, 1, 20)").breaks
    with pytest.raises(FormulaError, match=r"wrong number of arguments: silu\(x\)"):
        formulas.define("silu(x, 1)")


def test_exact_values_at_zero_are_exact():
    for function, value in ((sigmoid, sympy.Rational(1, 2)), (tanh, 0), (softplus, sympy.log(2)), (erfc, 1)):
        assert function(sympy.Integer(0)) == value
    assert expm1(sympy.Integer(0)) == log1p(sympy.Integer(0)) == 0
    with mpmath.workdps(30):
        assert to_mpf(CATALOGUE["tanhshrink"].evaluate(arb(0), ARB)) == 0
