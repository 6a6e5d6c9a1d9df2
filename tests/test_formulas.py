"""The catalogue says what it should, text is parsed safely, and the engines agree."""

import time
from fractions import Fraction

import mpmath
import pytest
import torch
from flint import arb
from hypothesis import given, settings
from hypothesis import strategies as st

from invref import formulas
from invref.engines import ARB, MPMATH, SERIES, TORCH, coefficients, expm1, precision, to_arb, variable
from invref.errors import FormulaError
from invref.formulas import CATALOGUE, Formula, X

NAMES = sorted(CATALOGUE)
SMOOTH = [name for name in NAMES if not CATALOGUE[name].breaks]
POINTS = [-38.5, -7.25, -1.2784, -0.7518, -1e-8, 0.0, 1e-300, 0.5, 3.0, 41.0]


def where(condition, yes, no):
    return yes if condition else no


def tanh_gelu(x):
    return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(44715) / 10**6 * x**3)))


def softplus(x):
    return mpmath.log(1 + mpmath.exp(x))


def selu(x):
    alpha, scale = mpmath.mpf("1.6732632423543772848170429916717"), mpmath.mpf("1.0507009873554804934193349852946")
    return scale * where(x > 0, x, alpha * (mpmath.exp(x) - 1))


def xielu(x):
    a, b, eps = mpmath.mpf(8) / 10, mpmath.mpf(1) / 2, -(mpmath.mpf(10) ** -6)
    return where(x > 0, a * x * x + b * x, a * (mpmath.exp(min(x, eps)) - 1 - x) + b * x)


def fast_gelu(x):
    return x / 2 * (1 + mpmath.tanh(x * mpmath.mpf("0.7978845608") * (1 + mpmath.mpf("0.044715") * x * x)))


def laplace(x):
    return (1 + mpmath.erf((x - mpmath.mpf("0.707107")) / (mpmath.mpf("0.282095") * mpmath.sqrt(2)))) / 2


HALF = mpmath.mpf(1) / 2
TEXTBOOK = {
    "celu": lambda x: where(x > 0, x, mpmath.exp(x) - 1),
    "elu": lambda x: where(x > 0, x, mpmath.exp(x) - 1),
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_10": lambda x: where(x > 10, mpmath.mpf(10), x * mpmath.ncdf(x)),
    "gelu_fast": fast_gelu,
    "gelu_new": tanh_gelu,
    "gelu_tanh": tanh_gelu,
    "hardshrink": lambda x: where(abs(x) > HALF, x, 0 * x),
    "hardsigmoid": lambda x: min(max(x / 6 + HALF, 0 * x), 0 * x + 1),
    "hardswish": lambda x: x * min(max(x + 3, 0 * x), 0 * x + 6) / 6,
    "hardtanh": lambda x: min(max(x, 0 * x - 1), 0 * x + 1),
    "laplace": laplace,
    "leaky_relu": lambda x: where(x > 0, x, x / 100),
    "logsigmoid": lambda x: -softplus(-x),
    "mish": lambda x: x * mpmath.tanh(softplus(x)),
    "prelu": lambda x: where(x > 0, x, x / 4),
    "quick_gelu": lambda x: x / (1 + mpmath.exp(-mpmath.mpf("1.702") * x)),
    "relu": lambda x: max(x, 0 * x),
    "relu2": lambda x: max(x, 0 * x) ** 2,
    "relu6": lambda x: min(max(x, 0 * x), 0 * x + 6),
    "selu": selu,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "softplus": lambda x: where(x > 20, x, softplus(x)),
    "softshrink": lambda x: where(x > HALF, x - HALF, where(x < -HALF, x + HALF, 0 * x)),
    "softsign": lambda x: x / (1 + abs(x)),
    "sqrtsoftplus": lambda x: mpmath.sqrt(where(x > 20, x, softplus(x))),
    "tanh": mpmath.tanh,
    "tanhshrink": lambda x: x - mpmath.tanh(x),
    "threshold": lambda x: where(x > 1, x, 0 * x),
    "xielu": xielu,
}
MALICIOUS = [
    "__import__('os').system('true')",
    "x.__class__",
    "(lambda: x)()",
    "[x for x in (1,)]",
    "x if x else 1",
    "9**9**9",
    "((((9**64)**64)**64)**64)**64",
    "((x**64)**64)**64",
    "*".join(["(9**64)"] * 1000),
    "x**x",
    "1e999999999",
    "1" * 9000,
    "-" * 9000 + "x",
    "(" * 4000 + "x" + ")" * 4000,
    "x" + "+x" * 4000,
    "exp(" * 150 + "x" + ")" * 150,
    "x" * 20_000,
    "exp(x, x)",
    "exp(z=x)",
    "exp(*x)",
    "1j * x",
    "True * x",
    "'x'",
    "f'{x}'",
    "0x10 * x",
    "1 / 0 + x",
    "sqrt(-1) * x",
    "log(0) * x",
    "x; x",
    "x\n+ 1",
    "х",  # a Cyrillic letter
    "",
    "(" * 1_000_000 + "x" + ")" * 1_000_000,
    "gelu_tanh(" * 30 + "x" + ")" * 30,
    "silu(x, 2)",
    "elu(x, alpha=x)",
    "elu(x, beta=2)",
    "where(x == 0, x, 0)",
    "where(x > 0, x)",
    "where(x, x, 0)",
    "(x > 0) + x",
    "x > 0",
    "0 < x < 1",
    "where(abs(x) > 0, x, 0)",
    "where(x > sqrt(2), x, 0)",
    "abs(x * x - 1)",
    "maximum(x, exp(x))",
    "relu(x, 2)",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [-30.0, -0.7, 0.1, 5.0])
