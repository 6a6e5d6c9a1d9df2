"""A forward that errs by several ulp around the turning point: what is decoded there, and what the verifier asks."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from invref.decoders import load
from invref.formats import FORMATS
from invref.kernels import codes, gates, slopes
from verify import floor, targets
from verify.measure import clearance_of, counted_outputs
from verify.oracle import CLEARANCE, Oracle

FLOAT32 = FORMATS["float32"]
TURNING = tuple(float(v) for v in (load("silu").turning_x, load("silu").turning_y))
WINDOW = 1 << 16


def erring(ulps):
    """SiLU whose float32 outputs are too high by 0 to `ulps` ulp of the turning value, by a wave through inputs."""

    def forward(x):
        y = functional.silu(x)
        if x.dtype != torch.float32:
            return y
        wave = (0.5 + 0.5 * torch.sin(FLOAT32.ordinals(x).double() / 7)) * ulps
        return (y.double() + wave * FLOAT32.ulp(TURNING[1])).float()

    return forward


@pytest.fixture
def gate(monkeypatch):
    """float32 SiLU's gate on a forward."""

    def made(forward):
        monkeypatch.setitem(gates.FORMS, "silu", (forward, slopes.silu))
        form = gates._sided("silu", *gates.FORMS["silu"])
        monkeypatch.setattr(gates, "_form", lambda name: form)
        monkeypatch.setattr(gates, "_lowest", gates._lowest.__wrapped__)
        return gates.gate("silu", torch.float32)

    return made


def errors(gate, forward):
    """The worst error around the turning point, and the floor: half the width of f' over inputs of one (y, s)."""
    x = FLOAT32.tensor(FLOAT32.ordinal(TURNING[0]) - WINDOW, 2 * WINDOW)
    y = forward(x)
    dx = gate.backward(torch.ones_like(x), y, gate.pack(x)).double()
    slope = slopes.silu(x.double())
    codes = 2 * FLOAT32.ordinals(y) + (slope > 0)
    return float((dx - slope).abs().max()), floor.exact(codes.numpy(), slope.numpy())


@pytest.mark.parametrize("ulps", [4.5, 7, 12, 20])
def test_what_any_decoder_must_err_by_is_all_that_is(gate, monkeypatch, ulps):
    forward = erring(ulps)
    worst, least = errors(gate(forward), forward)
    assert worst <= 1.10 * least
    # Without the table it is more.
    monkeypatch.setattr(gates, "_lowest", lambda name, device: None)
    assert errors(gates.gate("silu", torch.float32), forward)[0] > 1.10 * least


def test_a_forward_that_errs_little_is_decoded_by_polynomials_alone(gate):
    gate(erring(2))
    assert gates._lowest("silu", torch.device("cpu")) is None


# Torch's own SiLU errs besides, and rounding by half an ulp.
OWN = codes.astray(functional.silu, *TURNING) + 0.5


@pytest.mark.parametrize("ulps", [1, 5, 9])
def test_the_error_of_a_forward_is_measured(ulps):
    assert codes.astray(erring(ulps), *TURNING) == pytest.approx(ulps, abs=OWN)


@pytest.mark.parametrize("ulps", [0, 6, 12])
def test_outputs_count_from_twice_the_error_of_the_forward_on(ulps):
    target = replace(targets.TARGETS["silu"], native=erring(ulps))
    clearance = clearance_of(target)
    assert max(CLEARANCE, 2 * (ulps - OWN)) <= clearance <= max(CLEARANCE, 2 * (ulps + OWN) + 1)
    for part in Oracle(target.formula).ranges:
        low, high = counted_outputs(Oracle(target.formula), part, target)
        assert (low - part.low, high) == (clearance - CLEARANCE, part.high)
