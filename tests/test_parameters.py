"""Layers with other parameters than the defaults: the gradient is torch's own in float64, whatever is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
from torch.nn import functional as native

from invref import functional
from invref import native as composed
from invref.errors import FormulaError, InputError
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels import closed, codes, xielu

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
    counted = ~torch.isin(x, edges.to(fmt.dtype)) & slope.isfinite() & (slope.abs() < 1e3)
    assert dx[counted].isfinite().all()
    # An ulp of y through f'' / f' <= 5, and one of dx; for laplace 3 ulp through |z| / sigma with |z| <= 6.
    size = y.double().abs().clamp(min=1) * (18 / abs(arguments["sigma"]) if name == "laplace" else 5)
    slack = 2.0**-fmt.precision * (size + 2 * slope.abs())
    if name == "gelu_10":
        # Left of 0 torch's float32 GELU errs by up to 13 * 2^-24 (at x = -6 by cancellation), and 16-bit outputs by an
        # ulp, of which f'' / f' comes through, and at the turning point sqrt(2 f'' d), with f'' <= 0.8.
        wide = x.double().requires_grad_()
        (first,) = torch.autograd.grad(native.gelu(wide).sum(), wide, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), wide)
        d = max(2.0**-fmt.precision, 2.0**-20)
        slack += torch.where(x < 0, (d * (second / slope).abs()).clamp(max=math.sqrt(1.6 * d)), 0.0)
        assert (counted & (x > -0.76) & (x < -0.74)).sum() >= 3
    assert ((dx.double() - slope).abs() <= slack)[counted].all()


NAN, INFINITE = math.nan, math.inf
REFUSED = [
    *(("elu", {"alpha": a}) for a in (NAN, INFINITE, -INFINITE, 1e30, -1025.0)),
    *(("celu", {"alpha": a}) for a in (NAN, INFINITE)),
    *(("softplus", {"beta": b}) for b in (NAN, INFINITE, -INFINITE)),
    *(("laplace", {"mu": m, "sigma": s}) for m, s in ((NAN, 1.0), (INFINITE, 1.0), (0.0, NAN), (0.0, INFINITE))),
    *(("gelu_10", {"min": a, "max": b}) for a, b in ((NAN, 10.0), (-10.0, NAN))),
    ("hardshrink", {"lambd": NAN}),
]


@pytest.mark.parametrize(("name", "arguments"), REFUSED, ids=str)
def test_parameters_that_no_decoder_serves_are_refused_in_a_line_with_the_remedy(name, arguments):
    with pytest.raises(FormulaError, match="torch's own layer") as caught:
        getattr(functional, name)(torch.zeros(3, requires_grad=True), **arguments)
    assert "\n" not in str(caught.value)


SPECIAL = [
    *(("threshold", {"threshold": t, "value": v}) for t in (0.0, NAN, INFINITE) for v in (NAN, INFINITE, -INFINITE)),
    *(("leaky_relu", {"negative_slope": s}) for s in (NAN, INFINITE, -INFINITE)),
    *(("hardtanh", {"min_val": a, "max_val": b}) for a, b in ((-INFINITE, INFINITE), (-1, INFINITE), (-INFINITE, 1))),
    *(("hardshrink", {"lambd": v}) for v in (INFINITE, -INFINITE)),
    *(("softplus", {"threshold": t}) for t in (NAN, INFINITE, -INFINITE)),
    ("gelu_10", {"min": -INFINITE, "max": INFINITE}),
    ("elu", {"alpha": 1024.0}),
]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize(("name", "arguments"), SPECIAL, ids=str)
def test_infinite_and_nan_parameters_that_are_taken_give_torchs_gradient(name, arguments, fmt):
    ours, theirs = pair(name, arguments)
    x = torch.tensor([-9.0, -3.0, -1.0, -0.4, 0.01, 0.4, 1.0, 3.0, 9.0], dtype=fmt.dtype)
    (_, dx), (_, slope) = run(ours, x), run(theirs, x)
    size = max(abs(arguments.get("alpha", 1.0)), 1.0)
    ulp = torch.finfo(fmt.dtype).eps
    assert torch.allclose(dx, slope, rtol=ulp, atol=max(2 * ulp, 2.0**-18) * size, equal_nan=True)


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
    # Subnormal products are rounded to multiples of the smallest.
    smallest = torch.finfo(dtype).smallest_normal * ulp
    assert ((dx - dx64).abs() <= ulp * dx64.abs() + smallest / 2).all()
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
    x = (2 * torch.randn(5, 401, dtype=torch.float64)).to(dtype)
    # Above 0, so that no sum cancels: an error of the floor is then small beside it.
    dy = torch.rand(5, 401, dtype=torch.float64).to(dtype)
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
    # Each share errs, relative to itself, by the floor near the turning point, and elsewhere by the few ulp of y that
    # composed rounding takes. The parameters' own chain and sum are rounded in their dtype.
    wide = x.double()
    near = (wide - math.log1p(-0.5 / alphas[1])).abs() < 0.5
    shares = (wide.clamp(min=0).square(), torch.where(wide > 0, 0.0, torch.expm1(wide) - wide))
    for ours, theirs, share, value in zip((dp, dn), (dp64, dn64), shares, raw, strict=True):
        terms = dy.double() * share * torch.sigmoid(torch.tensor(value, dtype=torch.float64))
        bound = (terms * torch.where(near, floor, 8 * ulp)).sum() + 4 * ulp * theirs.abs()
        assert (ours - theirs).abs() <= bound <= theirs.abs() / 3


SLOPES = [(0.8, 0.8), (0.1, 2.0), (3.0, 0.5), (0.0, 0.55), (1.0, 40.0)]


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("fmt", [FORMATS["bfloat16"], FORMATS["float16"]], ids=lambda f: f.name)
def test_xielu_meets_the_error_floor_for_any_slopes(slopes, fmt):
    this = xielu.form(xielu.Parameters(*slopes, 0.5, -1e-6))
    x = fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    y, side, slope = this.forward(x), this.code_of(x), this.slope(x.double())
    g = codes.look_up(closed.table(this, fmt.dtype, y.device), y, side).double()
    assert g.isfinite().all()
    counted = y.isfinite() & (x != 0)
    _, group = torch.unique(y.view(torch.int16)[counted].long() + (side[counted].long() << 16), return_inverse=True)
    count = int(group.max()) + 1
    least = torch.full((count,), math.inf, dtype=torch.float64).scatter_reduce(0, group, slope[counted], "amin")
    most = torch.full((count,), -math.inf, dtype=torch.float64).scatter_reduce(0, group, slope[counted], "amax")
    weight = (least.abs().clamp(1) + most.abs().clamp(1)) / 2
    error = ((g - slope).abs() / slope.abs().clamp(min=1))[counted]
    assert error.max() <= 1.05 * ((most - least) / 2 / weight).max() + 2.0**-24


@pytest.mark.parametrize("slopes", SLOPES)
def test_xielus_float32_decoder_is_exact_to_2_to_the_minus_20_from_8_ulp_above_the_turning_value(slopes):
    p = xielu.Parameters(*slopes, 0.5, -1e-6)
    distance = torch.logspace(-3, 1.5, 40, dtype=torch.float64)
    sides = [distance] if p.turning == -math.inf else [p.turning - distance, p.turning + distance, distance]
    for number, x in enumerate(sides):
        x = x[(x > 0) if number == len(sides) - 1 else (x < p.eps) & (x > -30)]
        y = xielu.form(p).forward(x).float()
        turning = xielu.form(p).turning
        if turning is not None:
            y = y[FORMATS["float32"].ordinals(y) >= FORMATS["float32"].ordinal(turning[1]) + 8]
        left = number == 0 and len(sides) == 3
        side = torch.full(y.shape, xielu.LEFT if left else xielu.MIDDLE, dtype=torch.uint8)
        slope = xielu.form(p).scheme(torch.float32).gradient(y, side)
        for value, found, start in zip(y.tolist(), slope.tolist(), x[-len(y) :].tolist(), strict=True):
            exact = mpmath.sqrt(0.25 + 4 * p.positive * value)
            if value < 0 or left:
                root = mpmath.findroot(
                    lambda t, v=value: p.negative * (mpmath.expm1(t) - t) + 0.5 * t - v, start, tol=1e-20, maxsteps=200
                )
                exact = 0.5 + p.negative * mpmath.expm1(root)
            assert abs(found - exact) <= 2.0**-20 * max(1, abs(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_with_changed_parameters_calls_the_forward_a_few_times_only(dtype, monkeypatch):
    calls, compute = [], xielu.compute
    monkeypatch.setattr(xielu, "compute", lambda x, *rest: calls.append(x.numel()) or compute(x, *rest))
    x, alphas = torch.randn(64, 64).to(dtype), [torch.tensor([v], requires_grad=True) for v in (0.31, 0.77)]
    functional.xielu(x, *(a.to(dtype) for a in alphas)).sum().backward()
    assert alphas[0].grad.isfinite()
    assert 0 < len(calls) < 100
    assert sum(calls) <= 1 << 17


def test_xielus_forward_rounds_the_same_in_vector_and_scalar_code():
    # So that its tables need no pass in short slices.
    fmt = FORMATS["bfloat16"]
    samples = [fmt.tensor(fmt.first_ordinal, fmt.finite_count)]
    samples += [(-0.98 + 1e-3 * torch.randn(20_000)), 10 * torch.randn(20_000), torch.randn(20_000).half()]
    for x in samples:
        for scalar in (True, False):
            held = xielu.Parameters(0.8, 0.8, 0.5, -1e-6, x.dtype, scalar).tensors(x.device)
            y = torch.cat([xielu.compute(part, *held) for part in x.split(7)])
            assert torch.equal(xielu.compute(x, *held).nan_to_num(), y.nan_to_num())


def test_tables_are_bounded_and_of_learnt_parameters_only_the_latest_is_kept():
    assert closed.TABLES <= 16
    first, second = (xielu.form(xielu.Parameters(p, 0.8, 0.5, -1e-6)) for p in (0.41, 0.42))
    where = (torch.bfloat16, torch.device("cpu"))
    made = closed.tables(first, *where)
    assert closed.tables(first, *where) is made
    closed.tables(second, *where)
    assert closed.tables(first, *where) is not made


def test_xielu_has_no_gradient_for_beta_and_eps_and_says_so():
    alpha = torch.tensor(0.8, requires_grad=True)
    with pytest.raises(InputError, match=r"use beta.detach\(\)"):
        functional.xielu(torch.randn(3), alpha, alpha, torch.tensor(0.5, requires_grad=True), -1e-6)


def sloped(x: torch.Tensor, learnt: bool) -> torch.Tensor:
    slopes = (torch.tensor([value], dtype=x.dtype, requires_grad=learnt) for value in (0.5, 0.3))
    return functional.xielu(x, *slopes)


@pytest.mark.parametrize("dtype", [*BY_DTYPE])
@pytest.mark.parametrize("learnt", [False, True])
def test_xielus_gradient_survives_what_hooks_and_autograd_make_of_tensors(dtype: torch.dtype, learnt: bool) -> None:
    x = (3 * torch.randn(7, 90)).to(dtype).requires_grad_()
    # From 1/2 on: so large that no product with a derivative is subnormal, where roundings are not relative.
    dys = ((0.5 + torch.rand(3, 7, 90)) * torch.randn(3, 7, 90).sign()).to(dtype)
    expected = [torch.autograd.grad(sloped(x, learnt), x, dy)[0] for dy in dys]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t):
        assert torch.equal(torch.autograd.grad(sloped(x, learnt), x, dys[0])[0], expected[0])
    (batch,) = torch.autograd.grad(sloped(x, learnt), x, dys, is_grads_batched=True)
    for got, wanted in zip(batch, expected, strict=True):
        # Where no slope is learnt, a product with a rounded derivative: two roundings here, one there, of eps / 2 each.
        assert torch.allclose(got, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    zeros = torch._efficientzerotensor(x.shape, dtype=dtype)
    assert not torch.autograd.grad(sloped(x, learnt), x, zeros)[0].any()


@pytest.mark.parametrize("dtype", [*BY_DTYPE])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.short(), lambda t: t.to("meta")])
def test_xielu_refuses_side_codes_that_hooks_have_changed(
    dtype: torch.dtype, learnt: bool, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.randn(90).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.dtype == torch.uint8 else t):
        y = sloped(x, learnt)
        with pytest.raises(InputError, match="hooks on saved tensors must"):
            torch.autograd.grad(y, x, torch.ones_like(x))
