"""Every layer of the catalogue: forward, gradient against the truth, what is kept, shapes, limits, modules."""

from __future__ import annotations

import copy
import math
import pickle
from functools import cache

import pytest
import torch
from conftest import records
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import activations

import invref
from invref import functional
from invref.catalogue import NO_GAIN, ROWS
from invref.engines import TORCH
from invref.errors import FormulaError, InputError, TwiceError
from invref.formats import BY_DTYPE, FORMATS
from invref.kernels import sidebits

OWN = ("relu", "tanh", "sigmoid")
OURS = [name for name in ROWS if name not in OWN]
DTYPES = [fmt.dtype for fmt in FORMATS.values()]
SIXTEEN = ("bfloat16", "float16")
UNBOUNDED = ("relu2", "xielu")
INPLACE = (
    "silu", "mish", "hardswish", "elu", "selu", "celu", "leaky_relu", "hardtanh", "relu6", "hardsigmoid",
)  # fmt: skip
ours = pytest.mark.parametrize("name", OURS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=list(FORMATS))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(BY_DTYPE[x.dtype].integer)


def run(layer, x, dy=None):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) if dy is None else dy)
    return y.detach(), dx


def in_slices(layer, x):
    parts = [run(layer, part) for part in x.split(7)]
    return torch.cat([y for y, _ in parts]), torch.cat([dx for _, dx in parts])


@cache
def truth(name: str, fmt_name: str) -> torch.Tensor:
    """f' of every finite input of a 16-bit format, in float64."""
    fmt = FORMATS[fmt_name]
    x = fmt.tensor(fmt.first_ordinal, fmt.finite_count).double()
    slope = torch.as_tensor(ROWS[name].formula.evaluate(x, TORCH, 1)).expand(x.shape)
    # sqrtsoftplus left of -745 is 0 / 0 in float64, and less than 1e-160.
    return slope.nan_to_num(0.0) if name == "sqrtsoftplus" else slope


def at_breaks(name: str, x: torch.Tensor) -> torch.Tensor:
    breaks = torch.tensor([float(b.at) for b in ROWS[name].formula.breaks], dtype=torch.float64)
    return torch.isin(x.double(), breaks)


@pytest.mark.parametrize("fmt_name", SIXTEEN)
@ours
def test_all_16_bit_inputs_stay_within_their_error_floor(name: str, fmt_name: str) -> None:
    fmt, row = FORMATS[fmt_name], ROWS[name]
    x = fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    slope = truth(name, fmt_name)
    scale = slope.abs().clamp(min=1) if name in UNBOUNDED else torch.ones_like(slope)
    half_ulp = torch.exp2(torch.frexp(slope.abs().clamp(min=2.0**fmt.emin)).exponent - 1.0 - fmt.precision)
    scheme = row.scheme(fmt.dtype)
    packed = scheme.pack(x)
    codes = torch.zeros(x.numel(), dtype=torch.int64)
    if packed is not None:
        codes = sidebits.unpack(packed, x.numel(), scheme.bits).long()
    for path in (run, in_slices):
        y, dx = path(row.layer, x)
        with torch.no_grad():
            expected = row.native(x) if path is run else torch.cat([row.native(part) for part in x.split(7)])
        assert torch.equal(bits(y), bits(expected))
        assert not dx.isnan().any()
        counted = ~at_breaks(name, x) & (y.isfinite() if name in UNBOUNDED else True)
        error = (((dx.double() - slope).abs() - half_ulp).clamp(min=0) / scale)[counted]
        _, group = torch.unique(bits(y)[counted].long() + (codes[counted] << 16), return_inverse=True)
        count = int(group.max()) + 1
        least = torch.full((count,), math.inf, dtype=torch.float64).scatter_reduce(0, group, slope[counted], "amin")
        most = torch.full((count,), -math.inf, dtype=torch.float64).scatter_reduce(0, group, slope[counted], "amax")
        weight = torch.ones(count) if name not in UNBOUNDED else (least.abs().clamp(1) + most.abs().clamp(1)) / 2
        floor = float(((most - least) / 2 / weight).max())
        # 2^-24: a plateau keeps its exact 0 where outputs that underflow would ask for the middle of nothing much.
        assert float(error.max()) <= max(1.05 * floor, 2.0**-24)


@ours
def test_float64_gradients_are_torchs_away_from_turning_and_flat_points(name: str) -> None:
    x = torch.linspace(-9.0123, 9.0371, 4001, dtype=torch.float64)
    y, dx = run(ROWS[name].layer, x)
    slope = torch.as_tensor(ROWS[name].formula.evaluate(x, TORCH, 1)).expand(x.shape)
    # y is rounded by 2^-53 of max(1, |y|) times a few operations, which the inverse amplifies by f'' / f'.
    second = torch.as_tensor(ROWS[name].formula.evaluate(x, TORCH, 2)).expand(x.shape)
    rounding = 8 * 2.0**-52 * y.abs().clamp(min=1)
    slack = rounding * (1 + second.abs() / slope.abs().clamp(min=1e-12)) + 1e-13
    # softplus and its linear part meet within 2e-9 at 20 only.
    counted = ~at_breaks(name, x)
    assert ((dx - slope).abs() <= slack)[counted].all()


