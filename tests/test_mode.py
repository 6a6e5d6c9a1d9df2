"""`with invref.inverted():` catches functions in models that have no modules to swap, and nothing else changes."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from conftest import records
from torch import nn
from torch.nn import functional

import invref
from invref.kernels import sidebits
from invref.mode import CAUGHT
from invref.storages import counting

# torch.compile's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

N = 4096
CALLS = {
    "celu": lambda x: functional.celu(x, 0.7), "elu": lambda x: functional.elu(x, alpha=2.0), "gelu": functional.gelu,
    "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"), "hardshrink": functional.hardshrink,
    "hardsigmoid": functional.hardsigmoid, "hardswish": functional.hardswish,
    "hardtanh": lambda x: functional.hardtanh(x, -0.5, 2.0), "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "logsigmoid": functional.logsigmoid, "mish": functional.mish, "relu6": functional.relu6, "selu": functional.selu,
    "silu": functional.silu, "softplus": lambda x: functional.softplus(x, 2.0), "softshrink": functional.softshrink,
    "softsign": functional.softsign, "tanhshrink": functional.tanhshrink,
    "threshold": lambda x: functional.threshold(x, 0.1, 0.0), "torch.celu": torch.celu, "torch.selu": torch.selu,
    "prelu": lambda x: functional.prelu(x, torch.tensor([0.3])),
    "torch.prelu": lambda x: torch.prelu(x, torch.tensor([0.3])),
    "Tensor.prelu": lambda x: x.prelu(torch.tensor([0.3])),
    "torch.hardshrink": torch.hardshrink, "Tensor.hardshrink": lambda x: x.hardshrink(0.4),
    "torch.threshold": lambda x: torch.threshold(x, 0.1, 0.0),
}  # fmt: skip
INPLACE = {
    "elu_": functional.elu_, "leaky_relu_": functional.leaky_relu_, "hardtanh_": functional.hardtanh_,
    "celu_": functional.celu_, "selu_": functional.selu_, "threshold_": lambda x: functional.threshold_(x, 0.0, 0.0),
    "silu inplace": lambda x: functional.silu(x, inplace=True),
    "mish inplace": lambda x: functional.mish(x, inplace=True),
    "hardswish inplace": lambda x: functional.hardswish(x, inplace=True),
    "relu6 inplace": lambda x: functional.relu6(x, inplace=True),
    "elu inplace": lambda x: functional.elu(x, inplace=True),
}  # fmt: skip
BOTH = {key: record.worst_error + record.native_error for key, record in records().items()}
"""The largest errors of each layer's gradient and of torch's, over all inputs."""
LARGEST = 2.0
"""Of the arguments above, with which errors grow."""


def apart(name, dtype):
    """How far the two gradients of a call can be apart."""
    layer = name.removesuffix(" inplace").removesuffix("_").replace(" ", "_").rpartition(".")[2]
    if dtype == torch.float64:
        # `trial.bound_of` says why; torch holds 1/6 and 1/0.7 in float32.
        return math.sqrt(torch.finfo(dtype).eps / 2) + (2**-22 if layer in ("celu", "hardsigmoid") else 0)
    return LARGEST * BOTH[layer, str(dtype).removeprefix("torch.")]


def names(y: torch.Tensor) -> set[str]:
    """The operations of a graph."""
    nodes, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            left += [following for following, _ in node.next_functions]
    return {node.name() for node in nodes}


def outcome(call, x, dy):
    leaf = x.clone().requires_grad_()
    with counting() as kept:
        y = call(leaf * 1)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx, names(y), kept.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*CALLS, *INPLACE])
def test_a_call_is_caught_with_the_same_output_and_nearly_the_same_gradient(name, dtype):
    call = (CALLS | INPLACE)[name]
    if "prelu" in name:
        call = lambda x, call=call: call(x.float()).to(dtype)  # noqa: E731
    torch.manual_seed(3)
    x = (2 * torch.randn(N)).to(dtype)
    # Where its slope jumps any between is right, and torch takes another one.
    x = x[x.abs() != 3]
    dy = torch.ones_like(x)
    y, dx, operations, _ = outcome(call, x, dy)
    with invref.inverted():
        y_ours, dx_ours, operations_ours, _ = outcome(call, x, dy)
    assert torch.equal(y, y_ours)
    assert operations != operations_ours
    worst = float((dx.double() - dx_ours.double()).abs().max())
    assert worst <= apart(name, dtype)
    # Outside everything is torch's own again.
    assert outcome(call, x, dy)[2] == operations


def test_each_function_that_convert_names_is_caught():
    from invref.conversion import FUNCTIONS

    assert {getattr(functional, name) for name in FUNCTIONS} <= CAUGHT.keys()


def test_what_is_kept_goes_down_where_the_next_layer_keeps_the_output():
    first, last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(x):
        return last(functional.gelu(first(x)))

    x = torch.randn(N // 64, 64)
    with counting(first, but=(x, last.weight)) as native:
        forward(x)
    with invref.inverted(), counting(first, but=(x, last.weight)) as ours:
        forward(x)
    assert native.total == 2 * 4 * N
    assert ours.total == 4 * N + sidebits.size(N)


def test_modules_that_call_functions_are_reached_and_none_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.TransformerEncoderLayer(8, 2, 16, 0.0, functional.gelu))
    kinds = [type(m) for m in model.modules()]
    x = torch.randn(5, 3, 8)
    expected = names(model(x))
    with invref.inverted():
        y = model(x)
    assert [type(m) for m in model.modules()] == kinds
    assert "GeluBackward0" in expected
    assert "GeluBackward0" not in names(y)
    # Differentiated outside.
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_nests_and_ends_with_the_outermost_also_after_an_error():
    x = torch.randn(64, requires_grad=True)
    native = names(functional.silu(x))
    with invref.inverted():
        with invref.inverted():
            inner = names(functional.silu(x))
        assert names(functional.silu(x)) == inner != native
    assert names(functional.silu(x)) == native
    with pytest.raises(ZeroDivisionError), invref.inverted():
        1 / 0  # noqa: B018
    assert names(functional.silu(x)) == native


def test_it_holds_for_the_thread_that_enters_it():
    x = torch.randn(64, requires_grad=True)
    found = []
    with invref.inverted():
        thread = threading.Thread(target=lambda: found.append(names(functional.silu(x))))
        thread.start()
        thread.join()
    assert found == [names(functional.silu(x))]


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.hardtanh(torch.tensor([-5, 0, 5])),
        lambda: functional.relu6(torch.tensor([-5, 0, 9])),
        lambda: functional.threshold(torch.tensor([1, 2]), 1, 0),
        lambda: functional.elu(torch.linspace(-3, 3, 9), alpha=5000.0),
        lambda: functional.celu(torch.linspace(-3, 3, 9), alpha=-1.0),
        lambda: functional.leaky_relu(torch.linspace(-3, 3, 9), -0.5),
        lambda: functional.silu(torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))),
        lambda: torch.nn.functional.hardshrink(torch.linspace(-3, 3, 9), -1.0),
        lambda: functional.gelu(torch.empty(0, 3)),
        lambda: functional.gelu(torch.tensor(1.5)),
        lambda: torch.hardshrink(torch.linspace(-1, 1, 5), out=torch.empty(5)),
    ],
)
def test_calls_that_cannot_be_taken_are_torchs_own(call):
    expected = call()
    with invref.inverted():
        made = call()
    assert made.dtype == expected.dtype
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.gelu(torch.tensor([1, 2])),
        lambda: functional.gelu(torch.ones(2), approximate="exact"),
        lambda: functional.silu(),
        lambda: functional.softplus("x"),
        lambda: functional.hardtanh(torch.ones(2), 3.0, 1.0),
        lambda: functional.elu(torch.ones(2), nothing=3),
    ],
)
def test_errors_are_torchs_own(call):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as expected:
        call()
    with invref.inverted(), pytest.raises(expected.type):
        call()


def test_gradients_that_nobody_asks_for_cost_nothing():
    x = torch.randn(N)
    with invref.inverted(), counting() as kept:
        y = functional.gelu(x)
        with torch.no_grad():
            functional.gelu(x.requires_grad_())
    assert kept.total == 0
    assert not y.requires_grad


def test_autocast_runs_inside_and_around():
    layer = nn.Linear(16, 16)
    x = torch.randn(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = functional.silu(layer(x))
        with invref.inverted():
            inside = functional.silu(layer(x))
    with invref.inverted(), torch.autocast("cpu", torch.bfloat16):
        around = functional.silu(layer(x))
    assert expected.dtype == inside.dtype == around.dtype == torch.bfloat16
    assert torch.equal(inside, expected)
    assert torch.equal(around, expected)


def test_a_compiled_function_is_traced_with_it():
    layer = nn.Linear(16, 16)

    def forward(x):
        with invref.inverted():
            return layer(functional.gelu(layer(x))).square().mean()

    x = torch.randn(64, 16)
    forward(x).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    torch.compile(forward)(x).backward()
    # The same with the size of each term in its place. In another order a sum is off by its number of terms at most, in
    # units of 2^-24 of that: three sums of 16, each with a bias or a product, and one of 64. |f'| < 1.13, |f''| < 0.8.
    weight, bias = layer.weight.detach().abs(), layer.bias.detach().abs()
    before = x.abs() @ weight.T + bias
    after = 2 * (1.13 * before @ weight.T + bias) / x.numel()

    def through(slope):
        return (slope * (after @ weight)).T @ x.abs()

    rounding = (3 * 18 + 64) * 2.0**-24 * (after.T @ (1.13 * before) + through(1.13 + 0.8 * before))
    # Outputs that differ in their last bit may decode to either side of what is true.
    decoding = through(2 * records()["gelu", "float32"].worst_error)
    assert ((layer.weight.grad - expected).abs() <= rounding + decoding).all()


def test_func_transforms_go_through():
    x = torch.linspace(-3, 3, 33)
    expected = torch.func.vmap(torch.func.grad(functional.silu))(x)
    with invref.inverted():
        ours = torch.func.vmap(torch.func.grad(functional.silu))(x)
    assert float((ours - expected).abs().max()) <= apart("silu", torch.float32)
