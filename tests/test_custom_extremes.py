"""Formulas moved and stretched along x: every binade of float32 and the surroundings of every landmark."""

import pytest
import torch

from invref import custom
from invref.custom import from_formula
from invref.errors import FormulaError, ProofError
from invref.formats import FORMATS
from invref.kernels import binned
from invref.pieces import landmarks

FLOAT32 = FORMATS["float32"]


def sampled(activation):
    drawn = torch.Generator().manual_seed(1)
    spread = torch.randint(FLOAT32.first_ordinal, FLOAT32.largest_ordinal, (1 << 16,), generator=drawn)
    usual = torch.cat([torch.randn(1 << 16, generator=drawn) * size for size in (1, 10, 100)])
    marks = [0.0, *(float(mark.x) for mark in landmarks(activation.formula))]
    around = [torch.arange(-(1 << 14), 1 << 14) + FLOAT32.ordinal(mark) for mark in marks]
    near = [torch.tensor(mark) + torch.linspace(-30, 30, 1 << 14) for mark in marks]
    x = torch.cat([FLOAT32.from_ordinals(torch.cat([spread, *around])), usual, *near]).unique()
    return x[x.isfinite() & ~torch.isin(x.double(), torch.tensor([float(b.at) for b in activation.formula.breaks]))]


def measured(activation):
    """(error, floor): relative to |f'| where that is above 1."""
    x = sampled(activation)
    truth = activation._slope(x.double())
    leaf = x.clone().requires_grad_()
    y = activation(leaf)
    y.sum().backward()
    y = y.detach()
    fine = y.isfinite() & truth.isfinite() & (truth.abs() < 3e38)
    x, y, truth, got = x[fine], y[fine], truth[fine], leaf.grad[fine].double()
    assert got.isfinite().all()
    codes = binned.code_of(binned.thresholds(activation.bins, torch.float32), x)
    _, group = torch.unique(FLOAT32.ordinals(y) * 16 + codes.long(), return_inverse=True)
    none = torch.full((int(group.max()) + 1,), torch.inf, dtype=torch.float64)
    least, most = none.scatter_reduce(0, group, truth, "amin"), (-none).scatter_reduce(0, group, truth, "amax")
    scale = truth.abs().clamp(min=1)
    return float(((got - truth).abs() / scale).max()), float(((most - least) / 2)[group].div(scale).max())


MOVED = [
    "x*sigmoid(x/4)",
    "x*sigmoid(0.1*x)",
    "(x+5)*sigmoid(x+5)",
    "-x*sigmoid(-x/4)",
    "gelu(x+5)",
    "mish(x/4)",
    "x*exp(-x*x/50)",
    "x*tanh(x/8)/(1+x*x/9)",
    "tanh(x)-0.5*tanh(0.5*x)",
    "x*sigmoid(x+50)",
    "x*sigmoid(x/1000)",
    "x*sigmoid(x) + 0.1*tanh(5*x-20)",
]


@pytest.fixture(autouse=True, scope="module")
def cache_directory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("text", MOVED)
def test_gradients_of_moved_and_stretched_formulas(text):
    error, floor = measured(from_formula(text))
    assert error <= max(1.10 * floor, 2.0**-20)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("x*atan(exp(x))", {}, "changes too fast"),
        ("1e300*x", {}, "between 1e-30 and 1e30"),
        ("1e999*x", {}, "between 1e-30 and 1e30"),
        ("1e60*tanh(x)", {}, "between 1e-30 and 1e30"),
        ("1e30*1e30*tanh(x)", {}, "could not be tabulated|loses|scale"),
        ("1e30*1e30*x", {}, "too large"),
        ("where(x>1e-50, x, -x*x)", {}, "between 1e-30 and 1e30"),
        ("where(x>1e-25*1e-25, x, -x*x)", {}, "changes by only"),
        ("where(x>1e30*1e30, x, 2*x)", {}, "float32"),
        ("x*sigmoid(b*x)", {"parameters": {"b": 1e300}}, "between 1e-30 and 1e30"),
        ("exp(" * 40 + "x" + ")" * 40, {}, "nests exp"),
        ("1e6 + gelu(x)", {}, "loses its gradient"),
        ("x*sigmoid(x)", {"parameters": [1]}, "give a dict"),
        ("x*sigmoid(x)", {"parameters": {"b": 2}}, "parameter b does not occur"),
        ("x*sigmoid(b*x)", {"parameters": {"b\n": 2}}, "cannot be the name of a parameter"),
        ("x*sigmoid(b*x)", {"parameters": {3: 2}}, "cannot be the name of a parameter"),
        ("x*sigmoid(x)", {"name": 5}, "cannot be a name"),
        ("x*sigmoid(x)", {"name": "a\nb"}, "cannot be a name"),
        ("x*sigmoid(x)", {"name": "a" * 61}, "cannot be a name"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(text, options, words):
    with pytest.raises(FormulaError, match=words) as caught:
        from_formula(text, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ProofError("a\nb"), OverflowError("a b"), RuntimeError("a b"), ValueError("a b")])
def test_errors_of_the_fitting_name_the_formula(error, monkeypatch):
    def failing(formula):
        raise error

    monkeypatch.setattr(custom.binfit, "fit", failing)
    with pytest.raises(FormulaError, match=r"x\*sigmoid\(x/5\) could not be tabulated \(a b\)"):
        from_formula("x*sigmoid(x/5)")
