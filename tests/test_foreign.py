"""Layers that no one here wrote: loaded, and held to the framework's error or to their own error floor."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from invref import formats
from invref.errors import InputError
from verify import checks, cli, foreign, sweep
from verify.checks import FOREIGN_FACTOR

MODULE = """
import torch
from torch.nn import functional


def silu(x):
    return functional.silu(x)


def float32_silu(x):
    return x.float() * torch.sigmoid(x.float())


class Swish(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Stated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.nn.functional.elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * torch.where(y > 0, 1.0, y + 1)


def elu(x):
    return Stated.apply(x)


elu.invref_codes = (0, 0)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * (1 / (1 + (torch.pi * x.float()) ** 2)).to(dy.dtype)


class Straight(Sign):
    @staticmethod
    def backward(ctx, dy):
        return dy.clone()


class Window(Sign):
    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy * (x.abs() < 1)


def mish(x):
    return functional.mish(x.float()).to(x.dtype)


def planted(x):
    wide = x.float()
    return (functional.mish(wide) + 0.02 * (wide - wide.detach()) * ((x > 1) & (x < 2))).to(x.dtype)


def stepwise(x):
    return x * torch.tanh(torch.log(1 + torch.exp(x)))


def spike(x):
    return Sign.apply(x)


def straight_through(x):
    return Straight.apply(x)


def window(x):
    return Window.apply(x)


not_callable = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "someones.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("someones", None)


def checked(record, name):
    return next(check for check in record.checks if check.name == name)


def test_the_framework_called_foreign_passes_against_its_own_error():
    record = sweep.run(foreign.external("someones:silu", name="silu"), "bfloat16")
    assert record.passed
    assert record.error_floor is None
    assert record.worst_error <= FOREIGN_FACTOR * record.native_error + 1e-6
    # Below -88 exp(-x) overflows a float32, and torch returns -0 where the value still is a normal number.
    assert record.forward_worst.value < -88
    assert record.forward_error_ulps > 100
    assert record.decoder == "foreign"


def test_a_formula_takes_the_place_of_a_name():
    record = sweep.run(foreign.external("someones:silu", formula="x * sigmoid(x)"), "float16")
    assert record.passed
    assert record.formula == "x * sigmoid(x)"
    assert "--target someones:silu --formula 'x * sigmoid(x)'" in record.reproduce


def test_a_formula_that_is_another_fails_forward_and_backward():
    record = sweep.run(foreign.external("someones:silu", formula="x * sigmoid(1.1 * x)"), "float16")
    assert {"forward error in ulps", "gradient error"} <= {check.name for check in record.failures}


def test_a_module_class_is_made_and_takes_every_dtype():
    target = foreign.external("someones:Swish", name="silu")
    for fmt in (formats.get("bfloat16"), formats.get("float32")):
        x = torch.tensor([0.5, -1.0], dtype=fmt.dtype)
        assert torch.equal(target.layer(x), x * torch.sigmoid(x))


def test_torch_s_own_class_can_be_named():
    target = foreign.external("torch.nn:Hardswish", name="hardswish")
    x = torch.linspace(-4, 4, 9)
    assert torch.equal(target.layer(x), functional.hardswish(x))


def test_a_layer_that_states_its_codes_is_held_to_their_error_floor():
    target = foreign.external("someones:elu", name="elu")
    assert target.codes == (0, 0)
    record = sweep.run(target, "bfloat16")
    assert record.passed
    # Outputs just above -1 are 2^-8 apart, and so are the derivatives that they stand for.
    assert record.error_floor == pytest.approx(2.0**-9, rel=0.05)
    off = replace(target, layer=lambda x: target.layer(x * (1 + 2.0**-6)))
    assert "gradient error" in {check.name for check in sweep.run(off, "bfloat16").failures}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("spike", "1 / (1 + (pi * x)**2)"),
        ("straight_through", "1"),
        ("window", "where(abs(x) < 1, 1, 0)"),
    ],
)
def test_a_surrogate_gradient_is_compared_with_the_formula_it_is_meant_to_have(name, gradient, dtype):
    target = foreign.external(f"someones:{name}", formula="where(x > 0, 1, 0)", gradient=gradient)
    record = sweep.run(target, dtype)
    assert record.passed, record.failures
    assert record.inputs == formats.get(dtype).finite_count
    assert record.forward_error_ulps < 1e-6


