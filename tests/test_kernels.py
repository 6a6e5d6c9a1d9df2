"""Side bits, and the compiled kernel held to the readable one."""

from __future__ import annotations

import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

from invref.decoders import CELLS_LEFT, CELLS_RIGHT, Decoder, load, nearest
from invref.formats import FORMATS
from invref.kernels import codes, cpu, naive, newton, sidebits

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


def threshold(name: str) -> float:
    return float(load(name).threshold(np.float32))


def spelled_out(decoder: Decoder, y: float, right: bool) -> float:
    """The algorithm of `decoders.Cells` for one output, every operation in exact arithmetic and rounded once."""
    high, low = decoder.turning_value(np.float32)
    clamp, cells = decoder.clamps["float32"], decoder.cells
    v = np.float32(y)
    d = (v - high) - low
    if d < np.float32(clamp.cut):
        d = np.float32(clamp.base) + np.float32(clamp.slope) * max(d, np.float32(0))
    tail = not right and v > np.float32(cells.split)
    u = min(np.sqrt(-v if tail else d), np.float32(decoder.end_t))
    scale = cells.scales[0 if right else 2 if tail else 1]
    start = 0 if right else CELLS_RIGHT + 1 + (CELLS_LEFT if tail else 0)
    place = nearest(Fraction(float(u)) * Fraction(scale) + start, np.float32)
    z = Fraction(float(place)) - int(place)
    row = cells.rows[int(place)]
    value = np.float32(row[-1])
    for c in row[-2::-1]:
        value = nearest(Fraction(float(value)) * z + Fraction(c), np.float32)
    return float(value * (v if tail else np.float32(1)))


@given(runs())
@settings(deadline=None, max_examples=100)
def test_side_bits_are_packed_as_the_readable_kernel_says(case: tuple[str, torch.Tensor]) -> None:
    name, x = case
    assert torch.equal(cpu.packer(threshold(name), x.dtype)(x), sidebits.pack(naive.side_of(load(name), x)))


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Decoder, torch.Tensor, bool]:
    """Outputs on one side: 4,096 consecutive ones near where the decoder changes its way, or spread over the side."""
    decoder, right = load(draw(st.sampled_from(NAMES))), draw(st.booleans())
    turning, end = float(decoder.turning_y), decoder.end_t**2 + 1 if right else -0.0
    if draw(st.booleans()):
        return decoder, torch.linspace(turning, end, draw(st.integers(1, 4096))).clamp(turning, end), right
    values = [
        turning,
        decoder.cells.split,
        decoder.tail_y,
        -0.01,
        -1e-10,
        -1e-38,
        0.0,
        1e-38,
        1.0,
        decoder.end_t**2,
        1e20,
    ]
    start = FLOAT32.ordinal(draw(st.sampled_from(values))) + draw(st.integers(-5000, 1000))
    y = FLOAT32.tensor(start, 4096)
    return decoder, y.clamp(min=turning) if right else y.clamp(turning, -0.0), right


