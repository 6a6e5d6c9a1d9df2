"""Layers with other parameters than the defaults: the gradient is torch's own in float64, whatever is stored."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as native

from invref import functional
from invref import native as composed
from invref.formats import FORMATS

CASES = [
    *(("elu", {"alpha": a}) for a in (0.5, 2.0, -0.5, 0.0)),
    *(("celu", {"alpha": a}) for a in (0.5, 2.0, -0.5)),
    *(("leaky_relu", {"negative_slope": s}) for s in (0.2, 1.0, 2.0, 0.0, -0.1, -1.0)),
    *(("softplus", {"beta": b, "threshold": t}) for b in (0.3, 1, 5.0, -1.0) for t in (20, 3.0, 0.0, -2.0)),
    *(("threshold", {"threshold": t, "value": v}) for t in (0.1, -1.0, 0.3) for v in (-2.0, 0.1, 0.3, 5.0)),
    *(("hardtanh", {"min_val": a, "max_val": b}) for a, b in ((-0.1, 0.3), (1, 1), (-2, 5), (0.7, 0.9), (0, 0))),
    *(("softshrink", {"lambd": v}) for v in (0.0, 0.1, 3.0)),
    *(("hardshrink", {"lambd": v}) for v in (0.0, 0.1, 3.0, -1.0)),
    *(("laplace", {"mu": m, "sigma": s}) for m, s in ((0.0, 1.0), (-1.0, 0.5), (0.0, -2.0))),
    ("gelu_10", {"min": -3.0, "max": 12.0}),
]
cases = pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)


def pair(name, arguments):
    theirs = getattr(native, name, None) or getattr(composed, name)
    return partial(getattr(functional, name), **arguments), partial(theirs, **arguments)


def run(layer, x, dy=None):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) if dy is None else dy)
    return y.detach(), dx


@cases
def test_in_float64_the_gradient_is_torchs(name, arguments):
    ours, theirs = pair(name, arguments)
    x = torch.linspace(-15.0123, 15.0371, 3001, dtype=torch.float64)
    (y, dx), (expected, slope) = run(ours, x), run(theirs, x)
    assert torch.equal(y, expected)
    # A rounding error of 2^-53 in y moves f' by at most |f'' / f'| <= 10 times as much here, and outputs reach 5e6.
    assert ((dx - slope).abs() <= 1e-13 * (1 + slope.abs() + y.abs())).all()


@cases
@pytest.mark.parametrize("fmt", [FORMATS[n] for n in ("bfloat16", "float16", "float32")], ids=lambda f: f.name)
def test_in_every_format_the_gradient_is_torchs_within_the_formats_rounding(name, arguments, fmt):
    ours, theirs = pair(name, arguments)
    x = torch.cat([torch.linspace(-6.02, 6.03, 2001), torch.tensor([0.0, -0.0, 1e-3, -1e-3])]).to(fmt.dtype)
    (y, dx), (expected, _) = run(ours, x), run(theirs, x)
    slope = run(theirs, x.double())[1]
    assert torch.equal(y.view(fmt.integer), expected.view(fmt.integer))
    # Inputs at a rounded bound lie on the other side of the exact one.
    bounds = [v for key, v in arguments.items() if key in ("threshold", "min_val", "max_val", "lambd")]
    edges = torch.tensor([s * v for v in bounds for s in (1, -1)], dtype=torch.float64)
    counted = ~torch.isin(x, edges.to(fmt.dtype)) & slope.isfinite() & (slope.abs() < 1e3) & dx.isfinite()
    if name == "gelu_10":
        # Left of there torch's float32 GELU errs by more than an ulp, and the turning point is near.
        counted &= x > -0.5
    # An ulp of y through f'' / f' <= 5, and one of dx; for laplace 3 ulp through |z| / sigma with |z| <= 6.
    size = y.double().abs().clamp(min=1) * (18 / abs(arguments["sigma"]) if name == "laplace" else 5)
    assert ((dx.double() - slope).abs() <= 2.0**-fmt.precision * (size + 2 * slope.abs()))[counted].all()


WEIGHTS = [[0.25], [1.5], [-0.5], [0.0], [1e-30], [0.25, -0.5, 2.0], [0.1, 0.0, 3.0]]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [f.dtype for f in FORMATS.values()], ids=list(FORMATS))
@pytest.mark.parametrize("channels_last", [False, True])
def test_prelu_gives_its_weights_gradient_too(weight, dtype, channels_last):
    x = torch.randn(4, 3, 5, 7, dtype=torch.float64).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    dy = torch.randn(4, 3, 5, 7, dtype=torch.float64).to(dtype)
    results = []
    for layer, kind in ((functional.prelu, dtype), (native.prelu, torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        w = torch.tensor(weight, dtype=dtype).to(kind).requires_grad_()
        y = layer(leaf, w)
        y.backward(dy.to(kind))
        results.append((y.detach().double(), leaf.grad.double(), w.grad.double()))
    (y, dx, dw), (_, dx64, dw64) = results
    assert torch.equal(y, native.prelu(x, torch.tensor(weight, dtype=dtype)).double())
    ulp = torch.finfo(dtype).eps
    assert ((dx - dx64).abs() <= ulp * dx64.abs()).all()
    # Each of at most 420 terms has the rounding of y, of which x is the quotient; terms stay below 16.
    assert ((dw - dw64).abs() <= ulp * (dw64.abs() + 420 * 16 / 8)).all()
    assert dw.shape == (len(weight),)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_prelu_keeps_the_output_and_bits_only_where_a_weight_is_negative(weight):
    saved = []
    x, w = torch.randn(2, 3, 100, requires_grad=True), torch.tensor(weight, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = functional.prelu(x, w)
    places = {t.data_ptr() for t in saved}
    lost = 0.0 in weight
    assert (y.data_ptr() in places) is not lost
    assert (x.data_ptr() in places) is lost
    assert any(t.dtype == torch.uint8 for t in saved) is (min(weight) < 0 and not lost)


@pytest.mark.parametrize("dtype", [f.dtype for f in FORMATS.values()], ids=list(FORMATS))
@pytest.mark.parametrize("alphas", [(0.8, 0.8), (0.1, 2.0), (3.0, 0.6)])
def test_xielu_gives_its_parameters_gradients_too(dtype, alphas):
    raw = [math.log(math.expm1(alphas[0])), math.log(math.expm1(alphas[1] - 0.5))]
    x, dy = (2 * torch.randn(5, 401, dtype=torch.float64)).to(dtype), torch.randn(5, 401, dtype=torch.float64).to(dtype)
    results = []
    for layer, kind in ((functional.xielu, dtype), (composed.xielu, torch.float64)):
        leaf = x.detach().to(kind).requires_grad_()
        p, n = (torch.tensor([v], dtype=dtype).to(kind).requires_grad_() for v in raw)
        y = layer(leaf, p, n, torch.tensor(0.5, dtype=kind), torch.tensor(-1e-6, dtype=dtype).to(kind))
        y.backward(dy.to(kind))
        results.append([t.double() for t in (y.detach(), leaf.grad, p.grad, n.grad)])
    (_, dx, dp, dn), (_, dx64, dp64, dn64) = results
    # The error floor at the turning point, sqrt(f'' ulp(y*) / 2) for a rounded y, twice for composed rounding.
    ulp = torch.finfo(dtype).eps
    floor = 2 * math.sqrt(2 * ulp) + 4 * ulp
    assert ((dx - dx64).abs() <= floor * (dy.double().abs() * (1 + dx64.abs()))).all()
    for ours, theirs in ((dp, dp64), (dn, dn64)):
        # Sums of 2,005 terms of both signs, whose errors are at most the floor and mostly an ulp.
        assert (ours - theirs).abs() <= 2005 * 4 * ulp + 0.01 * theirs.abs()
