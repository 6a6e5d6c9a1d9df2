"""torch's transforms, over every layer: the cells of docs/transforms.md, what graphs keep, and what is refused."""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import records
from torch import library, nn
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import invref
from invref import autograd, functional, layers, operators
from invref.catalogue import ROWS
from invref.decoding import Layer
from invref.errors import FormulaError, TwiceError
from verify import matrix, transforms
from verify.transforms import CELLS, NAMES, NOT_RUN, WrongError, case

# torch's own forward mode and compiler still go through it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

PAGE = matrix.PATH.read_text(encoding="utf-8")
STATED = matrix.read(PAGE)
COMPILING = ("compile", "compile, dynamic", "export")
DERIVATIVES = ("grad", "vjp", "jvp", "forward mode", "vmap of grad", "jacobian", "hessian")
TYPICAL = ("gelu", "softplus", "leaky_relu", "hardsigmoid", "prelu", "from_formula")
"""A decoder with a side bit, a closed form, no second derivative, bits only, a learnt parameter, a formula."""
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
layer_names = pytest.mark.parametrize("name", [name for name in NAMES if name not in ("relu", "tanh", "sigmoid")])


def _cells():
    for cell in CELLS:
        for name in NAMES:
            marks = [pytest.mark.slow] if cell.title in COMPILING and name not in TYPICAL else []
            yield pytest.param(cell, name, marks=marks, id=f"{cell.title}-{name}")


@pytest.mark.parametrize(("cell", "name"), list(_cells()))
def test_every_cell_is_what_the_page_says(cell, name):
    stated = STATED[cell.title, name]
    if stated == NOT_RUN and torch.cuda.is_available():
        pytest.skip("the page was made without a GPU")
    assert transforms.verdict(cell, case(name)) == stated


def test_the_page_states_every_cell_and_is_what_its_cells_make():
    assert set(STATED) == {(cell.title, name) for cell in CELLS for name in NAMES}
    assert matrix.text(STATED) == PAGE


