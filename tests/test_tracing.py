import numpy as np
import pytest
import torch

from invref import tracing as m
from invref.custom import from_formula
from invref.errors import FormulaError
from invref.formulas import define


def same(function, text):
    assert define(m.trace(function)).branches == define(text).branches


def test_operators_and_functions():
    same(lambda x: x * m.erf(m.log(1 + m.exp(x))), "x*erf(log(1+exp(x)))")
    same(lambda x: (2 - x) / (3 + x**2) - 1.5, "(2-x)/(3+x**2) - 1.5")
    same(lambda x: -x + (+x) * 2 - abs(x), "-x + x*2 - abs(x)")
    same(lambda x: x * m.sigmoid(-0.5 * x) + m.pi, "x*sigmoid(-x/2) + pi")
    same(lambda x: 1 / (1 + m.exp(-x)), "sigmoid(x)")


def test_pieces():
    same(lambda x: m.where(x > 0, x, m.expm1(x)), "where(x > 0, x, expm1(x))")
    same(lambda x: m.where(x <= -1, 0, m.maximum(x, 0.5)), "where(x <= -1, 0, maximum(x, 0.5))")
    same(lambda x: m.clip(x, -1, 1), "clip(x, -1, 1)")
    same(lambda x: m.where(x > 0, x, 0), "where(x > 0, x, 0)")


def test_names_of_other_libraries():
    same(lambda x: x * torch.tanh(torch.nn.functional.softplus(x)), "x*tanh(softplus(x))")
    same(lambda x: torch.where(x > 0, x, torch.special.expm1(x)), "where(x > 0, x, expm1(x))")
    same(lambda x: x * torch.special.erfc(-x), "x*erfc(-x)")
    same(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "gelu_tanh(x)")
    same(lambda x: torch.nn.functional.elu(x, alpha=2.0), "elu(x, alpha=2)")
    same(lambda x: x.sigmoid() * x, "x*sigmoid(x)")
    same(lambda x: np.float64(2) * x + np.int64(1), "2*x + 1")


def test_helpers_are_called_like_any_function():
    def gate(u):
        return 1 / (1 + m.exp(-u))

    same(lambda x: x * gate(1.5 * x), "x*sigmoid(1.5*x)")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x if x > 0 else 0 * x, "where"),
        (lambda x: m.where(x, 1, 2), "where"),
        (lambda x: x * "a", "neither a number"),
        (lambda x: torch.cumsum(x, 0), "not known"),
        (lambda x: x.shape[0], "could not be traced"),
        (lambda x, y: x + y, "could not be traced"),
        (lambda x: float("nan") * x, "not allowed|no variable|nan"),
        (lambda x: torch.sin(x), "sin"),
        (lambda x: None, "neither a number"),
    ],
)
def test_refusals(function, words):
    with pytest.raises(FormulaError, match=words) as caught:
        define(m.trace(function))
    assert "\n" not in str(caught.value)


def test_growing_without_bound_is_refused():
    def double(x):
        for _ in range(100):
            x = x * x
        return x

    with pytest.raises(FormulaError, match="simplify"):
        m.trace(double)


def test_unknown_names_of_the_module():
    with pytest.raises(AttributeError, match="use exp"):
        m.sinh  # noqa: B018


def test_functions_become_activations(tmp_path, monkeypatch):
    monkeypatch.setenv("INVREF_CACHE", str(tmp_path))

    def serf(x):
        return x * m.erf(m.log(1 + m.exp(x)))

    activation = from_formula(serf)
    assert activation.name == "serf"
    assert torch.equal(activation(torch.ones(3)), from_formula("x*erf(log(1+exp(x)))")(torch.ones(3)))
