"""Second derivatives of every layer against the formula's: all inputs in 16 bit, dense windows in float32, float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import records

import invref
from invref import layers
from invref.catalogue import ROWS
from invref.engines import TORCH
from invref.errors import TwiceError
from invref.formats import FORMATS
from invref.kernels import sidebits

CPU = torch.device("cpu")
BENT = [name for name, row in ROWS.items() if row.key and layers.get(row.key).second(torch.float64, CPU) is not None]
STRAIGHT = [name for name, row in ROWS.items() if row.key and name not in BENT]
WINDOW = 1 << 15


def exact(name, x):
    """f'' in float64, NaN at breaks and where float64 does not give it."""
    second = torch.as_tensor(ROWS[name].formula.evaluate(x.double(), TORCH, 2), dtype=torch.float64).expand(x.shape)
    breaks = torch.tensor([float(b.at) for b in ROWS[name].formula.breaks], dtype=torch.float64)
    return torch.where(torch.isin(x.double(), breaks), torch.nan, second)


def decoded(name, x):
    """The decoded f'', and the outputs and codes by which it was, as one number each."""
    layer = layers.get(ROWS[name].key)
    scheme = layer.scheme(x.dtype, CPU)
    y, packed = layer.forward(x), scheme.pack(x)
    codes = 0 if packed is None else sidebits.unpack(packed, x.numel(), scheme.bits).long()
    fmt = next(f for f in FORMATS.values() if f.dtype == x.dtype)
    return layer.second(x.dtype, CPU)(y, packed).double(), fmt.ordinals(y) * 16 + codes


def floor(values, keys):
    """Half the width of f'' over all inputs that share a stored pair, for each input."""
    _, group = torch.unique(keys, return_inverse=True)
    none = torch.full((int(group.max()) + 1,), math.inf, dtype=torch.float64)
    least, most = none.scatter_reduce(0, group, values, "amin"), (-none).scatter_reduce(0, group, values, "amax")
    return ((most - least) / 2)[group]


@pytest.mark.parametrize("fmt", [FORMATS["bfloat16"], FORMATS["float16"]], ids=lambda f: f.name)
@pytest.mark.parametrize("name", [name for name in BENT if name != "relu2"])
def test_over_all_16_bit_inputs_no_decoder_errs_less(name, fmt):
    x = fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    second, keys = decoded(name, x)
    truth = exact(name, x)
    known = truth.isfinite()
    assert second.isfinite().all()
    error, least = (second - truth).abs()[known], floor(truth[known], keys[known])
    # As for f': a tail that reaches 0 may decode to it, and the scalar tail rounds some outputs otherwise.
    assert float(error.max()) <= 1.05 * float(least.max()) + 2.0**-24


def around(name):
    """Windows of consecutive float32 inputs around what matters: turning and flat points, 0, 1, tails."""
    fmt = FORMATS["float32"]
    turning = -1.5 if name == "hardswish" else -1.0
    if "gelu" in name or name in ("silu", "mish"):
        from invref.decoders import load

        turning = float(load({"gelu_10": "gelu"}.get(name, name)).turning_x)
    if name == "tanhshrink":
        # Around its flat point, where all |x| < 3.5e-4 share the output 0.
        return [torch.linspace(-1e-3, 1e-3, 2 * WINDOW)]
    # Wide where the forward errs by ulps, so that most inputs of an output are met: at -3 torch's float32 GELU cancels.
    places = [*((at, WINDOW) for at in (turning, -3.0)), *((at, WINDOW // 16) for at in (0.01, -0.01, 1.0, 4.0, -8.0))]
    return [fmt.tensor(fmt.ordinal(at) - width, 2 * width) for at, width in places]


def carried(name, x):
    """What errors of the forward cost the exact inverse: |f3 / f1| times them, f1 and f3 derivatives, if linear."""
    f, slope, bend, third = (
        torch.as_tensor(ROWS[name].formula.evaluate(x.double(), TORCH, order)).expand(x.shape) for order in range(4)
    )
    off = (layers.get(ROWS[name].key).forward(x).double() - f).abs()
    # Far from a zero of f', that is: there x moves by more than y's error over f'.
    return torch.where(slope.square() > 64 * (bend * off).abs(), (third / slope).abs() * off, 0.0).nan_to_num(0, 0, 0)


@pytest.mark.parametrize("name", BENT)
def test_in_float32_the_exact_inverse_errs_by_no_more_than_twice_the_floor(name):
    # What docs/transforms.md says, to two digits.
    largest = 7.05e-4 if name == "tanhshrink" else 3.45e-4
    if name in ("gelu", "gelu_10") and records()[name, "float32"].forward.endswith("AVX2"):
        largest = 5.15e-4
    for x in around(name):
        second, keys = decoded(name, x)
        truth = exact(name, x)
        known = truth.isfinite()
        error, least = (second - truth).abs()[known], floor(truth[known], keys[known])
        # Twice the floor is the whole width of what shares an output; 2^-20 is float32 arithmetic in the forward, where
        # that does not err by more, and 2^-22 ours.
        arithmetic = (carried(name, x)[known] + 2.0**-22).clamp(min=2.0**-20)
        assert (error <= 2 * float(least.max()) + arithmetic).all()
        assert float(error.max()) <= largest


def test_an_input_of_relu2_whose_square_underflows_counts_as_0():
    second, _ = decoded("relu2", torch.tensor([-1.0, 0.0, 1e-30, 1e-18, 1.0]))
    assert second.tolist() == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("name", BENT)
def test_in_float64_it_is_the_formulas(name):
    x = torch.cat([torch.linspace(-30.0123, 30.0371, 20_001, dtype=torch.float64), *(p.double() for p in around(name))])
    second, _ = decoded(name, x)
    truth = exact(name, x)
    known = truth.isfinite()
    # At a turning point half the digits of x are lost: 2^-26 f'''.
    assert float((second - truth).abs()[known].max()) <= 4 * 2.0**-26


@pytest.mark.parametrize("dtype", [f.dtype for f in FORMATS.values()], ids=list(FORMATS))
@pytest.mark.parametrize("name", BENT)
def test_it_is_finite_everywhere_and_tends_to_0(name, dtype):
    fmt = next(f for f in FORMATS.values() if f.dtype == dtype)
    steps = torch.linspace(fmt.first_ordinal, fmt.largest_ordinal, 20_001, dtype=torch.float64)
    x = fmt.from_ordinals(steps.long().clamp(fmt.first_ordinal, fmt.largest_ordinal))
    second, _ = decoded(name, x)
    assert second.isfinite().all()
    # In 16 bit the outputs of a tail have one code, which decodes to the middle: within the floor, but not to 0.
    if fmt.bits > 16 and name not in ("relu2", "softsign", "sqrtsoftplus"):
        assert float(second[x.abs() > 1e4].abs().max()) <= 2.0**-24


@pytest.mark.parametrize("name", STRAIGHT)
def test_of_a_piecewise_linear_layer_it_is_nothing(name):
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(50, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(ROWS[name].layer(x), x, dy, create_graph=True)
    found = torch.autograd.grad(dx.sum(), (dy, x), allow_unused=True)
    assert torch.equal(found[0], ROWS[name].formula.evaluate(x.detach(), TORCH, 1))
    assert found[1] is None or not found[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_of_a_formula_it_is_the_formulas(dtype):
    act = invref.from_formula("x*erf(log(1+exp(x)))")
    x = torch.cat([torch.linspace(-4, -2, 50), torch.linspace(0, 4, 50)]).to(dtype).requires_grad_()
    (dx,) = torch.autograd.grad(act(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    truth = act.formula.evaluate(x.detach().double(), TORCH, 2)
    # An ulp of the output moves the input by that much over f', and f'' by the third derivative times as much; what
    # shares a code lies within two of them. Then the result is rounded.
    eps = torch.finfo(dtype).eps
    v = x.detach().double()
    y, slope, third = (act.formula.evaluate(v, TORCH, order).abs() for order in (0, 1, 3))
    assert ((second.double() - truth).abs() <= 2 * eps * (y * third / slope + truth.abs()) + eps * eps).all()


def test_a_formula_whose_second_derivative_cannot_be_had_says_so(monkeypatch):
    from invref import custom
    from invref.errors import FormulaError

    act = invref.from_formula("x * sigmoid(1.25 * x)", name="swish")
    act._seconds.clear()
    act._curve = None

    def refuse(formula, order):
        raise FormulaError("float64 is not enough")

    monkeypatch.setattr(custom.stable, "checked", refuse)
    x = torch.ones(3, requires_grad=True)
    (dx,) = torch.autograd.grad(act(x).sum(), x, create_graph=True)
    with pytest.raises(TwiceError, match="float64 is not enough"):
        dx.sum().backward()