class Doubled(torch.autograd.Function):
    """A right output and twice the gradient, under every transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


@pytest.mark.parametrize("cell", [c for c in CELLS if c.title in DERIVATIVES])
def test_a_wrong_gradient_fails_the_cell(cell):
    right = case("softsign")
    if cell.title == "vmap of grad":
        # Compared with eager mode: wrong under transforms alone.
        wrong = replace(right, layer=lambda x: right.layer(Doubled.apply(x) if autograd.transformed() else x))
    else:
        wrong = replace(right, layer=lambda x: right.layer(Doubled.apply(x)))
    with pytest.raises(WrongError):
        transforms.verdict(cell, wrong)


def test_a_wrong_second_derivative_fails_its_cells(monkeypatch):
    made = layers.get("softsign")
    second = made.second(torch.float64, torch.device("cpu"))
    planted = replace(made, second=lambda *_: lambda y, packed: 1.01 * second(y, packed))
    monkeypatch.setattr(layers, "get", lambda key: planted)
    for cell in CELLS:
        if cell.title in ("hessian", "forward mode", "double backward"):
            with pytest.raises((WrongError, GradcheckError)):
                transforms.verdict(cell, case("softsign"))


# What is kept


def saved(step):
    """Bytes of the distinct storages that autograd keeps while step() runs, and what step() returns."""
    kept = {}
    hook = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage()) or t, lambda t: t
    )
    with hook:
        result = step()
    return {pointer: storage.nbytes() for pointer, storage in kept.items()}, result


@layer_names
def test_no_output_of_a_layer_waits_for_the_garbage_collector(name):
    x = torch.randn(100, requires_grad=True)
    gc.disable()
    try:
        node = weakref.ref(case(name).layer(x).grad_fn)
        assert node() is None
    finally:
        gc.enable()


SIZE, WIDTH, ROWS_IN = 64, 256, 128


def compiled_bytes(act, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, WIDTH), act, nn.Linear(WIDTH, SIZE))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(ROWS_IN, SIZE)
    known.add(x.untyped_storage().data_ptr())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    kept, y = saved(lambda: compiled(x))
    y.sum().backward()
    for n, p in model.named_parameters():
        assert torch.equal(p.grad, expected[n])
    return sum(size for pointer, size in kept.items() if pointer not in known)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_graph_keeps_the_output_and_the_bits_and_torchs_keeps_both_tensors(backend):
    elements = ROWS_IN * WIDTH
    assert compiled_bytes(invref.GELU(), backend) == elements * 4 + elements // 8
    assert compiled_bytes(invref.ELU(), backend) == elements * 4
    # The bits alone, and y for the layer after it.
    assert compiled_bytes(invref.Hardsigmoid(), backend) == elements * 4 + elements // 8
    assert compiled_bytes(nn.GELU(), backend) >= 2 * elements * 4


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["gelu", "elu", "hardsigmoid"])
def test_inductor_gives_eager_modes_bits(name, dynamic, monkeypatch):
    monkeypatch.setattr(transforms, "BACKEND", "inductor")
    check = transforms.compile_dynamic if dynamic else transforms.compile_static
    assert check(case(name)) == transforms.HOLDS


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_inductor_gives_those_with_parameters_the_bits_of_torchs_own(name):
    # Which need not be those of eager mode: inductor contracts products and sums.
    this, (x, dy) = case(name), (torch.randn(50, 7), torch.randn(50, 7))
    ours, theirs = (torch.compile(layer, fullgraph=True) for layer in (this.layer, this.native))
    for got, wanted in zip(transforms.gradient(ours, x, dy), transforms.gradient(theirs, x, dy), strict=True):
        assert torch.equal(got, wanted)


# Graphs


def test_a_compiled_graph_says_that_it_is_differentiated_once():
    torch._dynamo.reset()
    compiled = torch.compile(functional.gelu, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, requires_grad=True)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


def exported():
    model = nn.Sequential(nn.Linear(4, 4), invref.GELU(), nn.Linear(4, 2))
    return torch.export.export(model, (torch.randn(3, 4),)).module()


def test_an_exported_graph_refuses_second_derivatives_and_forward_mode():
    program = exported()
    x = torch.randn(3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(program(x).square().sum(), x, create_graph=True)
    with pytest.raises(TwiceError, match="eager mode"):
        dx.square().sum().backward()
    with forward_ad.dual_level(), pytest.raises(TwiceError, match="forward mode"):
        program(forward_ad.make_dual(x.detach(), torch.ones(3, 4)))
    with pytest.raises(TwiceError, match="forward mode"):
        jvp(lambda v: program(v).sum(), (x.detach(),), (torch.ones(3, 4),))
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(lambda v: program(v).sum())(x.detach())


def test_transforms_inside_a_compiled_function_give_eager_modes_values():
    x = torch.linspace(-3, 3, 15).view(3, 5)
    for f in (
        lambda v: vmap(grad(lambda row: functional.gelu(row).sum()))(v),
        lambda v: jvp(functional.gelu, (v,), (v,))[1],
        lambda v: jvp(grad(lambda w: functional.gelu(w).sum()), (v,), (v,))[1],
    ):
        torch._dynamo.reset()
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
        # Decoded in eager mode, torch's own in the graph. At these points |f'| >= 0.01, |f''| and the next <= 1.2: an
        # ulp of y, 2^-24 |y| / |f'| in x, is at most 2^-16 in f' and f'', times |x| <= 3; and 2^-20 are the decoder's.
        assert torch.allclose(got, f(x), rtol=0, atol=3 * (2.0**-16 + 2.0**-20))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "from_formula"])
def test_compiled_autocast_has_the_dtype_and_gradient_of_eager_autocast(name):
    this = case(name)
    weight = torch.randn(6, 5)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return this.layer(nn.functional.linear(x, weight))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(7, 5), torch.randn(7, 6)
    results = []
    for f in (compiled, step):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(dy.to(y.dtype))
        results.append((y.detach(), leaf.grad))
    assert results[0][0].dtype == results[1][0].dtype
    assert torch.equal(results[0][0], results[1][0])
    if name != "xielu":
        assert torch.equal(results[0][1], results[1][1])
        return
    # torch's own in the graph: the errors of both gradients, as certified, times |dy|, go through the linear layer,
    # whose gradient is the sum of six bfloat16 products of numbers rounded to half an eps.
    record = records()[name, "bfloat16"]
    error = (dy.abs() * (record.worst_error + record.native_error)) @ weight.abs()
    rounding = 8 * 2.0**-8 * (dy.abs() * results[1][0].float().abs().clamp(min=2)) @ weight.abs()
    assert ((results[0][1] - results[1][1]).abs() <= error + rounding).all()


def test_a_saved_program_runs_in_another_process(tmp_path):
    act = invref.from_formula("x * sigmoid(a * x)", name="swish", parameters={"a": "1.25"})
    model = nn.Sequential(nn.Linear(4, 4), act.module(), invref.Softplus(0.3, 5.0), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "program.pt2")
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.sum().backward()
    torch.save((x, y.detach(), leaf.grad), tmp_path / "expected.pt")
    code = f"""
