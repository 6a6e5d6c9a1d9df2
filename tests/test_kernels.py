"""Side bits, and the compiled kernel held to the readable one."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invref.decoders import load
from invref.formats import FORMATS
from invref.kernels import cpu, naive, newton, sidebits
from invref.kernels.compiled import compiled

FLOAT32 = FORMATS["float32"]
NAMES = ("gelu", "gelu_tanh", "silu")


@given(st.lists(st.booleans(), max_size=2000))
@settings(deadline=None)
def test_side_bits_survive_packing_and_take_an_eighth_of_a_byte_each(values: list[bool]) -> None:
    side = torch.tensor(values, dtype=torch.bool)
    packed = sidebits.pack(side)
    assert torch.equal(sidebits.unpack(packed, len(values)).bool(), side)
    assert len(values) / 8 <= packed.numel() < len(values) / 8 + 64


def landmarks(name: str) -> list[int]:
    """Ordinals near which a float32 decoder changes its way: turning point, segment ends, zeros, subnormals, ends."""
    decoder = load(name)
    turning = float(decoder.turning_x)
    values = [turning, -1e-38, 0.0, 1e-38, 1.0, decoder.end_t**2, decoder.head_t**2, -3.0, -90.0, 1e20]
    return [*(FLOAT32.ordinal(v) for v in values), FLOAT32.first_ordinal, FLOAT32.largest_ordinal - 4095]


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """4,096 or fewer consecutive floats from an ordinal near a landmark on."""
    name = draw(st.sampled_from(NAMES))
    start = draw(st.sampled_from(landmarks(name))) + draw(st.integers(-5000, 5000))
    n = draw(st.integers(1, 4096))
    start = min(max(start, FLOAT32.first_ordinal), FLOAT32.largest_ordinal + 1 - n)
    return name, FLOAT32.tensor(start, n)


@given(runs())
@settings(deadline=None, max_examples=200)
def test_the_compiled_kernel_agrees_with_the_readable_one_bit_for_bit(case: tuple[str, torch.Tensor]) -> None:
    name, x = case
    decoder = load(name)
    side = naive.side_of(decoder, x)
    packed = cpu.pack(decoder, x)
    assert torch.equal(packed, sidebits.pack(side))
    y = torch.where(side, x.clamp(min=float(decoder.turning_y)), x.clamp(float(decoder.turning_y), -0.0))
    dy = torch.linspace(-2, 2, x.numel())
    compiled, readable = cpu.backward(decoder, dy, y, packed), naive.backward(decoder, dy, y, side, "float32")
    assert torch.equal(compiled.view(torch.int32), readable.view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_thread_count_and_calling_thread_do_not_change_a_bit(name: str) -> None:
    decoder = load(name)
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(1)) * 4
    y, dy = torch.nn.functional.silu(x), torch.ones_like(x)
    expected = cpu.backward(decoder, dy, y, sidebits.pack(naive.side_of(decoder, x)))
    before = torch.get_num_threads()
    results: list[torch.Tensor] = []

    def work() -> None:
        results.append(cpu.backward(decoder, dy, y, cpu.pack(decoder, x)))

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            work()
            workers = [threading.Thread(target=work) for _ in range(3)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 12
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("name", NAMES)
def test_newton_in_float64_is_far_closer_to_the_truth_than_the_float32_decoder(name: str) -> None:
    from invref import enclosure

    decoder = load(name)
    # log-uniform distances from x* on both sides, from inside the Taylor polynomial's radius out to the tails.
    distance = torch.logspace(-4, 1.5, 120, dtype=torch.float64)
    turning = float(decoder.turning_x)
    for right, x in ((True, turning + distance), (False, turning - distance)):
        y = torch.tensor([float(enclosure.value(name, v)) for v in x.tolist()], dtype=torch.float64)
        y = y[y != 0]
        g = newton.derivative(decoder, y, torch.full(y.shape, right))
        exact = torch.tensor(
            [float(enclosure.derivative_from_output(name, v, int(right))) for v in y.tolist()], dtype=torch.float64
        )
        # Solving f(x) = y in float64 leaves a few ulp of |y| <= max(|f|, 1) in f, hence as many times f''/f' in f';
        # |f''| < 1 throughout, and the ulp of y is at most 2^-52 |y|.
        slack = 16 * 2.0**-52 * (1 + y.abs() / exact.abs().clamp(min=1e-300)).clamp(max=1e12)
        assert ((g - exact).abs() <= slack).all()


def test_where_numba_finds_no_place_for_its_cache_it_compiles_all_the_same() -> None:
    # A function that stands in no file has no place for a cache, like one in a read-only installation.
    namespace: dict[str, object] = {}
    exec("def double(x):\n    return x + x\n", namespace)
    assert compiled()(namespace["double"])(21) == 42
