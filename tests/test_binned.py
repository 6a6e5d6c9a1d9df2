from dataclasses import replace

import numpy as np
import pytest
import torch
from flint import arb

from invref import custom, enclosure, formulas, pieces, stable
from invref.binfit import fit
from invref.engines import ARB, TORCH, coefficients, precision, variable
from invref.kernels import binned, binned_cpu, binscheme, sidebits

NAMES = ("gelu", "tanhshrink", "hardswish", "x*tanh(gelu(x))", "exp(x)", "x**3", "laplace")


@pytest.fixture(scope="module", params=NAMES)
def decoder(request):
    return fit(request.param)


def outputs(decoder):
    """Values, side codes and inputs: everyday ones, then special and arbitrary bit patterns."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(5000, generator=drawn) * 4, torch.randn(5000, generator=drawn) * 1e-3])
    y = formulas.get(decoder.name).evaluate(x.double(), TORCH).float()
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan, 3e38, -3e38]).repeat(20)
    patterns = torch.randint(-(2**31), 2**31 - 1, (3000,), generator=drawn).int().view(torch.float32)
    y = torch.cat([y, special, patterns])
    edges = binned.thresholds(decoder, torch.float32)
    codes = torch.cat([binned.code_of(edges, x), torch.randint(0, decoder.sides, (3180,), generator=drawn).byte()])
    return y, codes


def calibrated(decoder):
    formula = formulas.get(decoder.name)
    value, slope = stable.Checked(formula, 0, ()), stable.Checked(formula, 1, ())
    return binscheme.calibrated(decoder, lambda x: value(x.double()).to(x.dtype), slope, torch.device("cpu"))


def test_compiled_kernel_gives_the_same_bits(decoder):
    y, codes = outputs(decoder)
    tables = calibrated(decoder)
    dy = torch.randn(len(y), generator=torch.Generator().manual_seed(1))
    want = dy * binned.derivative(tables, y, codes)
    packed = sidebits.pack(codes, decoder.bits) if decoder.bits else None
    got = binned_cpu.backward(tables, dy, y, packed, decoder.bits)
    assert torch.equal(want.isnan(), got.isnan())
    number = ~want.isnan()
    assert torch.equal(want[number].view(torch.int32), got[number].view(torch.int32))
    assert torch.equal(got.isnan(), y.isnan())


@pytest.mark.parametrize("n", [1, 63, 64, 65, 511, 512, 513, 1 << 17])
def test_compiled_packing_is_that_of_sidebits(n):
    decoder = fit("x*tanh(gelu(x))")
    edges = binned.thresholds(decoder, torch.float32)
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * 3
    x[::7] = torch.nan
    packed = binned_cpu.pack(edges, decoder.bits, x)
    assert torch.equal(packed, sidebits.pack(binned.code_of(edges, x), decoder.bits))


def test_long_arrays_in_several_runs_give_the_same_bits():
    decoder = fit("gelu")
    tables, edges = binned.tables(decoder), binned.thresholds(decoder, torch.float32)
    x = torch.randn(100_001, generator=torch.Generator().manual_seed(0)) * 3
    y = torch.nn.functional.gelu(x)
    packed = binned_cpu.pack(edges, 1, x)
    dx = binned_cpu.backward(tables, torch.ones_like(y), y, packed, 1)
    assert torch.equal(dx, binned.derivative(tables, y, binned.code_of(edges, x)))


def test_decoder_error_after_evaluation_in_float32(decoder):
    """Against f' at the exact inverse of the stored output: one or two units in the last place of 1."""
    formula, tables = formulas.get(decoder.name), binned.tables(decoder)
    drawn = np.random.default_rng(0)
    for part, code in zip(pieces.pieces(formula), decoder.codes, strict=True):
        if part.plateau:
            continue
        left, right = max(float(part.left), -9.0), min(float(part.right), 9.0)
        margin = (right - left) * 1e-3
        xs = drawn.uniform(left + margin, right - margin, 200).tolist()
        ys, truth = [], []
        with precision(128):
            branch = pieces.branch_of(formula, part.index)
            for x in xs:
                y = float(np.float32(float(branch.evaluate(arb(x), ARB))))
                z = arb(x)
                for _ in range(4):
                    f = coefficients(branch.evaluate(variable(z, 2), ARB))
                    z = arb((z - (f[0] - y) / f[1]).mid())
                ys.append(y)
                truth.append(float(branch.evaluate(z, ARB, 1)))
        got = binned.derivative(tables, torch.tensor(ys), torch.full((200,), code)).double().numpy()
        error = np.abs(got - truth) / np.maximum(1, np.abs(truth))
        # The approximation's 2^-22, and half an ulp for each of the last two roundings near 1.
        assert error.max() <= 2.0**-22 + 2.0**-24