MISH = "x*tanh(log(1+exp(x)))"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_layer_for_a_formula_may_round_once_and_add_what_float32_costs_and_no_more(dtype):
    samples = 2000 if dtype == "float32" else None
    fine = sweep.run(foreign.external("someones:mish", formula=MISH), dtype, samples=samples)
    assert fine.passed, fine.failures
    assert fine.bound == pytest.approx(checks.FLOAT32_KERNEL + formats.get(dtype).ulp(1.05) / 2, rel=0.1)
    # Twice what the formula itself is off by, evaluated step by step in bfloat16, would hide what is planted.
    assert dtype != "bfloat16" or 2 * fine.native_error > 0.024
    record = sweep.run(foreign.external("someones:planted", formula=MISH), dtype, samples=samples)
    assert {check.name.removesuffix(checks.SCALAR) for check in record.failures} == {"gradient error"}
    assert 1 < record.failures[0].worst.value < 2


def test_a_layer_that_rounds_at_each_step_fails_in_a_short_format():
    record = sweep.run(foreign.external("someones:stepwise", formula=MISH), "bfloat16")
    assert "gradient error" in {check.name for check in record.failures}


@pytest.mark.parametrize(
    ("formula", "layer"),
    [("1000*x*sigmoid(x)", lambda x: 1000 * functional.silu(x)), ("x*x*sigmoid(x)", lambda x: x * functional.silu(x))],
)
def test_a_large_slope_may_be_off_in_proportion(formula, layer):
    target = foreign.external("someones:silu", formula=formula)
    record = sweep.run(replace(target, layer=layer), "float32", samples=2000)
    assert "gradient error" not in {check.name.removesuffix(checks.SCALAR) for check in record.failures}


def test_a_surrogate_without_a_forward_formula_is_measured_backward_only():
    target = foreign.external("someones:straight_through", gradient="1")
    record = sweep.run(target, "bfloat16")
    assert record.passed
    assert record.forward_error_ulps is None


def test_a_surrogate_with_another_gradient_fails():
    target = foreign.external("someones:spike", formula="where(x > 0, 1, 0)", gradient="1 / (1 + x**2)")
    assert "gradient error" in {check.name for check in sweep.run(target, "float16").failures}


def test_a_surrogate_gradient_in_float32_is_sampled():
    target = foreign.external("someones:window", formula="where(x > 0, 1, 0)", gradient="where(abs(x) < 1, 1, 0)")
    record = sweep.run(target, "float32", samples=2000)
    assert record.passed, record.failures
    assert checked(record, "between the one-sided derivatives at breaks").holds


@pytest.mark.parametrize("path", ["someones:missing", "someones:not_callable", "nowhere:f", "someones"])
def test_what_cannot_be_loaded_is_bad_input(path):
    with pytest.raises(InputError):
        foreign.external(path, name="silu")


def test_a_target_needs_to_say_what_it_computes():
    with pytest.raises(InputError, match="--formula TEXT"):
        foreign.external("someones:silu")


def test_an_output_of_another_dtype_is_bad_input():
    with pytest.raises(InputError, match="shape and dtype"):
        sweep.run(foreign.external("someones:float32_silu", name="silu"), "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--native", "--formula", "x"], "leave out --target and --formula"),
        (["--gradient-formula", "1", "silu"], "name that, too"),
        (["silu", "--formula", "x * tanh(x)"], "leave out one"),
        (["--target", "someones:silu"], "--formula TEXT"),
        (["--target", "someones:silu", "--formula", "__import__('os')"], "not allowed"),
        (["--formula", ""], "--formula is empty"),
        (["--target", " "], "--target is empty"),
        (["silu", "--target", "someones:silu", "--gradient-formula", ""], "--gradient-formula is empty"),
        (["--target", "math:exp", "--formula", "exp(x)"], "the target raised"),
    ],
)
def test_arguments_that_contradict_each_other_are_bad_input(arguments, remedy, capsys):
    assert cli.main(["gradient", *arguments, "--dtype", "bfloat16"]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert remedy in error
    assert len(error.splitlines()) == 1


def test_the_command_line_verifies_a_target_against_a_formula(capsys):
    words = ["gradient", "--target", "someones:silu", "--formula", "x * sigmoid(x)", "--dtype", "bfloat16"]
    assert cli.main(words) == cli.PASSED
    assert "exhausted" in capsys.readouterr().out
    assert cli.main([*words, "--input", "0x3f80"]) == cli.PASSED
    assert "f'(x)" in capsys.readouterr().out


def test_formulas_whose_letters_are_the_same_have_names_of_their_own():
    texts = ("x*tanh(x)", "x+tanh(x)", "x*tanh(x)")
    names = [foreign.from_text(text).name for text in texts]
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("x_tanh_x_") and name.isidentifier() for name in names)
