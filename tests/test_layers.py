"""The layers as users meet them: forward, what is kept, strides, limits, and autograd's rules."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as native
from torch.testing._internal.two_tensor import TwoTensor

import invref
from invref import autograd, functional
from invref.decoders import load
from invref.errors import FormulaError, InputError, TwiceError
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels import dispatch, gates, naive, newton, sidebits
from invref.kernels.room import LARGE, room

LAYERS = {
    "gelu": (functional.gelu, native.gelu),
    "gelu_tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x: native.gelu(x, approximate="tanh"),
    ),
    "silu": (functional.silu, native.silu),
}
"""Those whose decoder is rational in every format; `test_catalogue` has all layers."""
DTYPES = [fmt.dtype for fmt in FORMATS.values()]
names = pytest.mark.parametrize("name", LAYERS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=list(FORMATS))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(BY_DTYPE[x.dtype].integer)


def expected_gradient(name: str, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """What the very y that the layer returned decodes to as one flat tensor, side bits packed the readable way.

    Vector code and scalar tail may round y differently. Decoded in y's memory order: in float64 torch's exp and erf,
    too, depend on an element's position.
    """
    decoder = load(name)

    def flat(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y).copy_(t).as_strided((y.numel(),), (1,))

    if x.dtype == torch.float64:
        dx = newton.backward(decoder, flat(dy), flat(y), newton.side_of(decoder, flat(x)))
    else:
        packed = sidebits.pack(naive.side_of(decoder, flat(x)))
        dx = gates.gate(name, x.dtype).backward(flat(dy), flat(y), packed)
    return dx.as_strided(y.shape, y.stride())


def run(name: str, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = LAYERS[name][0](x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


@st.composite
def strided(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """An activation and a tensor of any dtype, shape, permutation, step and offset; zero dimensions included."""
    name, dtype = draw(st.sampled_from(list(LAYERS))), draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    offset = draw(st.integers(0, 3))
    padded = [n * step + offset for n, step in zip(shape, steps, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = (3 * torch.randn(padded, generator=generator, dtype=torch.float64)).to(dtype)
    for axis, (n, step) in enumerate(zip(shape, steps, strict=True)):
        x = x.narrow(axis, offset, n * step)
        x = x[(slice(None),) * axis + (slice(None, None, step),)]
    return name, x.permute(order)


@given(strided())
@settings(deadline=None, max_examples=200)
def test_any_shape_and_stride_gives_torchs_forward_and_the_readable_decoders_gradient(
    case: tuple[str, torch.Tensor],
) -> None:
    name, x = case
    y_native = LAYERS[name][1](x)
    dy = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).to(x.dtype).view(x.shape)
    y, dx = run(name, x, dy)
    assert torch.equal(bits(y), bits(y_native))
    assert y.stride() == y_native.stride()
    expected = expected_gradient(name, x, y, dy)
    assert torch.equal(bits(dx), bits(expected))


@names
@dtypes
def test_channels_last_is_preserved_in_output_and_gradient(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype).to(memory_format=torch.channels_last)
    y, dx = run(name, x, torch.ones(2, 3, 5, 7, dtype=dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(dx), bits(expected_gradient(name, x, y, torch.ones_like(x))))


@names
@dtypes
@pytest.mark.parametrize("n", [0, 1, 511, 512, 513, 100_000])
def test_only_the_returned_tensor_and_one_bit_per_element_are_kept(name: str, dtype: torch.dtype, n: int) -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(n).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = LAYERS[name][0](x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel()}
    kept = storages.pop(y.untyped_storage().data_ptr(), 0)
    assert kept == n * dtype.itemsize
    # 64 bytes of grace for the last, partly filled block of side bits.
    assert sum(storages.values()) <= -(-n // 8) + 64


@names
def test_the_next_linear_layer_shares_the_kept_storage(name: str) -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = LAYERS[name][0](x)
        native.linear(y, weight)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    # One boundary tensor, the weight, and the bits of 4,096 elements.
    assert sum(storages.values()) == 2 * 64 * 64 * 4 + 64 * 64 // 8


@names
def test_nothing_is_kept_when_no_gradient_is_wanted(name: str) -> None:
    layer = LAYERS[name][0]
    assert layer(torch.randn(5)).grad_fn is None
    with torch.no_grad():
        assert layer(torch.randn(5, requires_grad=True)).grad_fn is None


@names
@dtypes
def test_scalars_and_empty_tensors_pass(name: str, dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3, 0, 2), (1, 1)):
        x = torch.full(shape, -0.5, dtype=dtype)
        y, dx = run(name, x, torch.ones_like(x))
        assert y.shape == dx.shape == torch.Size(shape)
        assert torch.equal(bits(dx), bits(expected_gradient(name, x, y, torch.ones_like(x))))


@names
def test_backward_twice_with_retain_graph_gives_the_same_gradient(name: str) -> None:
    x = torch.randn(1000, requires_grad=True)
    y = LAYERS[name][0](x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@names
def test_changing_the_output_in_place_before_backward_is_autograds_own_error(name: str) -> None:
    x = torch.randn(10, requires_grad=True)
    y = LAYERS[name][0](x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@names
def test_differentiating_three_times_is_a_loud_error(name: str) -> None:
    x = torch.randn(10, requires_grad=True)
    (dx,) = torch.autograd.grad(LAYERS[name][0](x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
    with pytest.raises(TwiceError, match="use torch's own layer"):
        ddx.sum().backward()


@names
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_is_not_taken_is_one_line_that_names_the_remedy(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"not {dtype}: convert with x.float\(\) first") as caught:
        LAYERS[name][0](torch.zeros(3, dtype=dtype))
    assert "\n" not in str(caught.value)


def test_arguments_that_are_not_tensors_or_unknown_forms_are_refused() -> None:
    with pytest.raises(InputError, match=r"torch\.tensor"):
        functional.gelu([1.0])  # type: ignore[arg-type]
    with pytest.raises(FormulaError, match="'none' or 'tanh'"):
        functional.gelu(torch.zeros(1), approximate="erf")


@names
def test_gradcheck_passes_in_float64_away_from_the_turning_point(name: str) -> None:
    turning = float(load(name).turning_x)
    distance = torch.tensor([1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 8.0], dtype=torch.float64)
    x = torch.cat([turning - distance, turning + distance]).requires_grad_()
    assert torch.autograd.gradcheck(LAYERS[name][0], (x,))


@names
@dtypes
def test_infinities_and_nan_give_what_torchs_layer_gives(name: str, dtype: torch.dtype) -> None:
    ours, theirs = LAYERS[name]
    for value, n in product((float("inf"), float("-inf"), float("nan")), (1, 64)):
        outcome = []
        for layer in (ours, theirs):
            x = torch.full((n,), value, dtype=dtype, requires_grad=True)
            y = layer(x)
            outcome.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
        for mine, torchs in zip(*outcome, strict=True):
            assert torch.equal(mine.isnan(), torchs.isnan())
            assert torch.equal(mine.nan_to_num(), torchs.nan_to_num())


@names
@dtypes
def test_limits_are_exact(name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    far = min(1e20, largest)
    x = torch.tensor([far, largest, -far, -largest, 0.0, -0.0], dtype=dtype)
    _, dx = run(name, x, torch.ones_like(x))
    assert dx.tolist() == [1.0, 1.0, 0.0, 0.0, 0.5, 0.5]


def test_modules_are_torchs_modules_with_the_same_arguments_and_state() -> None:
    for ours, theirs in (
        (invref.GELU(), torch.nn.GELU()),
        (invref.GELU(approximate="tanh"), torch.nn.GELU(approximate="tanh")),
        (invref.SiLU(), torch.nn.SiLU()),
        (invref.SiLU(inplace=True), torch.nn.SiLU(inplace=True)),
    ):
        assert isinstance(ours, type(theirs))
        assert repr(ours) == repr(theirs)
        assert ours.state_dict() == theirs.state_dict()
        x = torch.randn(100)
        expected = theirs(x.clone())
        for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(module(x.clone()), expected)


def test_silu_in_place_overwrites_its_input_and_decodes_the_same_gradient() -> None:
    x = torch.randn(7, 5)
    leaf = x.clone().requires_grad_()
    buffer = leaf * 1.0
    y = functional.silu(buffer, inplace=True)
    assert y.data_ptr() == buffer.data_ptr()
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx, run("silu", x, torch.ones_like(x))[1])


INPLACE = ("silu", "mish", "hardswish", "elu", "celu", "selu", "leaky_relu", "hardtanh", "relu6", "hardsigmoid")


@pytest.mark.parametrize("name", INPLACE)
@pytest.mark.parametrize("place", ["leaf", "view of a leaf", "one of several views", "view without gradient"])
def test_what_torch_does_not_write_into_is_refused_with_its_words_and_left_untouched(name: str, place: str) -> None:
    words = []
    for layer in (getattr(functional, name), getattr(native, name)):
        leaf = torch.linspace(-2, 2, 20).view(4, 5).requires_grad_()
        base = leaf if "leaf" in place else leaf * 1
        with torch.set_grad_enabled(place != "view without gradient"):
            x = {"leaf": base, "one of several views": base.unbind()[1]}.get(place, base[1:])
        before = base.detach().clone()
        with pytest.raises(RuntimeError) as caught:
            layer(x, inplace=True)
        words.append(str(caught.value))
        assert torch.equal(base.detach(), before)
    assert words[0] == words[1]


def test_in_place_into_a_view_gives_the_gradient_of_its_base() -> None:
    gradients = []
    for layer in (functional.silu, native.silu):
        leaf = torch.linspace(-2, 2, 20, dtype=torch.float64).requires_grad_()
        base = leaf * 2
        y = layer(base[5:], inplace=True)
        (base.sum() + y.square().sum()).backward()
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients)


def test_torchs_own_layers_take_integers_and_second_derivatives() -> None:
    for layer in (functional.relu, functional.tanh, functional.sigmoid):
        assert torch.equal(layer(torch.tensor([-1, 2])), getattr(torch, layer.__name__)(torch.tensor([-1, 2])))
        x = torch.randn(10, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("layer", [functional.hardsigmoid, lambda x: functional.leaky_relu(x, -0.5)])
def test_where_bits_alone_are_kept_the_gradient_is_a_constant(layer) -> None:
    x = torch.randn(10, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert not dx.requires_grad
    # What the incoming gradient owes to x is not lost: the second derivative of y^2 is 2 f'^2.
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert torch.allclose(second, 2 * slope.square())


def test_importing_the_layers_does_not_import_the_heavy_libraries() -> None:
    heavy = ["numba", "sympy", "mpmath", "flint", "matplotlib", "rich", "scipy"]
    code = (
        "import sys, torch; before = set(sys.modules); import invref; "
        f"print(sorted((set(sys.modules) - before) & set({heavy!r})))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


DEFAULTED = """
import hashlib, torch, invref
from invref.catalogue import ROWS
digest = hashlib.sha256()
layers = [row.layer for row in ROWS.values()] + [invref.from_formula("x*tanh(gelu(x))")]
for layer in layers:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.linspace(-4, 4, 301, device="cpu", dtype=torch.float64).to(dtype).requires_grad_()
        y = layer(x)
        dx, = torch.autograd.grad(y, x, torch.ones_like(y))
        digest.update(dx.view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_tensors_on_the_cpu_are_served_there_whatever_the_default_device_is(tmp_path: Path) -> None:
    found = []
    for number, first in enumerate(("", "import torch; torch.set_default_device('meta')")):
        environment = {**os.environ, "INVREF_CACHE": str(tmp_path / str(number))}
        command = [sys.executable, "-c", first + DEFAULTED]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        found.append(run.stdout)
    assert found[0] == found[1]


def test_gradients_that_are_all_zero_need_no_memory() -> None:
    x = torch.randn(100, requires_grad=True)
    functional.gelu(x).backward(torch._efficientzerotensor((100,)))
    assert torch.equal(x.grad, torch.zeros(100))


def test_a_gradient_of_another_class_is_decoded_by_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, requires_grad=True)
    ones = torch.ones(100)
    (dx,) = torch.autograd.grad(functional.gelu(x), x, TwoTensor(ones, ones.clone()))
    monkeypatch.setattr(autograd, "fit", lambda *_: False)
    monkeypatch.setattr(dispatch, "fast", lambda *_: False)
    assert torch.equal(dx, torch.autograd.grad(functional.gelu(x), x, ones)[0])


