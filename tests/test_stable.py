import pytest
import torch
from flint import arb

from invref import formulas, stable
from invref.engines import ARB, precision
from invref.errors import FormulaError


def errors(function, name, order, x):
    got = function(torch.tensor(x, dtype=torch.float64))
    with precision(2000):
        truth = [float(formulas.get(name).evaluate(arb(v), ARB, order)) for v in x]
    return [abs(a - b) / max(abs(b), 1e-300) for a, b in zip(got.tolist(), truth, strict=True)]


def test_stable_formulas_are_left_alone():
    for order in (0, 1):
        assert stable.checked(formulas.get("gelu"), order).patches == ()


def test_cancellation_is_patched():
    function = stable.checked(formulas.get("sqrt(1+x*x)+x"), 0)
    assert function.patches
    assert max(errors(function, "sqrt(1+x*x)+x", 0, [-1e3, -1e9, -1.7e9, -1e20, -3e38, 1.0, 1e30])) < 2.0**-26


def test_cancellation_near_zero_is_patched():
    function = stable.checked(formulas.get("sqrt(1+x*x)-1"), 0)
    assert max(errors(function, "sqrt(1+x*x)-1", 0, [1e-3, 1e-10, -3.3e-15, 7.0])) < 2.0**-26


def test_infinities_and_nan_pass_through_patches():
    function = stable.checked(formulas.get("sqrt(1+x*x)+x"), 0)
    y = function(torch.tensor([torch.nan, torch.inf, 0.0], dtype=torch.float64))
    assert y[0].isnan() and y[1] == torch.inf and y[2] == 1


def test_slopes_that_overflow_are_patched():
    function = stable.checked(formulas.get("x*tanh(exp(x))"), 1)
    assert function(torch.tensor([800.0, 1e10], dtype=torch.float64)).tolist() == [1.0, 1.0]


def test_what_polynomials_cannot_mend_is_refused(monkeypatch):
    monkeypatch.setattr(stable, "TERMS", 2)
    monkeypatch.setattr(stable, "MOST_HALVINGS", 0)
    with pytest.raises(FormulaError, match="nothing cancels there"):
        stable.checked(formulas.get("sqrt(1+x*x)-1"), 0)
