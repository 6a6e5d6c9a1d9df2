"""The GPU kernels on a GPU: every output of a format, every input of a forward, and torch's ways of running them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as own

import invref
from invref.decoders import load
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels import codes, gpu, gpu_check, naive

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not gpu.serves(torch.float32, torch.device("cuda", 0)),
    reason="there is no GPU, or no Triton for it",
)

RATIONAL = ("gelu", "gelu_fast", "gelu_new", "gelu_tanh", "mish", "quick_gelu", "silu")
DTYPES = tuple(gpu.WIDTHS)
HALVES = (torch.bfloat16, torch.float16)
LAYERS = {
    "gelu": (invref.functional.gelu, own.gelu),
    "silu": (invref.functional.silu, own.silu),
    "mish": (invref.functional.mish, own.mish),
    "leaky_relu": (invref.functional.leaky_relu, own.leaky_relu),
    "tanhshrink": (invref.functional.tanhshrink, own.tanhshrink),
}


def there(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits; all NaN are alike."""
    words = BY_DTYPE[a.dtype].integer
    return bool(((a.view(words) == b.view(words)) | (a.isnan() & b.isnan())).all())


def packed(side: Tensor, dtype: torch.dtype) -> Tensor:
    """Side bits in the layout of the kernels, by the words of its description."""
    width = gpu.WIDTHS[dtype]
    element = torch.arange(side.numel(), device=side.device)
    block, inside = element // gpu.BLOCK, element % gpu.BLOCK
    part, inside = inside // (gpu.ROWS * width), inside % (gpu.ROWS * width)
    byte, bit = block * gpu.ROWS + inside // width, part * width + inside % width
    bits = torch.zeros(gpu.size(side.numel(), dtype), dtype=torch.int32, device=side.device)
    return bits.index_add(0, byte, side.int() << bit.int()).to(torch.uint8)