@given(outputs(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=150)
def test_the_compiled_kernel_does_what_the_cells_say_bit_for_bit(
    case: tuple[Decoder, torch.Tensor, bool], seed: int
) -> None:
    decoder, y, right = case
    packed = sidebits.pack(torch.full_like(y, right, dtype=torch.bool))
    g = cpu.on_cells(decoder)(torch.ones_like(y), y, packed)
    for i in np.random.default_rng(seed).integers(0, len(y), 20):
        assert g[i].item() == spelled_out(decoder, y[i].item(), right)
    dy = torch.linspace(-2, 2, y.numel())
    assert torch.equal(cpu.on_cells(decoder)(dy, y, packed), dy * g)


@given(outputs())
@settings(deadline=None, max_examples=150)
def test_cells_and_rational_functions_differ_by_their_bounds_and_rounding_alone(
    case: tuple[Decoder, torch.Tensor, bool],
) -> None:
    decoder, y, right = case
    side = torch.full_like(y, right, dtype=torch.bool)
    got = cpu.on_cells(decoder)(torch.ones_like(y), y, sidebits.pack(side))
    readable = naive.derivative(decoder, y, side, "float32")
    certified = decoder.cells.bound + max(s.bound for s in (decoder.tail, decoder.turn, decoder.head))
    # A place below 32 is rounded to 2^-20 and inherits four roundings of u, 2^-22 of 32 at most: below 2^-16 in all,
    # times the steepest cell, those of the tail by the largest |y| there. The other steps of both round values below 2
    # to 2^-24 each, some twenty of them.
    z, steepest = np.linspace(0, 1, 101), 0.0
    for index, row in enumerate(decoder.cells.rows):
        cell = index - (CELLS_RIGHT + 1 + CELLS_LEFT)
        largest = ((cell + 1) / decoder.cells.scales[2]) ** 2 if cell >= 0 else 1.0
        steepest = max(steepest, largest * float(abs(Polynomial(row).deriv()(z)).max()))
    assert ((got - readable).abs() <= certified + 2.0**-16 * steepest + 20 * 2.0**-24).all()


def strided(n: int) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of up to four axes: permuted, stepped, expanded, or with axes of length 0 and 1."""

    @st.composite
    def make(draw: st.DrawFn) -> torch.Tensor:
        shape = draw(st.lists(st.integers(0, n), min_size=0, max_size=4))
        steps = [draw(st.integers(1, 3)) for _ in shape]
        whole = torch.randn([length * step for length, step in zip(shape, steps, strict=True)])
        x = whole[tuple(slice(None, None, step) for step in steps)]
        if draw(st.booleans()):
            x = x.permute(draw(st.permutations(range(x.dim()))))
        return x[None].expand(2, *x.shape) if draw(st.booleans()) else x

    return make()


@given(strided(9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=200)
def test_strides_change_nothing(x: torch.Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype) if dtype != torch.float32 else x
    dense = x.contiguous().view(-1)
    packed = cpu.packer(0.25, x.dtype)(x)
    assert torch.equal(packed, sidebits.pack(dense > 0.25))
    if dtype == torch.float32:
        y = torch.nn.functional.silu(dense)
        packed = cpu.packer(threshold("silu"), x.dtype)(x)
        assert torch.equal(cpu.on_cells(load("silu"))(x, y, packed), cpu.on_cells(load("silu"))(dense, y, packed))
    elif dtype != torch.float64:
        table = torch.randn(2, 1 << 16)
        assert torch.equal(
            cpu.on_codes(table, x.dtype, 1)(x, dense, packed), codes.decode(table, dense, dense, dense > 0.25)
        )


@given(
    st.integers(0, 3000), st.integers(0, 4), st.integers(0, 2**32 - 1), st.sampled_from([torch.bfloat16, torch.float16])
)
@settings(deadline=None, max_examples=100)
def test_tables_are_looked_up_as_the_readable_kernel_does(n: int, bits: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(-(1 << 15), 1 << 15, (n,), generator=generator).to(torch.int16).view(dtype)
    dy = torch.randint(-(1 << 15), 1 << 15, (n,), generator=generator).to(torch.int16).view(dtype)
    sides = torch.randint(0, 1 << bits, (n,), generator=generator, dtype=torch.uint8)
    table = torch.randn(1 << bits, 1 << 16, generator=generator)
    packed = sidebits.pack(sides, bits) if bits else None
    got, expected = cpu.on_codes(table, y.dtype, bits)(dy, y, packed), codes.decode(table, dy, y, sides)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


def test_every_bfloat16_product_is_rounded_to_nearest_even_once() -> None:
    fmt = FORMATS["bfloat16"]
    dy = fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    y = torch.ones_like(dy)
    for g in (0.7, 1.0, -1.1, 2.0**-9, 1 / 3, 1.00390625):
        table = torch.full((1, 1 << 16), g)
        got = cpu.on_codes(table, y.dtype, 0)(dy, y, None)
        assert torch.equal(got.view(torch.int16), (dy.float() * torch.tensor(g)).bfloat16().view(torch.int16))


@pytest.mark.parametrize("name", NAMES)
def test_thread_count_position_and_calling_thread_do_not_change_a_bit(name: str) -> None:
    decoder = load(name)
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(1)) * 4
    y, dy = torch.nn.functional.silu(x), torch.ones_like(x)
    expected = cpu.on_cells(decoder)(dy, y, sidebits.pack(naive.side_of(decoder, x)))
    before = torch.get_num_threads()
    results: list[torch.Tensor] = []

    def work(first: int = 0) -> None:
        packed = cpu.packer(threshold(name), torch.float32)(x[first:])
        results.append(torch.cat([expected[:first], cpu.on_cells(decoder)(dy[first:], y[first:], packed)]))

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            work()
            workers = [threading.Thread(target=work, args=(first,)) for first in (1, 513, 1000)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 12
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_at_the_turning_value_decode_to_their_entries_from_the_first_to_the_last(name: str) -> None:
    decoder = load(name)
    width = 15
    lowest = codes.Lowest(FLOAT32.ordinal(float(decoder.turning_y)) - 5, torch.randn(2, width))
    y = FLOAT32.tensor(lowest.first - 20, width + 40).repeat(2)
    side = torch.arange(len(y)) >= width + 40
    packed, dy = sidebits.pack(side), torch.randn(len(y))
    plain = cpu.on_cells(decoder)(torch.ones_like(y), y, packed)
    expected = dy * lowest.replace(plain, y, side)
    assert torch.equal(cpu.on_cells(decoder, lowest)(dy, y, packed), expected)
    # The same among themselves: 16 at a time decide whether there is any.
    y, side = y.repeat_interleave(16), side.repeat_interleave(16)
    dy, packed = torch.randn(len(y)), sidebits.pack(side)
    expected = dy * lowest.replace(plain.repeat_interleave(16), y, side)
    assert torch.equal(cpu.on_cells(decoder, lowest)(dy, y, packed), expected)
    # Outputs of the other sign, which lie on the right, have no entries.
    positive, right = y.abs(), sidebits.pack(torch.ones_like(side))
    expected = cpu.on_cells(decoder)(dy, positive, right)
    assert torch.equal(cpu.on_cells(decoder, lowest)(dy, positive, right), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("right", [False, True])
def test_each_output_at_the_turning_value_is_clamped_in_whatever_company(name: str, right: bool) -> None:
    decoder = load(name)
    start = FLOAT32.ordinal(float(decoder.turning_y)) - 5
    y = FLOAT32.tensor(start, 30)
    expected = torch.tensor([spelled_out(decoder, v.item(), right) for v in y])
    for one in (y, y.repeat_interleave(16), torch.cat([y[:, None], y.new_full((30, 15), -0.1)], 1).view(-1)):
        packed = sidebits.pack(torch.full_like(one, right, dtype=torch.bool))
        g = cpu.on_cells(decoder)(torch.ones_like(one), one, packed)
        assert torch.equal(g[:: len(one) // 30], expected)


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