def test_the_catalogue_is_the_textbook_formula(name, x):
    with mpmath.workdps(3000):  # enough for the cancellation in 1 + erf at laplace's x = -30
        truth = TEXTBOOK[name](mpmath.mpf(x))
        value = CATALOGUE[name].evaluate(mpmath.mpf(x), MPMATH)
        assert abs(value - truth) <= abs(truth) * mpmath.mpf(10) ** -40


def test_every_row_has_its_textbook_formula():
    assert sorted(TEXTBOOK) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_those_of_the_textbook_formula(name, order):
    with mpmath.workdps(60):
        for x in (-2.5, -0.3, 0.25, 1.75, 25.5):
            # mpmath's difference quotient at twice the precision is good to half the digits at least.
            truth = mpmath.diff(TEXTBOOK[name], mpmath.mpf(x), order)
            assert abs(CATALOGUE[name].evaluate(mpmath.mpf(x), MPMATH, order) - truth) < mpmath.mpf(10) ** -30


@pytest.mark.parametrize("text", MALICIOUS, ids=lambda text: repr(text[:20]))
def test_a_malicious_text_is_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(FormulaError) as caught:
        formulas.get(text)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x + eval(x)", r"'eval\(x\)' is not allowed in a formula: use numbers, x, pi"),
        ("2**x", r"write a\*\*b as exp"),
        ("gellu", "unknown activation 'gellu': use one of relu, leaky_relu"),
        ("2 + pi", "does not depend on x"),
        ("where(x > 0, 1, 1)", "does not depend on x"),
        ("x.real", "reaches into an object"),
        ("x + y", "'y' is no variable: write the formula in x, or give y as a parameter"),
        ("sin(x)", "unboundedly many turning points"),
        ("x * cos(x)", "unboundedly many turning points"),
        ("log(x)", "not finite at x = 0"),
        ("1 / x", "not finite at x = 0"),
        ("1 / (x - 0.3)", "not finite at x = 0.3"),
        ("sqrt(x)", "not finite at x = -1e-06"),
        ("x**(1/3)", "not finite at x = -1e-06"),
        ("sqrt(x * x)", r"no derivative at x = 0: declare the break with where\(x > 0"),
        ("(x * x)**(1/2)", "no derivative at x = 0"),
        ("where(x > 0, x**0.5, 0)", "no finite slope at its break x = 0"),
        ("relu(x * x)", r"not a straight line in x: write it with where\(x > c"),
        ("where(abs(x) > 0, x, 0)", "singles out the point x = 0"),
        ("where(x > sqrt(2), x, 0)", "no rational number: write it in decimals"),
        ("elu(x, beta=2)", "elu does not take: it has alpha"),
        ("where(x > 0, 1, 0) + where(x >= 0, 1, 0)", "value of its own at x = 0"),
    ],
)
def test_a_refusal_names_the_offending_piece_and_the_remedy_in_one_line(text, message):
    with pytest.raises(FormulaError, match=message) as caught:
        formulas.get(text)
    assert "\n" not in str(caught.value)


def test_parameters_are_put_in_and_bad_ones_explained():
    assert formulas.get("elu", alpha=0.1).branches[0].expression == Fraction(1, 10) * expm1(X)
    assert formulas.get("softplus", beta=2, threshold=10).breaks[0].at == 5
    assert (
        formulas.define("x * sigmoid(beta * x)", parameters={"beta": "1.702"}).expression
        == formulas.get("quick_gelu").expression
    )
    for name, parameters, message in (
        ("elu", {"beta": 1}, "elu has no parameter 'beta': it has alpha"),
        ("silu", {"beta": 1}, "silu has no parameter 'beta': it has none"),
        ("elu", {"alpha": float("nan")}, "not a finite number"),
        ("elu", {"alpha": "much"}, "not a finite number"),
        ("x * tanh(a * x)", {"a": 10**2000}, "bits: use fewer digits"),
        ("x * tanh(exp * x)", {"exp": 1}, "cannot be the name of a parameter"),
    ):
        with pytest.raises(FormulaError, match=message):
            formulas.get(name, **parameters)


def test_decimal_numbers_are_exact():
    assert formulas.parse("0.044715").p == 8943 and formulas.parse("0.044715").q == 200_000
    assert formulas.parse("0.1 + 0.2 - 0.3") == 0
    assert formulas.parse("1.00000000000000000000000000001") != 1