def test_readable_reference_agrees():
    decoder = fit("gelu")
    got = binned.derivative(binned.tables(decoder), torch.tensor([-0.1, 0.5]), torch.tensor([0, 1]))
    stored = (np.float32(-0.1).item(), 0.5)
    truth = [float(enclosure.derivative_from_output("gelu", y, piece)) for piece, y in enumerate(stored)]
    # The certified bound, and the two roundings of Horner's last step near 1.
    assert np.allclose(got.numpy(), truth, rtol=0, atol=decoder.bound + 2 * 2.0**-24)


def test_tail_keeps_its_sign_down_to_zero():
    tables = binned.tables(fit("gelu"))
    y = -(2.0 ** -torch.arange(4, 150, dtype=torch.float64)).float()
    g = binned.derivative(tables, y, torch.zeros(len(y), dtype=torch.int64))
    assert (g[y != 0] <= 0).all()
    assert (g.diff() >= 0).all()
    assert binned.derivative(tables, torch.tensor([-0.0, 0.0]), torch.tensor([0, 0])).eq(0).all()


def test_saturation_and_overflow():
    far = torch.tensor([50.0, 3e38, torch.inf])
    assert binned.derivative(binned.tables(fit("gelu")), far, torch.tensor([1, 1, 1])).eq(1).all()
    grown = binned.derivative(binned.tables(fit("exp(x)")), torch.tensor([3e38, torch.inf]), torch.tensor([0, 0]))
    assert grown.isfinite().all()
    assert (grown >= 2.9e38).all()


def test_the_general_kernel_serves_other_devices(monkeypatch):
    """The path of other devices, run on the CPU: same gradient through the scheme."""
    activation = custom.from_formula("x*tanh(gelu(x))", name="phish")
    scheme = activation.scheme(torch.float32)
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(0)) * 3
    y, dy = activation(x), torch.ones_like(x)
    packed = scheme.pack(x)
    want = scheme.backward(dy, y, packed)
    codes = sidebits.unpack(packed, len(x), activation.bits)
    assert torch.equal(want, dy * binned.derivative(scheme.tables, y, codes))


def test_slopes_that_underflow_leave_zero_at_the_limit():
    decoder = fit("x*sigmoid(x/4)")
    tables = binned.tables(decoder)
    for scale in (1.0, 3.0, 5.0, 2.0**21 + 1):
        cells = tuple(replace(cell, slope=cell.slope * scale) for cell in decoder.cells)
        for t in (tables, binned.tables(replace(decoder, cells=cells))):
            y = torch.tensor([0.0, -0.0, -1e-45, -3e-45, -1e-44, -1e-40])
            g = binned.derivative(t, y, torch.zeros(len(y), dtype=torch.int64))
            assert g[:2].eq(0).all()
            assert (g <= 0).all()
            packed = sidebits.pack(torch.zeros(len(y), dtype=torch.uint8), decoder.bits)
            assert torch.equal(binned_cpu.backward(t, torch.ones(len(y)), y, packed, decoder.bits), g)
