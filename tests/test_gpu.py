"""What surrounds the GPU kernels, and the arithmetic of their direct division and square root, without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from invref.decoders import Decoder, Segment, load
from invref.formats import FORMATS
from invref.kernels import gpu, gpu_check

RATIONAL = ("gelu", "gelu_fast", "gelu_new", "gelu_tanh", "mish", "quick_gelu", "silu")
CPU = torch.device("cpu")


# The layout.


@pytest.mark.parametrize("dtype", gpu.WIDTHS)
def test_side_bits_take_an_eighth_of_a_byte_and_less_than_a_block_more(dtype):
    for n in (*range(3000), 2**31 + 5):
        assert -(-n // 8) <= gpu.size(n, dtype) <= -(-n // 8) + 64
    assert gpu.size(2**33, dtype) == 2**30


# The check of a fused forward, with forwards that stand in for it.


@pytest.fixture(autouse=True)
def nothing_found_yet(monkeypatch):
    monkeypatch.setattr(gpu_check, "FOUND", {})


def test_the_check_goes_through_every_bit_pattern():
    for name in ("bfloat16", "float16"):
        words = torch.cat([x.view(torch.int16) for x in gpu_check.inputs(FORMATS[name].dtype, CPU)])
        assert len(words.unique()) == len(words) == 1 << 16
    firsts, count, last = [], 0, None
    for x in gpu_check.inputs(torch.float32, CPU):
        words = x.view(torch.int32)
        firsts.append(int(words[0]))
        count, last = count + len(words), int(words[-1])
        if len(firsts) == 2:
            break
    assert firsts == [-(2**31), -(2**31) + gpu_check.CHUNK]
    assert (count, last) == (2 * gpu_check.CHUNK, -(2**31) + 2 * gpu_check.CHUNK - 1)


@pytest.mark.parametrize(
    ("right_with", "expected"), [((False, True), False), ((False,), False), ((True,), True), ((), None)]
)
def test_the_first_setting_with_the_frameworks_bits_is_taken(right_with, expected):
    calls = []

    def fused(x: torch.Tensor, setting: bool) -> torch.Tensor:
        calls.append(setting)
        y = torch.nn.functional.silu(x)
        # One output of 65,536 is off by one unit in the last place.
        return y if setting in right_with else torch.where(x == 1.5, torch.nextafter(y, 2 * y), y)

    def choice() -> bool | None:
        return gpu_check.choice("silu", torch.float16, CPU, torch.nn.functional.silu, fused)

    assert choice() is expected
    before = len(calls)
    assert choice() is expected
    assert len(calls) == before, "what was found is looked up"


@pytest.mark.parametrize(("ours", "same"), [(-0.0, False), (0.0, True)])
def test_signs_of_zeros_count_and_kinds_of_nan_do_not(ours, same):
    parts = iter([torch.tensor([0.0, 1.0])])
    nans = torch.tensor([0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    given = lambda x: torch.cat([x[:1] * 0, nans[:1]])  # noqa: E731
    found = gpu_check.agree(given, lambda x, _: torch.cat([torch.tensor([ours]), nans[1:]]), False, parts)
    assert found is same


def test_a_device_in_the_middle_of_a_capture_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the device was asked")

    assert gpu_check.choice("gelu", torch.float32, device, never, never) is None
    assert not gpu_check.FOUND, "a later call may find out"


@pytest.mark.parametrize("fusion", [None, False, True])
def test_the_forward_takes_one_pass_where_that_was_found_right_and_two_elsewhere(monkeypatch, fusion):
    passes = []
    x = torch.ones(3)
    monkeypatch.setattr(gpu, "fused_forward", lambda name, x, setting: (passes.append((name, setting)), x))
    monkeypatch.setattr(gpu, "pack", lambda decoder, x: f"bits by {decoder.activation}")
    gpu_check.FOUND["mish", torch.float32, CPU] = fusion
    y, bits = gpu.forward("mish", x)
    if fusion is None:
        assert (passes, bits) == ([], "bits by mish")
        assert torch.equal(y, torch.nn.functional.mish(x))
    else:
        assert passes == [("mish", fusion)]


# Which tensors are served.


def fake(device: str, dtype: torch.dtype) -> types.SimpleNamespace:
    return types.SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device, 0), dtype=dtype)


@pytest.fixture
def capability(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    value = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: value[0])
    caches = (gpu._able, gpu._importable, gpu._oldest)
    for cache in caches:
        cache.cache_clear()
    yield value
    for cache in caches:
        cache.cache_clear()


def test_what_the_kernels_serve(monkeypatch, capability):
    monkeypatch.setattr(gpu, "_triton", lambda: "3.10.0+git")
    for dtype in gpu.WIDTHS:
        assert gpu.available(fake("cuda", dtype))
        assert not gpu.available(fake("cpu", dtype))
    assert not gpu.available(fake("cuda", torch.float64))
    capability[0] = (7, 5)
    gpu._able.cache_clear()
    assert not gpu.available(fake("cuda", torch.float32))


@pytest.mark.parametrize(
    ("processor", "found", "words", "wanted"),
    [
        ((8, 0), None, "no triton", "3.6"),
        ((9, 0), "3.5.1", "triton 3.5.1", "3.6"),
        ((9, 0), "2.99", "triton 2.99", "3.6"),
        ((10, 0), "3.6.0", "triton 3.6.0", "3.7"),
        ((12, 0), None, "no triton", "3.7"),
    ],
)
def test_without_a_triton_that_will_do_the_plain_path_serves_a_gpu_and_says_so_once(
    monkeypatch, capability, processor, found, words, wanted
):
    capability[0] = processor
    monkeypatch.setattr(gpu, "_triton", lambda: found)
    with pytest.warns(RuntimeWarning, match=f"{words} here, `pip install 'triton>={wanted}'`"):
        assert not gpu.available(fake("cuda", torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gpu.available(fake("cuda", torch.bfloat16))


@pytest.mark.parametrize(("processor", "hip"), [((9, 4), "6.3"), ((8, 9), None)])
def test_triton_3_6_will_do_for_nvidias_processors_up_to_sm_90_only(monkeypatch, capability, processor, hip):
    capability[0] = processor
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(gpu, "_triton", lambda: "3.6.0")
    if hip is None:
        assert gpu.available(fake("cuda", torch.float32))
    else:
        with pytest.warns(RuntimeWarning, match="triton>=3.7"):
            assert not gpu.available(fake("cuda", torch.float32))


def test_the_module_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from invref.kernels import gpu; print(gpu.BLOCK, gpu._triton())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1024 None\n"


@pytest.mark.parametrize(("backend", "warp"), [("cuda", 32), ("hip", 64), ("hip", 32)])
def test_a_program_has_a_thread_for_each_byte_and_its_fusion_is_named(backend, warp):
    for fusion in (False, True):
        chosen = gpu.options(backend, warp, fusion)
        assert chosen["num_warps"] * warp == gpu.ROWS
        assert chosen["enable_fp_fusion"] is fusion


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_both_modules_mean_the_same_block():
    from invref.kernels import gpu_kernels

    kernels = gpu_kernels.ROWS, gpu_kernels.BITS, gpu_kernels.BLOCK
    assert tuple(constant.value for constant in kernels) == (gpu.ROWS, gpu.BITS, gpu.BLOCK)


# What `_root` and `_quotient` rely on. The arithmetic is emulated: products of two float32 are exact in float64, and a
# sum that is rounded to odd there rounds to float32 as if at once.


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product, c = a.astype(np.float64) * b.astype(np.float64), np.float64(c)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    away = np.where((error > 0) == (total > 0), 1, -1)
    words = total.view(np.int64)
    odd = np.where((error != 0) & (words % 2 == 0), words + np.where(away > 0, 0, -1) | 1, words)
    return odd.view(np.float64).astype(np.float32)


def near(value: np.ndarray, ulps: int) -> np.ndarray:
    """value rounded to float32, and off by some ulp."""
    return (value.astype(np.float32).view(np.int32) + np.int32(ulps)).view(np.float32)


def test_the_emulated_operation_rounds_once():
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=20_000).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2] * (1 + 2.0**-20)
    for x, y, z, got in zip(a, b, c, fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        around = [np.nextafter(got, np.float32(end)) for end in (-np.inf, np.inf)]
        off = abs(Fraction(float(got)) - exact)
        even = got.view(np.int32) % 2 == 0
        others = [abs(Fraction(float(v)) - exact) for v in around]
        assert all(off < other or (off == other and even) for other in others)


def root(x: np.ndarray, r: np.ndarray) -> np.ndarray:
    s = x * r
    return fma(fma(-s, s, x), np.float32(0.5) * r, s)


def quotient(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
    r = fma(fma(-q, r, np.float32(1)), r, r)
    t = p * r
    return fma(fma(-q, t, p), r, t)


# That these are the sequences of NVIDIA's own compiler, and so right with the approximations that its processors give,
# is test_gpu_static's part. Here: they are right with the best approximation, and the quotient with any that is off by
# one ulp (as much as the PTX ISA allows for rcp.approx).


def test_the_direct_root_is_correctly_rounded():
    # Every third mantissa of two neighbouring binades; the rest is scaling by powers of 4.
    x = np.arange(0x3F800000, 0x40800000, 3, dtype=np.int32).view(np.float32)
    for scale in (1.0, 2.0**-96, 2.0**20):
        scaled = (x if scale == 1 else x[::97]) * np.float32(scale)
        assert (root(scaled, near(1 / np.sqrt(scaled.astype(np.float64)), 0)) == np.sqrt(scaled)).all()


def test_the_direct_quotient_is_correctly_rounded():
    rng = np.random.default_rng(2)
    mantissas = rng.integers(0x3F800000, 0x40000000, (2, 1 << 21), dtype=np.int32)
    # Divisors with nearly all bits set and quotients near the middle of two floats are the hard cases.
    mantissas[1, :4096] = 0x3FFFFFFF - np.arange(4096)
    p, q = mantissas.view(np.float32)
    middle = (mantissas[0].astype(np.int64) | 1 << 24).astype(np.float64) * 2.0**-24 + 2.0**-25
    p = np.concatenate([p, (middle * q).astype(np.float32)])
    q = np.concatenate([q, q])
    for ulps in (-1, 0, 1):
        assert (quotient(p, q, near(1 / q.astype(np.float64), ulps)) == p / q).all()
    zero = np.zeros_like(q)
    assert (quotient(zero, q, near(1 / q.astype(np.float64), 0)) == 0).all()


def reach(coefficients: tuple[float, ...], centre: float, low: float, high: float) -> tuple[float, float]:
    """Bounds of the absolute value of a polynomial for u in [low, high], by intervals."""
    edges = np.linspace(low, high, 4001) - centre
    left, right = edges[:-1], edges[1:]
    least = most = np.full(len(left), coefficients[-1])
    for c in coefficients[-2::-1]:
        products = [least * left, least * right, most * left, most * right]
        least, most = np.minimum.reduce(products) + c, np.maximum.reduce(products) + c
    smallest = np.where((least > 0) | (most < 0), np.minimum(abs(least), abs(most)), 0)
    return float(smallest.min()), float(np.maximum(abs(least), abs(most)).max())


def spans(decoder: Decoder) -> tuple[tuple[Segment, float, float], ...]:
    y = float(decoder.turning_y)
    left = -((decoder.tail_y - y) ** 0.5)
    return (
        (decoder.tail, 0.0, (-decoder.tail_y) ** 0.5),
        (decoder.turn, left, decoder.head_t),
        (decoder.head, decoder.head_t, decoder.end_t),
    )


@pytest.mark.parametrize("name", RATIONAL)
def test_decoders_have_the_numbers_that_the_direct_ways_are_right_for(name):
    decoder = load(name)
    for segment, low, high in spans(decoder):
        least, most = reach((1.0, *segment.denominator), segment.centre, low - 1e-6, high + 1e-6)
        assert 2.0**-40 < least < most < 2.0**40
        least, most = reach(segment.numerator, segment.centre, low - 1e-6, high + 1e-6)
        assert most < 2.0**40
        # P may have zeros. Its last step adds its first coefficient to a product: what cancels is a multiple of half
        # that one's ulp, so it is 0 or still far above 2^-60.
        assert least > 2.0**-40 or abs(segment.numerator[0]) > 2.0**-30
    # Roots below 2^-47 make no difference to a tail's centre.
    centre = np.float32(decoder.tail.centre)
    assert centre - np.float32(2.0**-47) == centre
    for clamp in decoder.clamps.values():
        assert clamp.base > 2.0**-96 or clamp is decoder.clamps["float64"]
    for fmt in ("bfloat16", "float16", "float32"):
        scalars, segments = gpu.constants(decoder, fmt)
        assert np.sqrt(np.float32(scalars[-1])) == np.float32(decoder.end_t)
        assert all(np.float32(v) == v for v in (*scalars, *segments))
        assert len(segments) == 36