import torch, invref.operators
x, y, dx = torch.load({str(tmp_path / "expected.pt")!r})
program = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
x.requires_grad_()
got = program(x)
got.sum().backward()
assert torch.equal(got, y) and torch.equal(x.grad, dx)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].key])
def test_the_operators_shapes_and_gradients_are_what_they_declare(name):
    row = ROWS[name]
    for x in (torch.randn(3, 200), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(0)):
        args = (x.requires_grad_(), row.name, list(row.arguments), operators.graph_order(x))
        tests = ("test_schema", "test_faketensor")
        library.opcheck(torch.ops.invref.forward.default, args, test_utils=tests)
        y, packed = torch.ops.invref.forward(*args)
        back = (torch.ones_like(y), y.detach(), packed, *args[1:])
        library.opcheck(torch.ops.invref.backward.default, back, test_utils=tests)


# Keys


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-320, 1.7976931348623157e308, 1 / 3])
def test_keys_carry_their_numbers_to_the_bit(value):
    forward = layers.get(layers.key_of("threshold", (1.0, value))).forward
    got = forward(torch.zeros(1, dtype=torch.float64))
    assert torch.equal(got.view(torch.int64), torch.tensor([value], dtype=torch.float64).view(torch.int64))


def test_a_key_that_names_nothing_is_refused():
    with pytest.raises(FormulaError, match="there is no layer 'nothing': use one of gelu"):
        layers.get("nothing 1.0")


# Autocast


