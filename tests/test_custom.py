import copy
import pickle

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import invref
from invref import custom
from invref.custom import Activation, from_formula
from invref.errors import FormulaError, InputError, TwiceError
from invref.formats import FORMATS
from invref.kernels import binned
from invref.pieces import landmarks

NEW = {
    "serf": "x*erf(log(1+exp(x)))",
    "tanhexp": "x*tanh(exp(x))",
    "logish": "x*log(1+sigmoid(x))",
    "smish": "x*tanh(log(1+sigmoid(x)))",
    "phish": "x*tanh(gelu(x))",
    "wide_gelu": "x*erfc(-x/3)/2",
    "swish_1702": "x*sigmoid(1.702*x)",
    "atan_gate": "x*(1/2+atan(x)/pi)",
    "wave": "x*exp(-x*x)",
    "cubic_steps": "where(x > 1, x, where(x < -1, 0, x*x*x))",
}
BITS = {"phish": 2, "wave": 2, "cubic_steps": 2, "atan_gate": 0}
WINDOW = 1 << 14


@pytest.fixture(autouse=True, scope="module")
def cache_directory(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVREF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("wrapped", [(True, False), (False, True)])
def test_what_comes_back_of_another_class_is_decoded_by_plain_operations(wrapped):
    def unpack(kept):
        kept = kept.detach()
        return TwoTensor(kept, kept.clone()) if wrapped[kept.dtype == torch.uint8] else kept

    activation = from_formula(NEW["wave"])
    x = torch.randn(1000)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
        dx = gradient(activation, x)
    assert torch.equal(dx, gradient(activation, x))


def gradient(activation, x):
    x = x.clone().requires_grad_()
    activation(x).backward(torch.ones_like(x))
    return x.grad


def inputs(activation, fmt):
    """All inputs of a 16-bit format; in float32 those around landmarks and 0, and random ones."""
    if fmt.bits == 16:
        return fmt.tensor(fmt.first_ordinal, fmt.finite_count)
    marks = [0.0, *(float(mark.x) for mark in landmarks(activation.formula))]
    around = [torch.arange(-WINDOW, WINDOW + 1) + fmt.ordinal(mark) for mark in marks]
    drawn = torch.Generator().manual_seed(1)
    spread = torch.randint(fmt.first_ordinal, fmt.largest_ordinal, (1 << 16,), generator=drawn)
    usual = fmt.ordinals(torch.randn(1 << 16, generator=drawn) * 4)
    return fmt.from_ordinals(torch.cat([*around, spread, usual]).unique())


def floor(y, codes, slope, fmt):
    """Half the largest range of f' over the inputs that share an output and a side code."""
    _, group = torch.unique(fmt.ordinals(y) * 16 + codes.long(), return_inverse=True)
    none = torch.full((int(group.max()) + 1,), torch.inf, dtype=torch.float64)
    least = none.scatter_reduce(0, group, slope, "amin")
    most = (-none).scatter_reduce(0, group, slope, "amax")
    return float((most - least).max() / 2)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient_errors_of_new_formulas_keep_the_bounds(name, dtype):
    activation = from_formula(NEW[name], name=name)
    fmt = FORMATS[str(dtype).removeprefix("torch.")]
    x = inputs(activation, fmt)
    at_break = torch.isin(x.double(), torch.tensor([float(b.at) for b in activation.formula.breaks]).double())
    x = x[~at_break]
    truth = activation._slope(x.double())
    y, dx = activation(x), gradient(activation, x)
    assert activation.bits == BITS.get(name, 1)
    assert y.isfinite().all() and dx.isfinite().all()
    lowest = floor(y, binned.code_of(binned.thresholds(activation.bins, dtype), x), truth, fmt)
    error = (dx.double() - truth).abs()
    if fmt.bits == 16:
        half_ulp = torch.tensor([fmt.ulp(v) / 2 for v in dx.double().tolist()])
        # The decoder's float32 is rounded before it is.
        assert (error <= 1.05 * lowest + half_ulp + 2.0**-24 * truth.abs() + 1e-12).all()
    else:
        assert error.max() <= max(1.10 * lowest, 2.0**-20)
    assert (dx.double() * truth >= 0)[truth.abs() > lowest + 2.0**-20].all()


@pytest.mark.parametrize("name", [name for name in NEW if name not in ("atan_gate", "cubic_steps")])
def test_zero_tails_and_saturation_are_exact(name):
    activation = from_formula(NEW[name], name=name)
    x = torch.tensor([-1e20, -3e38, -200.0, 200.0, 1e20, 3e38])
    dx = gradient(activation, x)
    limit = 0.0 if name == "wave" else activation.native(torch.tensor(40.0, dtype=torch.float64)).item() / 40
    assert dx[:3].eq(0).all()
    assert dx[3:].sub(limit).abs().max() <= 2.0**-22
    shallow = torch.linspace(-12, -6, 1001)
    got, truth = gradient(activation, shallow), activation._slope(shallow.double())
    assert (got.double() * truth >= 0).all()


def test_float64_is_solved():
    activation = from_formula(NEW["phish"], name="phish")
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3).double()
    assert (gradient(activation, x) - activation._slope(x)).abs().max() < 1e-7