@pytest.mark.parametrize("moved", [torch.float32, torch.uint8])
@pytest.mark.parametrize("dy", [torch.ones(100), torch.ones(1).expand(100)], ids=["dense", "expanded"])
def test_what_comes_back_on_another_device_is_refused(dy: torch.Tensor, moved: torch.dtype) -> None:
    x = torch.randn(100, requires_grad=True)

    def unpack(kept: torch.Tensor) -> torch.Tensor:
        return kept.to("meta") if kept.dtype == moved else kept

    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
        y = functional.gelu(x)
        with pytest.raises(InputError, match="on the device where they were"):
            y.backward(dy)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [(True, False), (False, True), (True, True)])
def test_what_comes_back_of_another_class_is_decoded_by_plain_operations(
    name: str, dtype: torch.dtype, wrapped: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(kept: torch.Tensor) -> torch.Tensor:
        kept = kept.detach()
        return TwoTensor(kept, kept.clone()) if wrapped[kept.dtype == torch.uint8] else kept

    layer = LAYERS[name][0]
    x = torch.randn(100, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
        (dx,) = torch.autograd.grad(layer(x), x, torch.ones_like(x))
    monkeypatch.setattr(autograd, "fit", lambda *_: False)
    monkeypatch.setattr(dispatch, "fast", lambda *_: False)
    assert torch.equal(dx, torch.autograd.grad(layer(x), x, torch.ones_like(x))[0])


def test_a_gradient_on_another_device_than_what_comes_back_is_refused() -> None:
    x = torch.randn(100, device="meta", requires_grad=True)

    def unpack(kept: torch.Tensor) -> torch.Tensor:
        return torch.zeros(kept.shape, dtype=kept.dtype)

    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
        y = functional.gelu(x)
        with pytest.raises(InputError, match="on the device where they were"):
            y.backward(torch.ones(100, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_of_another_class_is_packed_by_plain_operations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(100).to(dtype)
    both = TwoTensor(x, x.clone()).requires_grad_()
    ones = torch.ones_like(x)
    (dx,) = torch.autograd.grad(functional.gelu(both), both, TwoTensor(ones, ones.clone()))
    monkeypatch.setattr(autograd, "fit", lambda *_: False)
    monkeypatch.setattr(dispatch, "fast", lambda *_: False)
    leaf = x.clone().requires_grad_()
    assert torch.equal(dx.a, torch.autograd.grad(functional.gelu(leaf), leaf, ones)[0])


def test_a_mode_that_makes_tensors_without_memory_is_refused_those_that_have_some() -> None:
    x = torch.randn(100, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(InputError, match="convert it to such a one first"):
        functional.gelu(x)


def test_a_gate_leaves_its_addresses_behind_when_it_is_pickled_or_copied() -> None:
    gate = gates.Gate("silu", torch.float32)
    y = native.silu(torch.randn(100))
    gate.backward(y, y, gate.pack(y))
    assert {"_pack", "_decode"} <= set(vars(gate))
    for other in (pickle.loads(pickle.dumps(gate)), copy.deepcopy(gate), copy.copy(gate)):
        assert other == gate
        assert not {"_pack", "_decode"} & set(vars(other))


@dtypes
@pytest.mark.parametrize("name", sorted(gates.INTO))
def test_outputs_in_large_pages_are_those_of_torch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def room(like: torch.Tensor) -> torch.Tensor:
        written.append(like.numel())
        return torch.empty_like(like)

    monkeypatch.setattr(autograd, "LARGE", 1)
    monkeypatch.setattr(gates, "room", room)
    layer = functional.mish if name == "mish" else LAYERS[name][0]
    before = torch.get_num_threads()
    try:
        for threads, shape in product((1, 3), ((70_001,), (3, 40_000), (2, 3, 5, 7), (1,))):
            torch.set_num_threads(threads)
            dense = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
            for x in (dense.clone(), dense.transpose(0, -1)):
                x.requires_grad_()
                y = layer(x)
                (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
                expected = gates.FORMS[name][0](x)
                assert torch.equal(bits(y), bits(expected))
                assert y.stride() == expected.stride()
                monkeypatch.setattr(autograd, "LARGE", 1 << 40)
                assert torch.equal(bits(dx), bits(torch.autograd.grad(layer(x), x, torch.ones_like(x))[0]))
                monkeypatch.setattr(autograd, "LARGE", 1)
    finally:
        torch.set_num_threads(before)
    # Those whose axes are in another order keep to torch's own way; the tensor of one axis has but one order.
    assert len(written) == 12


@pytest.mark.parametrize("nbytes", [0, 1, LARGE - 4, LARGE, LARGE + 4, 3 * LARGE + 12])
def test_room_for_results_is_what_torch_makes(nbytes: int) -> None:
    like = torch.empty(nbytes // 4, 1, dtype=torch.float32)
    made = room(like)
    assert (made.shape, made.stride(), made.dtype, made.device) == (like.shape, like.stride(), like.dtype, like.device)
    # All of it can be written and read, to the first and the last byte.
    assert torch.equal(made.fill_(3), torch.full_like(like, 3))


@dtypes
def test_lazily_negated_tensors_are_taken_as_torch_takes_them(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16:
        lazy = torch._neg_view(torch.linspace(-3, 3, 50).to(dtype))
    else:
        lazy = torch._neg_view(torch.linspace(-3, 3, 50, dtype=dtype))
    assert lazy.is_neg()
    for name in LAYERS:
        y, dx = run(name, lazy, torch._neg_view(torch.ones_like(lazy)))
        expected = run(name, lazy.resolve_neg(), -torch.ones(50, dtype=dtype))
        assert torch.equal(bits(y), bits(expected[0]))
        assert torch.equal(bits(dx), bits(expected[1]))


def test_functions_take_their_argument_under_torchs_name() -> None:
    x = torch.randn(10)
    assert torch.equal(functional.gelu(input=x), native.gelu(input=x))
    assert torch.equal(functional.silu(input=x), native.silu(input=x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_long_tensors_are_decoded_in_pieces_to_the_same_bits(dtype: torch.dtype) -> None:
    n = 2 * dispatch.CHUNK + 777
    x = torch.linspace(-6, 6, n, dtype=torch.float64).to(dtype)
    y, dx = run("silu", x, torch.ones_like(x))
    starts = range(0, n, dispatch.CHUNK)
    parts = [slice(start, start + dispatch.CHUNK) for start in starts]
    expected = torch.cat([expected_gradient("silu", x[p], y[p], torch.ones_like(y[p])) for p in parts])
    assert torch.equal(bits(dx), bits(expected))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_may_lay_saved_tensors_out_otherwise_but_not_change_them(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(5120).to(dtype)
    expected = run(name, x, torch.ones_like(x))[1]

    def gradient(unpack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            LAYERS[name][0](leaf).backward(torch.ones_like(x))
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(lambda t: torch.stack([t, t], 1)[:, 0]), expected)
    assert torch.equal(gradient(lambda t: torch._neg_view(-t) if t.is_floating_point() else t), expected)
    assert torch.equal(gradient(lambda t: torch.stack([t, t], 1)[:, 0] if t.dtype == torch.uint8 else t), expected)
    with pytest.raises(InputError, match="must return what they were given"):
        gradient(lambda t: t[:64])
    with pytest.raises(InputError, match="hooks on saved tensors"):
        gradient(lambda t: t.float().double() if t.is_floating_point() else t)
    with pytest.raises(InputError, match="leave uint8"):
        gradient(lambda t: t if t.is_floating_point() else t.int())


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_may_bring_a_tensor_back_with_its_axes_in_another_order(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 3, 5, 7).to(dtype)
    layer = LAYERS[name][0]
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, torch.Tensor.contiguous):
        (dx,) = torch.autograd.grad(layer(x), x, dy)
    assert torch.equal(dx, expected)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as they are": lambda t: t,
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}


@st.composite
def laid(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers with axes in any order in memory, every other of more, one for all, or with a lazy minus."""
    order = draw(st.permutations(range(len(shape))))
    x = torch.randn([shape[i] for i in order], generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = x.permute([order.index(i) for i in range(len(shape))])
    how = draw(st.sampled_from(["as it is", "contiguous", "every other", "expanded", "negated"]))
    if how == "contiguous":
        return x.contiguous()
    if how == "every other":
        return torch.stack([x, x], -1)[..., 0]
    if how == "expanded":
        return torch.ones((), dtype=dtype).expand(shape)
    return torch._neg_view(x) if how == "negated" else x


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_the_way_of_plain_tensors_gives_the_bits_of_the_general_one(data: st.DataObject) -> None:
    layer = LAYERS[data.draw(st.sampled_from(sorted(LAYERS)))][0]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17]), max_size=5))
    x, dy = (data.draw(laid(shape, dtype, seed)) for seed in (1, 2))
    unpack = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]

    def gradient() -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
            return torch.autograd.grad(layer(leaf), leaf, dy)[0]

    dx = gradient()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "fit", lambda *_: False)
        assert torch.equal(bits(dx), bits(gradient()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_decodes_in_the_order_in_which_it_packed(dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, 2, 3, 5, 7).to(dtype)
    results = []
    for order in ([0, 1, 2, 3], [0, 2, 3, 1], [3, 1, 0, 2]):
        y, packed = torch.ops.invref.forward(x, "gelu", [], order)
        results.append(torch.ops.invref.backward(dy, y, packed, "gelu", [], order))
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_operator_reads_nothing_beyond_its_tensors() -> None:
    y, bits = torch.ones(5120), torch.zeros(640, dtype=torch.uint8)
    for args in ((torch.ones(10), y, bits), (y, y, bits[:64]), (y, torch.ones(10), bits), (y.double(), y, bits)):
        with pytest.raises(InputError, match="do not belong together"):
            torch.ops.invref.backward(*args, "gelu", [], [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer", [functional.gelu, functional.mish, functional.hardswish, functional.elu])
def test_tensors_without_numbers_pass(layer: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    for mode, device in ((contextlib.nullcontext(), "meta"), (FakeTensorMode(), "cpu")):
        with mode:
            x = torch.empty(3, 4, dtype=dtype, device=device, requires_grad=True)
            (dx,) = torch.autograd.grad(layer(x), x, torch.empty(3, 4, dtype=dtype, device=device))
            assert (dx.shape, dx.dtype, dx.device) == (x.shape, dtype, x.device)


def test_what_is_cut_off_stays_at_zero_whatever_comes_in() -> None:
    x = torch.tensor([-9.0, 0.0, 0.05, 20.0])
    for ours, torchs in (
        (functional.hardtanh, native.hardtanh),
        (functional.relu6, native.relu6),
        (functional.hardsigmoid, native.hardsigmoid),
        (functional.hardshrink, native.hardshrink),
        (functional.softshrink, native.softshrink),
        (lambda v: functional.threshold(v, 0.1, 0.0), lambda v: native.threshold(v, 0.1, 0.0)),
    ):
        gradients = []
        for layer in (ours, torchs):
            leaf = x.clone().requires_grad_()
            layer(leaf).backward(torch.full_like(x, math.inf))
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


def test_sparse_and_nested_tensors_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="to_dense"):
        functional.gelu(torch.eye(3).to_sparse())
    with pytest.raises(InputError, match="to_padded_tensor"):
        functional.gelu(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))


@dtypes
@pytest.mark.parametrize(
    "layer", [functional.gelu, functional.softplus, functional.hardsigmoid, invref.from_formula("x*sigmoid(x)*2")]
)
@pytest.mark.parametrize("shape", [(40,), (3, 1, 5), ()])
def test_torchs_zero_tensors_are_zeros(
    layer: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(layer(x), x, torch.ones(x.shape, dtype=dtype))[0]

    lazy = torch._efficientzerotensor(shape, dtype=dtype)
    expected = gradient(torch.zeros(shape, dtype=dtype, requires_grad=True))
    assert torch.equal(gradient(lazy.clone().requires_grad_()), expected)
    assert torch.equal(gradient(lazy.detach().requires_grad_()), expected)


def _zeros(kept: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(kept.shape, dtype=kept.dtype)


def test_a_tensor_without_memory_is_refused_before_it_is_read() -> None:
    x = torch.ones(40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, _zeros):
        y = functional.gelu(x)
    with pytest.raises(InputError, match="memory of their own"):
        y.backward(torch.ones(40))
    torch._enable_functionalization(reapply_views=True)  # type: ignore[no-untyped-call]
    try:
        wrapped = torch._to_functional_tensor(x.detach()).requires_grad_()
        with pytest.raises(InputError, match="memory of their own"):
            functional.gelu(wrapped)
    finally:
        torch._disable_functionalization()