def test_of_all_layers_only_prelu_changes_its_dtype_under_cpu_autocast():
    x = torch.randn(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changed = [name for name, row in ROWS.items() if row.native(x).dtype != x.dtype]
        narrow = [name for name, row in ROWS.items() if row.native(x.bfloat16()).dtype != torch.bfloat16]
    assert (changed, narrow) == (["prelu"], [])


def test_a_forward_that_widens_is_decoded_in_the_dtype_of_its_output():
    # As softplus is under autocast on a GPU: 16 bit in, float32 out.
    for key, function in (("softplus 1.0 20.0", functional.softplus), ("gelu", functional.gelu)):
        made = layers.get(key)
        widened = Layer("widened", lambda x, made=made: made.forward(x.float()), made.scheme, made.second)
        x = torch.randn(1000).bfloat16().requires_grad_()
        y = autograd.inverted(x, widened.forward, widened)
        assert y.dtype == torch.float32
        (dx,) = torch.autograd.grad(y.sum(), x)
        leaf = x.detach().float().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
        assert torch.equal(dx, expected.bfloat16())


def test_a_forward_that_lays_its_output_out_otherwise_is_decoded_where_its_elements_lie():
    made = layers.get("gelu")
    turned = Layer("turned", lambda x: made.forward(x).t().contiguous().t(), made.scheme, made.second)
    x = torch.randn(30, 40, requires_grad=True)
    dy = torch.randn(30, 40)
    y = autograd.inverted(x, turned.forward, turned)
    assert y.stride() == (1, 30)
    (dx,) = torch.autograd.grad(y, x, dy)
    (expected,) = torch.autograd.grad(functional.gelu(x), x, dy)
    assert torch.equal(dx, expected)
    x = x.detach()
    tangent = torch.func.jvp(lambda x: autograd.inverted(x, turned.forward, turned), (x,), (dy,))[1]
    assert torch.equal(tangent, expected)
    dx = torch.func.grad(lambda x: (autograd.inverted(x, turned.forward, turned) * dy).sum())(x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@layer_names
def test_batches_of_gradients_are_those_of_each(name, dtype):
    f = case(name).layer
    x = case(name).points.to(dtype).requires_grad_()
    rows = torch.stack([torch.linspace(-1, 1, 12), torch.ones(12)]).to(dtype)
    y = f(x)
    together = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)[0]
    for got, row in zip(together, rows, strict=True):
        # A product of two rounded numbers, instead of one rounded product: three roundings of half an eps in all.
        expected = torch.autograd.grad(y, x, row, retain_graph=True)[0]
        assert torch.allclose(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if dtype == torch.float64:
        jacobian = torch.autograd.functional.jacobian(f, x.detach(), vectorize=True)
        assert torch.allclose(jacobian, torch.diag(case(name).slope(x.detach())), rtol=1e-7, atol=1e-8)
        hessian = torch.autograd.functional.hessian(lambda v: f(v).square().sum(), x.detach(), vectorize=True)
        plain = torch.autograd.functional.hessian(lambda v: f(v).square().sum(), x.detach())
        assert torch.allclose(hessian, plain, rtol=1e-9, atol=1e-10)


# Learnt parameters


def test_per_sample_gradients_of_a_model_reach_learnt_parameters():
    model = nn.Sequential(nn.Linear(3, 4), invref.PReLU(4), invref.GELU(), invref.XIELUActivation().float()).double()
    theirs = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.GELU()).double()
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("3")})
    state = dict(model.named_parameters())
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss(params, row):
        return functional_call(model, params, row.unsqueeze(0)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(state, x)
    for i in range(5):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for n, p in model.named_parameters():
            assert torch.allclose(per_sample[n][i], p.grad, rtol=1e-7, atol=1e-8), n


@pytest.mark.parametrize("weight", [[0.3], [-0.5], [0.0], [0.3, -0.2]], ids=str)
def test_prelu_is_differentiated_twice_by_its_weight_too(weight):
    x = torch.linspace(-2.03, 2.07, 8, dtype=torch.float64).view(4, 2).requires_grad_()
    w = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(functional.prelu, (x, w))


def test_xielu_is_differentiated_twice_by_its_parameters_too():
    x = torch.linspace(-3.03, 3.07, 9, dtype=torch.float64, requires_grad=True)
    alphas = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.3, -0.2)]
    assert torch.autograd.gradgradcheck(functional.xielu, (x, *alphas))