def wave(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Pseudo-random numbers of mean 0 and deviation 3, the same on every device."""
    return (3 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).to(dtype).to(there())


def gradient(function: object, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad


# All outputs and all inputs of a format.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RATIONAL)
def test_every_output_decodes_to_the_bits_of_the_readable_decoder(name, dtype):
    decoder, fmt, seen = load(name), BY_DTYPE[dtype], 0
    for y in gpu_check.inputs(dtype, there()):
        # Every output has either side bit; neighbours' differ, and those of one byte do not repeat. Left of the turning
        # point no finite output is above 0: `gpu_kernels._root` says what such a pair would give.
        side = (torch.arange(y.numel(), device=y.device) * 0x9E3779B1 >> 16 & 1).bool()
        never = (y > 0) & y.isfinite()
        dy = y.roll(12345).nan_to_num(1.5, 2.5, -2.5)
        for sides in (side | never, ~side | never):
            kernel = gpu.backward(decoder, dy, y, packed(sides, dtype))
            assert same(kernel, naive.backward(decoder, dy, y, sides, fmt.name))
        seen += y.numel()
    assert seen == 2**fmt.bits


@pytest.mark.parametrize("name", RATIONAL)
def test_the_readable_decoder_has_the_same_bits_on_both_processors(name):
    # torch's float32 sums, products, quotients and roots are rounded to nearest even on both.
    decoder = load(name)
    y = torch.cat([torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(d).float() for d in HALVES])
    y = torch.cat([y, y.nextafter(torch.tensor(9.0)), wave(1 << 20, torch.float32).cpu()])
    dy, side = wave(y.numel(), torch.float32, 1).cpu(), torch.arange(y.numel()) % 3 == 1
    cpu = naive.backward(decoder, dy, y, side, "float32")
    assert same(naive.backward(decoder, dy.cuda(), y.cuda(), side.cuda(), "float32").cpu(), cpu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RATIONAL)
def test_every_input_has_the_frameworks_value_and_its_side_bit(name, dtype):
    decoder, seen = load(name), 0
    for x in gpu_check.inputs(dtype, there()):
        side = naive.side_of(decoder, x)
        bits = gpu.pack(decoder, x)
        assert torch.equal(bits, packed(side, dtype))
        assert torch.equal(gpu.unpack(bits, x.numel(), dtype).bool(), side)
        if name in gpu.OWN:
            y, fused = gpu.forward(name, x)
            assert same(y, gpu.OWN[name](x))
            assert torch.equal(fused, bits)
        seen += x.numel()
    assert seen == 2 ** BY_DTYPE[dtype].bits


@pytest.mark.parametrize("dtype", HALVES)
def test_every_output_is_looked_up_with_either_side_code_and_without(dtype):
    y = torch.cat([*gpu_check.inputs(dtype, there())]).repeat_interleave(2)
    side = torch.arange(y.numel(), device=y.device) % 2 == 1
    dy = wave(y.numel(), dtype)
    values = torch.randn(2, 1 << 16, generator=torch.Generator().manual_seed(4)).to(there())
    assert same(gpu.by_table(values, dy, y, packed(side, dtype)), codes.decode(values, dy, y, side))
    assert same(gpu.by_table(values[:1], dy, y, None), codes.decode(values[:1], dy, y, None))


def test_outputs_next_to_the_turning_value_decode_to_what_is_given_for_them():
    fmt, decoder = FORMATS["float32"], load("mish")
    first = fmt.ordinal(float(decoder.turning_y)) - 7
    y = fmt.tensor(first - 2000, 4000).repeat_interleave(2).to(there())
    side = torch.arange(y.numel(), device=y.device) % 2 == 1
    lowest = codes.Lowest(first, 1 + torch.arange(30.0, device=y.device).view(2, 15))
    dx = gpu.backward(decoder, torch.ones_like(y), y, packed(side, y.dtype), lowest)
    expected = lowest.replace(naive.backward(decoder, torch.ones_like(y), y, side, "float32"), y, side)
    assert same(dx, expected)
    assert int((dx >= 1.0).sum()) >= 30


# Lengths, alignments, sizes.


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_length_from_any_element_on(dtype):
    decoder = load("silu")
    for n in (0, 1, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 1537, 2049, 70_001):
        for start in (0, 1, 3):
            x = wave(start + n, dtype, n)[start:]
            side = naive.side_of(decoder, x)
            assert torch.equal(gpu.pack(decoder, x), packed(side, dtype))
            y, bits = gpu.forward("silu", x)
            assert same(y, own.silu(x))
            dx = gpu.backward(decoder, x, y, bits)
            assert same(dx, naive.backward(decoder, x, y, side, BY_DTYPE[dtype].name))


def test_more_elements_than_32_bits_count():
    n = 2**31 + 4 * gpu.BLOCK + 5
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip("takes 26 GB of the GPU's memory")
    period = wave(1 << 20, torch.bfloat16)
    x = period.repeat(-(-n // period.numel()))[:n]
    y, bits = gpu.forward("gelu", x)
    dx = gpu.backward(load("gelu"), x, y, bits)
    y_of, bits_of = gpu.forward("gelu", period)
    expected = gpu.backward(load("gelu"), period, y_of, bits_of)
    for got, one in ((y, y_of), (dx, expected)):
        whole = got[: n // one.numel() * one.numel()].view(-1, one.numel())
        assert bool((whole.view(torch.int16) == one.view(torch.int16)).all())
        assert same(got[whole.numel() :], one[: n - whole.numel()])


# The layers as torch runs them.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_torchs_forward_and_nearly_its_gradient(name, dtype):
    ours, theirs = LAYERS[name]
    x, dy = wave(100_003, dtype), wave(100_003, dtype, 1)
    (y, dx), (y_own, _) = gradient(ours, x, dy), gradient(theirs, x, dy)
    assert same(y, y_own)
    _, exact = gradient(theirs, x.double(), dy.double())
    # A smoke test beside `invref-verify gradient --device cuda`, which holds every input to the error floor: nothing
    # here is farther off than a bfloat16 output that tells nothing of x at the turning point.
    allowed = {torch.bfloat16: 0.02, torch.float16: 0.01}.get(dtype, 2e-4)
    fmt = BY_DTYPE[dtype]
    rounding = exact.abs() * 2.0**-fmt.precision + fmt.ulp(0.0)
    error = (dx.double() - exact).abs()
    assert bool((error <= dy.double().abs() * allowed + rounding).all())


@pytest.mark.parametrize("name", LAYERS)
def test_strides_keep_their_order_and_bits(name):
    ours, theirs = LAYERS[name]
    x, dy = wave(4 * 6 * 50 * 50, torch.float32), wave(4 * 6 * 50 * 50, torch.float32, 1)
    flat_y, flat_dx = gradient(ours, x, dy)
    image = x.view(4, 50, 50, 6).permute(0, 3, 1, 2)
    y, dx = gradient(ours, image, dy.view(4, 50, 50, 6).permute(0, 3, 1, 2))
    assert y.stride() == theirs(image).stride()
    assert same(y.permute(0, 2, 3, 1).reshape(-1), flat_y)
    assert same(dx.permute(0, 2, 3, 1).reshape(-1), flat_dx)


@pytest.mark.parametrize("name", LAYERS)
def test_streams_other_than_the_default_are_kept(name):
    ours, _ = LAYERS[name]
    x, dy = wave(1 << 22, torch.bfloat16), wave(1 << 22, torch.bfloat16, 1)
    expected = gradient(ours, x, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        got = gradient(ours, x * 1, dy)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["gelu", "silu", "mish"])
def test_a_captured_graph_replays_with_new_inputs(name):
    ours, _ = LAYERS[name]
    ours(wave(8, torch.bfloat16).requires_grad_())
    x, dy = (wave(40 * 70, torch.bfloat16, seed).view(40, 70) for seed in (1, 2))
    graphed = torch.cuda.make_graphed_callables(ours, (torch.zeros_like(x).requires_grad_(),))
    for scale in (1, 2):
        got, expected = gradient(graphed, x * scale, dy), gradient(ours, x * scale, dy)
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_graphs_have_the_same_gradient(dtype):
    torch.compiler.reset()
    x, dy = wave(64 * 96, dtype).view(64, 96), wave(64 * 96, dtype, 1).view(64, 96)
    for name in ("gelu", "silu"):
        ours, _ = LAYERS[name]
        compiled = torch.compile(ours, fullgraph=True)
        assert same(gradient(compiled, x, dy)[1], gradient(ours, x, dy)[1])


def test_autocast_is_followed():
    model = nn.Sequential(nn.Linear(64, 256), invref.GELU(), nn.Linear(256, 64)).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(wave(32 * 64, torch.float32).view(32, 64))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


BLOCKS = 4


def peak(act: nn.Module) -> int:
    """Bytes that a step of blocks of linear, activation, linear takes at most, beyond what there was before."""
    torch.manual_seed(0)
    blocks = [(nn.Linear(256, 1024), copy.deepcopy(act), nn.Linear(1024, 256)) for _ in range(BLOCKS)]
    model = nn.Sequential(*(layer for block in blocks for layer in block)).cuda().bfloat16()
    x = wave(1 << 22, torch.bfloat16).view(-1, 256)
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).sum().backward()
        most = torch.cuda.max_memory_allocated() - before
        model.zero_grad()
    return most


@pytest.mark.parametrize("module", ["GELU", "SiLU", "Mish"])
def test_the_peak_of_a_step_falls_by_a_tensor_less_its_side_bits_for_each_block_before_the_last(module):
    saved = peak(getattr(nn, module)()) - peak(getattr(invref, module)())
    hidden, bits = 2 * (1 << 24), gpu.size(1 << 24, torch.bfloat16)
    # The peak comes in the backward of the last block, which holds three hidden tensors either way: x, dy and dx, or y,
    # dy and dx. The blocks before it keep two natively, and one and the bits with us; the allocator rounds up to 2 MiB.
    assert saved >= (BLOCKS - 1) * (hidden - bits - (2 << 20))


def test_every_device_is_served_by_itself():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    x = wave(4097, torch.float32).to(there(1))
    with torch.cuda.device(0):
        y, dx = gradient(invref.functional.gelu, x, x)
    assert y.device == dx.device == there(1)
    assert same(dx.cpu(), gradient(invref.functional.gelu, x.to(there(0)), x.to(there(0)))[1].cpu())