@st.composite
def strided(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """A layer and a tensor of any dtype, shape, permutation, step and offset; zero dimensions included."""
    name, dtype = draw(st.sampled_from(OURS)), draw(st.sampled_from(DTYPES))
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
@settings(deadline=None, max_examples=100)
def test_any_shape_and_stride_gives_torchs_forward_and_the_schemes_gradient(case: tuple[str, torch.Tensor]) -> None:
    name, x = case
    row = ROWS[name]
    expected = row.native(x)
    leaf = x.detach().requires_grad_()
    y = row.layer(leaf)
    dy = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).to(x.dtype).view(x.shape)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    assert torch.equal(bits(y.detach()), bits(expected))
    assert y.stride() == expected.stride()
    assert dx.shape == x.shape
    scheme = row.scheme(x.dtype)

    def flat(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y.detach()).copy_(t).as_strided((y.numel(),), (1,))

    # Scalars of xielu have their parameters in their own dtype, not those that the row's scheme has exactly.
    if name != "prelu" and not (name == "xielu" and x.dim() == 0):
        packed = scheme.pack(flat(x))
        alone = scheme.backward(flat(dy), flat(y.detach()) if scheme.keeps_output else None, packed)
        # A solver stops when all elements of a chunk have settled: later ones may turn by an ulp.
        assert torch.equal(bits(dx), bits(alone.as_strided(y.shape, y.stride())))