@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_third_derivatives_of_learnt_layers_are_refused_and_never_left_out(name):
    x = torch.randn(6, requires_grad=True)
    (dx,) = torch.autograd.grad(ROWS[name].layer(x).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
    with pytest.raises(TwiceError, match="third derivatives"):
        (ddx.sum() + x.sum()).backward()


@pytest.mark.parametrize("name", ["gelu", "softplus"])
def test_third_derivatives_are_refused_by_every_road(name):
    f, x = ROWS[name].layer, torch.tensor(0.3)
    for third in (
        lambda: grad(grad(grad(f)))(x),
        lambda: jvp(grad(grad(f)), (x,), (x,)),
        lambda: grad(lambda v: jvp(grad(f), (v,), (torch.ones(()),))[1])(x),
    ):
        with pytest.raises(TwiceError, match="third derivatives"):
            third()


class _Overwriting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.linear(x)
        return functional.silu(hidden, inplace=True) + hidden


def test_a_graph_of_torch_fx_calls_layers_by_key_in_place_too():
    net, x, dy = _Overwriting(), torch.randn(6, 5), torch.randn(6, 4)
    traced = torch.fx.symbolic_trace(net)
    assert [node.args[1:] for node in traced.graph.nodes if node.target is functional.of_key] == [("silu", True)]
    for got, wanted in zip(transforms.gradient(traced, x, dy), transforms.gradient(net, x, dy), strict=True):
        assert torch.equal(got, wanted)


def test_a_key_that_names_no_layer_is_refused():
    with pytest.raises(FormulaError, match="there is no layer 'gelo'"):
        functional.of_key(torch.ones(3), "gelo")


@pytest.mark.parametrize("key", ["softplus", "softplus a b", "gelu 1.0", "formula", "formula xx", "elu 1.0 2.0"])
def test_a_key_whose_arguments_are_not_the_layers_is_refused(key):
    with pytest.raises(FormulaError):
        functional.of_key(torch.ones(3), key)


@pytest.mark.parametrize("name", TYPICAL)
def test_a_graph_of_torch_fx_is_compiled_whole_and_exported(name):
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(5, 4), case(name).module(), nn.Linear(4, 3))
    traced, x, dy = torch.fx.symbolic_trace(net), torch.randn(6, 5), torch.randn(6, 3)
    expected = transforms.gradient(net, x, dy)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    programs = [torch.export.export(traced, (x,), strict=strict).module() for strict in (True, False)]
    for other in (compiled, *programs):
        for got, wanted in zip(transforms.gradient(other, x, dy), expected, strict=True):
            transforms.alike(case(name), "traced, then compiled", got, wanted)


class _Captured(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.captured, self.layer = torch.randn(40, requires_grad=True), layer

    def forward(self, x):
        return self.layer(self.captured) * x


@pytest.mark.filterwarnings("ignore:A model attribute")
@pytest.mark.parametrize("name", ["gelu", "softplus", "hardsigmoid", "from_formula"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_carries_the_layer_of_a_tensor_that_it_has_captured(name, strict):
    model, x = _Captured(case(name).layer), torch.randn(40)
    program = torch.export.export(model, (x,), strict=strict)
    assert torch.ops.invref.forward.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("name", [*TYPICAL, "xielu"])
@pytest.mark.parametrize("tracing", ["real", "fake"])
def test_make_fx_of_a_gradient_records_it(name, tracing):
    def slope(x):
        return torch.autograd.grad(layer(x).sum(), x)[0]

    layer = case(name).layer
    x, other = (torch.randn(40, requires_grad=True) for _ in range(2))
    slope(x)
    graph = make_fx(slope, tracing_mode=tracing)(x)
    transforms.alike(case(name), "traced by make_fx", graph(other), slope(other))


def test_a_formula_is_made_again_from_its_key_when_copies_have_come_and_gone():
    made = invref.from_formula("x*sigmoid(x)*2", name="twice_silu")
    x = torch.randn(9)
    expected = made(x)
    copied = pickle.loads(pickle.dumps(made))
    del copied
    gc.collect()
    assert torch.equal(functional.of_key(x, made.key), expected)
    y = x.clone()
    assert functional.of_key(y, made.key, inplace=True) is y
    assert torch.equal(y, expected)


UNNAMED = """
import pickle, sys, torch, invref
x = torch.linspace(-3, 3, 40).view(5, 8)
if len(sys.argv) == 2:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), invref.from_formula("x*sigmoid(x)*3").module())
    pickle.dump(torch.fx.symbolic_trace(net), open(sys.argv[1], "wb"))
else:
    net = pickle.load(open(sys.argv[1], "rb"))
print(net(x).double().sum().item())
"""


def test_a_graph_with_a_formula_without_a_name_works_in_another_process(tmp_path):
    def run(*more):
        arguments = [sys.executable, "-c", UNNAMED, str(tmp_path / "graph"), *more]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    assert run() == run("again")