def test_a_row_a_name_and_a_text_are_all_accepted():
    silu = CATALOGUE["silu"]
    assert formulas.get("silu") is silu and formulas.get(silu) is silu
    assert formulas.get(" x*sigmoid( x ) ").expression == silu.expression


WORDS = [
    "x",
    "0.5",
    "3",
    "-",
    "+",
    "*",
    "/",
    "**",
    "(",
    ")",
    ",",
    ">",
    "<=",
    "exp",
    "where",
    "relu",
    "abs",
    "silu",
    " ",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(WORDS), max_size=14).map("".join)))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_formula_or_a_formula_error(text):
    try:
        formulas.get(text)
    except FormulaError:
        return
    assert text.isascii()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_engines_agree(name, order):
    formula = CATALOGUE[name]
    doubles = formula.evaluate(torch.tensor(POINTS, dtype=torch.float64), TORCH, order)
    for x, double in zip(POINTS, doubles.tolist(), strict=True):
        with precision(400), mpmath.workdps(100):
            number = to_arb(formula.evaluate(mpmath.mpf(x), MPMATH, order))
            ball = formula.evaluate(to_arb(x), ARB, order)
            # 100 digits, less 4 for the squared exponent at x = -38.5; near 0 terms of size 1 may cancel.
            size = ball.abs_upper() + (1 if abs(x) < 1e-6 else 0)
            assert (number - ball).abs_upper() <= size * arb(10) ** -95
            series = coefficients(formula.evaluate(variable(x, 4), SERIES))
            assert (series[order] * (1, 1, 2)[order]).overlaps(ball)
        # About 20 roundings in terms no larger than 8 (1 + |x|), each relative 2^-53.
        assert abs(double - float(number)) <= 160 * (1 + abs(x)) * 2**-53


@pytest.mark.parametrize("name", NAMES)
@given(st.floats(-25, 25), st.floats(0, 3), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_series_over_a_wide_ball_encloses_the_series_at_its_points(name, low, width, share):
    formula = CATALOGUE[name]
    with precision(200):
        point = arb(low) + arb(width) * arb(share)
        wide = coefficients(formula.evaluate(variable(arb(low).union(arb(low) + arb(width)), 8), SERIES))
        inside = coefficients(formula.evaluate(variable(point, 8), SERIES))
        assert all(w.is_finite() and w.overlaps(p) for w, p in zip(wide, inside, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if CATALOGUE[name].breaks])
def test_all_engines_give_a_break_to_its_owner(name):
    formula = CATALOGUE[name]
    for index, border in enumerate(formula.breaks):
        owner = formula.branches[index + border.right_owns]
        at = float(border.at)
        if Fraction(at) != border.at:
            continue
        for order in (0, 1):
            truth = float(owner.evaluate(mpmath.mpf(at), MPMATH, order))
            assert float(formula.evaluate(mpmath.mpf(at), MPMATH, order)) == truth
            with precision(200):
                assert float(formula.evaluate(arb(at), ARB, order).mid()) == pytest.approx(truth, rel=1e-15)
            found = formula.evaluate(torch.tensor([at], dtype=torch.float64), TORCH, order)
            # A few roundings to float64, in terms that cancel at most twofold.
            assert found.item() == pytest.approx(truth, rel=1e-14)
        sides = [float(b.evaluate(mpmath.mpf(at), MPMATH, 1)) for b in formula.branches[index : index + 2]]
        assert list(formula.slopes_at(border)) == pytest.approx(sides, rel=1e-15)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "mish", "quick_gelu", "silu"])
@pytest.mark.parametrize("end", [3.4e38, 1.7e308])
def test_enclosures_stay_finite_and_tight_in_the_far_tails(name, end):
    formula = CATALOGUE[name]
    with precision(128):
        left = coefficients(formula.evaluate(variable(arb(-end).union(arb(-end / 2)), 6), SERIES))
        assert all(c.abs_upper() < 1e-300 for c in left)
        right = coefficients(formula.evaluate(variable(arb(end / 2).union(arb(end)), 6), SERIES))
        # The series' value carries the width of the ball; its slope is 1 up to what a ball's 30-bit radius costs.
        assert (right[1] - 1).abs_upper() < 1e-8
        assert all(c.abs_upper() < 1e-300 for c in right[2:])


def test_every_function_of_the_language_has_the_same_series_as_its_derivatives():
    # sympy's derivatives against the differential equations, at a point where all functions are defined.
    for text in (
        "exp(x)",
        "log(x)",
        "sqrt(x)",
        "erf(x)",
        "erfc(x)",
        "tanh(x)",
        "sigmoid(x)",
        "softplus(x)",
        "expm1(x)",
        "log1p(x)",
        "atan(x)",
        "x**(-2)",
        "x**(3/2)",
        "pi*x",
    ):
        formula = Formula(text, text)
        with precision(200):
            series = coefficients(formula.evaluate(variable(arb("0.7"), 6), SERIES))
            factorial = 1
            for k, coefficient in enumerate(series):
                factorial *= max(k, 1)
                assert (coefficient * factorial).overlaps(formula.evaluate(arb("0.7"), ARB, k)), (text, k)
                assert coefficient.rad() < 1e-50