@ours
@dtypes
@pytest.mark.parametrize("n", [0, 1, 512, 513, 70_000])
def test_only_the_returned_tensor_and_the_side_bits_are_kept(name: str, dtype: torch.dtype, n: int) -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(n).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ROWS[name].layer(x)
    scheme = ROWS[name].scheme(dtype)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel()}
    kept = storages.pop(y.untyped_storage().data_ptr(), 0)
    assert kept == (n * dtype.itemsize if scheme.keeps_output else 0)
    # 64 bytes of grace a plane for its last, partly filled block, and the parameters that prelu and xielu have.
    assert sum(storages.values()) <= scheme.bits * (-(-n // 8) + 64) + 32


@pytest.mark.parametrize("name", OWN)
def test_what_torch_keeps_as_output_already_is_torchs_own(name: str) -> None:
    row = ROWS[name]
    assert row.gain == NO_GAIN
    x = torch.randn(1000)
    for ours_, theirs in zip(run(row.layer, x), run(row.native, x), strict=True):
        assert torch.equal(ours_, theirs)


@ours
@dtypes
def test_scalars_and_empty_tensors_pass(name: str, dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3, 0, 2), (1, 1)):
        x = torch.full(shape, -0.25, dtype=dtype)
        y, dx = run(ROWS[name].layer, x)
        assert y.shape == dx.shape == torch.Size(shape)
        assert dx.isfinite().all()


@ours
@dtypes
def test_infinities_and_nan_give_what_torchs_vector_code_gives(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    x = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype).repeat_interleave(64)
    (y, dx), (_, theirs) = run(row.layer, x), run(row.native, x)
    scalar = in_slices(row.native, x)[1]
    finite = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    shared = list(row.native(finite).tolist())
    for i in range(0, 192, 64):
        same = any(torch.equal(dx[i].nan_to_num(nan=7), t[i].nan_to_num(nan=7)) for t in (theirs, scalar))
        # An infinity whose output finite inputs have as well takes their gradient.
        assert same or (y[i].item() in shared and dx[i].isfinite()), (i, dx[i], theirs[i])


@ours
def test_gradients_are_finite_for_every_finite_input_and_zero_times_them_is_zero(name: str) -> None:
    fmt = FORMATS["float32"]
    steps = torch.linspace(fmt.first_ordinal, fmt.largest_ordinal, 100_001, dtype=torch.float64).long()
    x = fmt.from_ordinals(steps.clamp(fmt.first_ordinal, fmt.largest_ordinal))
    _, dx = run(ROWS[name].layer, x)
    assert dx.isfinite().all()
    _, dx = run(ROWS[name].layer, x, torch.zeros_like(x))
    assert (dx == 0).all()


@pytest.mark.parametrize("name", [name for name in OURS if name != "hardsigmoid"])
def test_differentiating_three_times_is_a_loud_error(name: str) -> None:
    # Not hardsigmoid, whose gradient does not depend on anything kept: its second derivative is nothing.
    x = torch.randn(10, requires_grad=True)
    (dx,) = torch.autograd.grad(ROWS[name].layer(x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
    with pytest.raises(TwiceError, match="use torch's own layer"):
        ddx.sum().backward()


@ours
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_a_dtype_that_is_not_taken_is_one_line_that_names_the_remedy(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"not {dtype}: convert with x.float\(\) first"):
        ROWS[name].layer(torch.zeros(3, dtype=dtype))


@dtypes
@pytest.mark.parametrize("name", INPLACE)
def test_in_place_overwrites_the_input_and_decodes_the_same_gradient(name: str, dtype: torch.dtype) -> None:
    x = (2 * torch.randn(7, 6)).to(dtype)
    layer = getattr(functional, name)
    leaf = x.clone().requires_grad_()
    buffer = leaf * 1.0
    y = layer(buffer, inplace=True)
    assert y.data_ptr() == buffer.data_ptr()
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    expected = run(layer, x)
    assert torch.equal(bits(y.detach()), bits(expected[0]))
    assert torch.equal(bits(dx), bits(expected[1]))


@ours
def test_rows_say_which_side_code_each_piece_of_the_formula_has(name: str) -> None:
    row = ROWS[name]
    assert len(row.codes) > len(row.formula.breaks)
    assert max(row.codes) < 2 ** row.scheme(torch.float32).bits


def test_every_layer_has_its_module() -> None:
    for row in ROWS.values():
        module = eval(f"invref.{row.module if '(' in row.module else row.module + '()'}", {"invref": invref})
        if row.name == "xielu":
            module = module.double()
        x = torch.randn(50, dtype=torch.float64)
        expected = row.native(x)
        for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            y = copied(x.clone()) if row.name != "prelu" else copied.double()(x)
            if row.name != "xielu":
                assert torch.equal(y, expected)


MODULES = {
    "ELU": {"alpha": 0.5}, "CELU": {"alpha": 2.0}, "SELU": {}, "Mish": {"inplace": True}, "Softplus": {"beta": 2.0},
    "Softsign": {}, "LogSigmoid": {}, "Hardtanh": {"min_val": -2.0, "max_val": 0.5}, "ReLU6": {}, "Hardsigmoid": {},
    "Hardswish": {}, "Tanhshrink": {}, "Softshrink": {"lambd": 0.1}, "Hardshrink": {"lambd": 0.1},
    "Threshold": {"threshold": 0.1, "value": 20.0}, "PReLU": {"num_parameters": 3},
    "LeakyReLU": {"negative_slope": 0.2},
    "GELU": {"approximate": "tanh"}, "SiLU": {"inplace": True}, "ReLU": {}, "Tanh": {}, "Sigmoid": {},
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_torchs_modules_with_the_same_arguments_and_state(name: str) -> None:
    ours_, theirs = getattr(invref, name)(**MODULES[name]), getattr(torch.nn, name)(**MODULES[name])
    assert isinstance(ours_, type(theirs))
    assert repr(ours_) == repr(theirs)
    assert ours_.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(4, 3, 5)
    expected = theirs(x.clone())
    for module in (ours_, copy.deepcopy(ours_), pickle.loads(pickle.dumps(ours_))):
        assert torch.equal(module(x.clone()), expected)


@pytest.mark.filterwarnings("ignore")
def test_forwards_are_bit_identical_to_transformers() -> None:
    x = 4 * torch.randn(1001, dtype=torch.float64)
    for name in ("quick_gelu", "relu2", "laplace", "sqrtsoftplus", "xielu", "gelu_10", "gelu_fast", "gelu_new"):
        theirs = activations.ACT2FN[name]
        ours_ = eval(f"invref.{ROWS[name].module if '(' in ROWS[name].module else ROWS[name].module + '()'}")
        assert ours_.state_dict().keys() == theirs.state_dict().keys()
        ours_.load_state_dict(theirs.state_dict())
        for dtype in DTYPES:
            y, dx = run(ours_, x.to(dtype))
            expected, slope = run(theirs, x.to(dtype))
            assert torch.equal(y, expected)
            if dtype in (torch.float32, torch.float64):
                # Parameters in bfloat16 are kept by xielu as they are: both compute in the wider dtype.
                # Our worst error over the format, and 2^-19 for both roundings; relative where f' has no bound.
                bound = records()[name, "float32"].worst_error + 2.0**-19
                assert ((dx - slope).abs() <= bound * slope.abs().clamp(min=1)).all()


def test_what_the_output_does_not_determine_is_refused_with_the_reason() -> None:
    x = torch.zeros(3, requires_grad=True)
    for call, reason in (
        (lambda: functional.gelu_10(x, min=-0.1), "dip"),
        (lambda: functional.gelu_10(x, max=3.0), "rounded output"),
        (lambda: functional.celu(x, alpha=0.0), "alpha=0"),
        (lambda: functional.softplus(x, beta=0.0), "beta=0"),
        (lambda: functional.laplace(x, sigma=0.0), "sigma=0"),
        (lambda: functional.softshrink(x, lambd=-1.0), "negative"),
    ):
        with pytest.raises(FormulaError, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)