def test_forward_is_rounded_once_and_keeps_strides():
    activation = from_formula(NEW["serf"], name="serf")
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).t()
    y = activation(x)
    assert y.stride() == x.stride()
    assert torch.equal(y, activation.native(x.double()).float())
    assert torch.equal(activation(x.clone(memory_format=torch.contiguous_format)), y)
    assert activation(torch.zeros(0)).shape == (0,)
    assert gradient(activation, torch.zeros(3, 0)).shape == (3, 0)


def test_non_finite_inputs():
    activation = from_formula(NEW["serf"], name="serf")
    dx = gradient(activation, torch.tensor([float("nan"), 1.0]))
    assert dx[0].isnan() and dx[1].isfinite()


def test_module_is_copied_and_pickled():
    module = from_formula(NEW["serf"], name="serf").module()
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert torch.equal(gradient(other, x), gradient(module, x))
    assert "serf: x*erf" in repr(module)
    assert not list(module.parameters())


def test_text_parameters_and_repr():
    activation = invref.from_formula("x*sigmoid(beta*x)", name="swish", parameters={"beta": 1.5})
    x = torch.linspace(-4, 4, 100)
    assert (activation(x) - x * torch.sigmoid(1.5 * x)).abs().max() < 1e-6
    assert activation.codes == (0, 1)
    assert "swish: x*sigmoid(beta*x), 1 side bit" in repr(activation)


def test_spellings_agree_in_the_tails():
    plain = from_formula("x*tanh(log(1+exp(x)))")
    stable = from_formula("x*tanh(softplus(x))")
    x = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-1e30, 1e30])])
    assert torch.equal(plain(x), stable(x))
    assert torch.equal(gradient(plain, x), gradient(stable, x))


def test_cancelling_forward_is_replaced_by_polynomials():
    activation = from_formula("x*(1/2+atan(x)/pi)")
    y = activation(torch.tensor([-1e6, -1e9, -1e30]))
    assert (y + 1 / torch.pi).abs().max() <= 2.0**-25


def test_third_derivatives_are_refused():
    activation = from_formula(NEW["serf"], name="serf")
    x = torch.ones(3, requires_grad=True)
    (dx,) = torch.autograd.grad(activation(x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
    with pytest.raises(TwiceError):
        ddx.sum().backward()


def test_wrong_inputs_are_refused():
    activation = from_formula(NEW["serf"], name="serf")
    with pytest.raises(InputError, match="float32"):
        activation(torch.ones(3, dtype=torch.int32))
    with pytest.raises(InputError, match="tensor"):
        activation(1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("__import__('os').system('true')", "not allowed|reaches"),
        ("x.real", "reaches into an object"),
        ("x + y", "y"),
        ("x*cos(x)", "unboundedly many"),
        ("log(x)", "finite"),
        ("sqrt(x*x)", "derivative"),
        ("tanh(x) + 1e9", "loses its gradient"),
    ],
)
def test_refusals_are_one_clear_line(text, words):
    with pytest.raises(FormulaError, match=words) as caught:
        from_formula(text)
    assert "\n" not in str(caught.value)


def test_other_things_than_formulas_are_refused():
    with pytest.raises(FormulaError, match="int is no formula"):
        from_formula(3)


def test_a_dtype_that_loses_the_gradient_is_refused_when_called():
    activation = from_formula("tanh(x) + 30")
    assert isinstance(activation, Activation)
    gradient(activation, torch.ones(3))
    with pytest.raises(InputError, match="loses its gradient in bfloat16"):
        gradient(activation, torch.ones(3, dtype=torch.bfloat16))


def test_second_call_comes_from_the_cache(monkeypatch):
    first = from_formula(NEW["swish_1702"], name="one")
    monkeypatch.setattr(custom.binfit, "fit", lambda formula: pytest.fail("fitted again"))
    second = from_formula(NEW["swish_1702"], name="two")
    assert second.name == second.bins.name == "two"
    x = torch.linspace(-5, 5, 1000)
    assert torch.equal(gradient(first, x), gradient(second, x))


@pytest.mark.parametrize("text", ["x**3 + 1", "x**3 + x/1000000 + 1", "x - 0.999*tanh(x) + 2"])
def test_where_f_is_flat_or_nearly_so_the_floor_is_met_too(text):
    activation, fmt = from_formula(text), FORMATS["float32"]
    x = fmt.from_ordinals(torch.arange(-(1 << 18), 1 << 18) * 4096).unique()
    x = torch.cat([x[x.abs() < 1], torch.linspace(-0.1, 0.1, 1 << 18)]).unique()
    truth, y, dx = activation._slope(x.double()), activation(x), gradient(activation, x)
    lowest = floor(y, torch.zeros(len(x)), truth, fmt)
    assert lowest > 2.0**-20
    assert (dx.double() - truth).abs().max() <= 1.10 * lowest
