"""Models converted in place: the same numbers, the same objects, and nothing swapped that computes something else."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import invref
from invref import recognize, trial
from invref.errors import InputError

# torch.compile's own imports, and PEFT's of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

WORST = {name: record.worst_error for (name, dtype), record in records().items() if dtype == "float32"}
"""The largest error of each layer's gradient over all float32 inputs."""
TORCH = [
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Hardswish(), nn.ELU(2.0), nn.SELU(),
    nn.CELU(0.5), nn.Softplus(), nn.Softplus(2.0, 10.0), nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(),
    nn.LeakyReLU(0.1, inplace=True), nn.Hardtanh(-0.3, 0.7), nn.ReLU6(), nn.Hardsigmoid(), nn.Hardshrink(0.3),
    nn.Softshrink(0.3), nn.Threshold(0.1, 0.0), nn.PReLU(), nn.PReLU(3),
]  # fmt: skip
TINY = {
    "bert": ("Bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                      "vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0,
                      "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("Llama", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                        "num_key_value_heads": 2, "vocab_size": 50}),
    "t5": ("T5", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 50,
                  "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}),
    "vit": ("ViT", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                    "image_size": 16, "patch_size": 8}),
}  # fmt: skip
"""Of transformers: the model, and what its configuration has other than usual."""


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights, and what it takes."""
    import transformers

    family, sizes = TINY[name]
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes))
    tokens = torch.randint(1, 50, (2, 16))
    batch = {"input_ids": tokens} if name != "t5" else {"input_ids": tokens, "decoder_input_ids": tokens}
    return model.train(), {"pixel_values": torch.randn(2, 3, 16, 16)} if name == "vit" else batch


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state


def kept(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What a forward keeps for backward."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        module(x.clone().requires_grad_() * 1)
    return found


def snapshot(model: nn.Module) -> list[tuple[str, int, type, dict[str, object]]]:
    return [(name, id(m), type(m), dict(vars(m))) for name, m in model.named_modules()]


# Each activation, alone.


@pytest.mark.parametrize("module", TORCH, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_of_torch_becomes_ours_and_computes_the_same(module, dtype):
    model = nn.Sequential(nn.Linear(3, 3), copy.deepcopy(module)).to(dtype)
    module = model[1]
    own = type(module)
    x = (3 * torch.randn(50, 3)).to(dtype)
    expected = module(x.clone())
    done = invref.convert(model)
    assert [site.taken for site in done.sites] == [True], done
    assert type(module) is getattr(invref, own.__name__)
    assert isinstance(module, own)
    assert torch.equal(module(x.clone()), expected)
    packed = sum(8 * t.nbytes for t in kept(module, x.repeat(200, 1)) if t.dtype == torch.uint8)
    # Packed in blocks, so that a few more may be kept.
    assert done.sites[0].bits == round(packed / (200 * x.numel()))
    done.undo()
    assert type(module) is own


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Tanh(), nn.Sigmoid()], ids=repr)
def test_what_keeps_its_output_anyway_is_left_and_said_to_be(module):
    (site,) = invref.convert(module).sites
    assert not site.taken
    assert "keeps the output already" in site.why
    assert type(module).__module__ == "torch.nn.modules.activation"


TRANSFORMERS = [
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_accurate", "laplace", "mish", "quick_gelu",
    "relu2", "silu", "sqrtsoftplus", "xielu",
]  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_activation_of_transformers_becomes_ours_and_stays_an_instance_of_its_class(name):
    from transformers.activations import ACT2FN

    module = ACT2FN[name]
    own, x = type(module), torch.randn(4, 100).to(torch.bfloat16 if name == "xielu" else torch.float32)
    expected = module(x)
    done = invref.convert(module)
    assert [site.taken for site in done.sites] == [True], done
    assert isinstance(module, own)
    assert type(module).__name__ == own.__name__
    assert torch.equal(module(x), expected)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    done.undo()
    assert type(module) is own


def test_every_activation_of_transformers_is_taken_or_has_its_reason():
    from transformers.activations import ACT2CLS, ACT2FN

    everything = nn.ModuleDict({name: ACT2FN[name] for name in ACT2CLS})
    done = invref.convert(everything)
    left = {site.name: site.why for site in done.sites if not site.taken}
    assert left.keys() == {"gelu_python", "gelu_python_tanh", "relu", "sigmoid", "tanh"}
    assert "linear" not in {site.name for site in done.sites}
    # They compute the same formula with another rounding.
    assert "its output is" in left["gelu_python"]


# Impostors.


class Function(torch.autograd.Function):
    """forward(x), with backward(x, dy) as its gradient."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.save_for_backward(x)
        ctx.backward = backward
        return forward(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.backward(*ctx.saved_tensors, dy), None, None


def gradient(forward, x, dy):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf), leaf, dy)[0]


def straight_through(self, x):
    return Function.apply(x, functional.silu, lambda x, dy: dy)


def deaf(self, x):
    """The gradient whatever the incoming one is."""
    return Function.apply(x, functional.silu, lambda x, dy: gradient(functional.silu, x, torch.ones_like(x)))


def other_form(self, x):
    """GELU with the gradient of its tanh form."""
    tanh = functools.partial(functional.gelu, approximate="tanh")
    return Function.apply(x, functional.gelu, lambda x, dy: gradient(tanh, x, dy))


def nearly(self, x):
    """The gradient, off by 1e-6 around 3 alone."""
    return Function.apply(
        x, functional.gelu, lambda x, dy: gradient(functional.gelu, x, dy) + 1e-6 * dy * ((x - 3).abs() < 0.1)
    )


def half_wrong(self, x):
    """With another rounding in bfloat16 alone: as one that computes in float32 has."""
    return functional.softplus(x.float()).to(x.dtype).sqrt() if x.dtype == torch.bfloat16 else functional.mish(x)


def far_wrong(self, x):
    return torch.where(x > 1e25, 1e25, functional.silu(x))


def unsigned(self, x):
    return torch.where(x == 0, 0.0, functional.silu(x))


def noisy(self, x):
    return functional.silu(x) * (1 + 1e-6 * torch.rand_like(x))


def deaf_weight(self, x):
    return functional.prelu(x, self.weight.detach())


class Scaled(nn.GELU):
    def forward(self, x):
        return 1.001 * super().forward(x)


class Renamed(nn.GELU):
    """A subclass that computes the same."""

    extra = 3


def patched(module: nn.Module, forward: object) -> nn.Module:
    module.forward = forward
    return module


IMPOSTORS = {
    "another formula on the instance": (patched(nn.SiLU(), functional.gelu), "replaced on the instance"),
    "straight through on the instance": (
        patched(nn.SiLU(), lambda x: straight_through(None, x)),
        "replaced on the instance",
    ),
    "a subclass": (Renamed(), "a subclass of GELU"),
    "a subclass with other arithmetic": (Scaled(), "a subclass of GELU"),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_left_alone_with_the_reason(name):
    module, words = IMPOSTORS[name]
    before = dict(vars(module)), type(module)
    (site,) = invref.convert(nn.Sequential(nn.Linear(3, 3), module)).sites
    assert not site.taken
    assert words in site.why
    assert (vars(module), type(module)) == before


@pytest.mark.parametrize(
    ("own", "forward", "words"),
    [
        (nn.SiLU, lambda self, x: functional.gelu(x), "does not compute silu: at x ="),
        (nn.SiLU, straight_through, "its gradient is 1 and not"),
        (nn.SiLU, deaf, "does not compute silu: at x ="),
        (nn.SiLU, far_wrong, "does not compute silu: at x = "),
        (nn.SiLU, unsigned, "does not compute silu: at x = -0 its output is 0 and not -0"),
        (nn.SiLU, noisy, "does not compute silu"),
        (nn.GELU, other_form, "does not compute gelu: at x ="),
        (nn.GELU, nearly, "in float64 its gradient"),
        (nn.Mish, half_wrong, "in bfloat16 its output"),
        (nn.PReLU, deaf_weight, "the gradients of its parameters are [0.0] and not ["),
        (nn.GELU, lambda self, x: functional.gelu(x) * (1 + 2**-23), "does not compute gelu"),
        (nn.Mish, lambda self, x: functional.mish(x).double(), "its output is torch.float64"),
        (nn.Softplus, lambda self, x: torch.nan, "could not be tried"),
        (nn.ELU, lambda self, x: functional.elu(x, self.alpha * 1.01), "does not compute elu"),
    ],
)
def test_a_class_patched_by_others_is_found_out(monkeypatch, own, forward, words):
    monkeypatch.setattr(own, "forward", forward)
    (site,) = invref.convert(own()).sites
    assert not site.taken
    assert words in site.why


def test_subclasses_are_taken_when_asked_if_their_forward_is_inherited():
    model = nn.Sequential(Renamed(), Scaled())
    done = invref.convert(model, subclasses=True)
    assert [site.taken for site in done.sites] == [True, False]
    assert "a forward of its own" in done.sites[1].why
    assert isinstance(model[0], Renamed)
    assert isinstance(model[0], invref.GELU)
    assert model[0].extra == 3
    again = pickle.loads(pickle.dumps(model[0]))
    assert type(again) is type(model[0])
    assert not any(site.taken for site in invref.convert(model, subclasses=True).sites)
    done.undo()
    assert type(model[0]) is Renamed


def test_trying_a_module_leaves_no_trace():
    module = nn.PReLU(3)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    module.register_full_backward_hook(lambda *_: calls.append(2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    done = invref.convert(nn.Sequential(module), dry_run=True)
    assert done.sites[0].taken
    assert type(module) is nn.PReLU
    assert calls == []
    assert module.weight.grad is None
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_forward_that_counts_its_calls_counts_none(monkeypatch):
    def forward(self, x):
        self.calls += 1
        self.seen.append(1)
        torch.rand(1)
        return functional.silu(x)

    monkeypatch.setattr(nn.SiLU, "forward", forward)
    module = nn.SiLU()
    module.calls, module.seen = 0, []
    state = torch.random.get_rng_state()
    assert invref.convert(module, dry_run=True).sites[0].taken
    assert (module.calls, module.seen) == (0, [])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", trial.HALVES)
def test_every_number_of_a_16_bit_format_is_tried(dtype):
    tried = torch.cat([x.view(torch.int16) for x in trial.grids(nn.GELU(), dtype)])
    assert len(tried.unique()) == 1 << 16


@settings(deadline=None, max_examples=20)
@given(st.floats(-30, 30, width=32), st.floats(0.015625, 8, width=32), st.floats(0.1, 30))
def test_activations_are_taken_whatever_their_arguments_are(low, width, number):
    # No rounding and no jump within a module is mistaken for another formula.
    modules = [
        nn.Hardtanh(low, low + width), nn.Threshold(low, min(low, 0.0)), nn.Softplus(number, 20.0), nn.ELU(number),
        nn.CELU(number), nn.LeakyReLU(number), nn.Hardshrink(number), nn.Softshrink(number), nn.PReLU(init=low),
    ]  # fmt: skip
    done = invref.convert(nn.ModuleList(modules))
    assert [site.why for site in done.sites] == [""] * len(modules)


def test_arguments_that_no_decoder_serves_are_left_with_its_reason():
    (site,) = invref.convert(nn.ELU(4096.0)).sites
    assert not site.taken
    assert "1024" in site.why


@pytest.mark.parametrize("where", ["inference", "no_grad", "float64", "meta", "autocast", "inverted"])
def test_modules_are_tried_the_same_in_any_context(where):
    contexts = {
        "inference": torch.inference_mode(), "no_grad": torch.no_grad(), "meta": torch.device("meta"),
        "autocast": torch.autocast("cpu", torch.bfloat16), "inverted": invref.inverted(),
    }  # fmt: skip
    modules = nn.ModuleList([nn.GELU(), nn.PReLU(), nn.Softplus(), Scaled()])
    default = torch.get_default_dtype()
    if where == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with contexts.get(where, contextlib.nullcontext()):
            done = invref.convert(modules, subclasses=True)
    finally:
        torch.set_default_dtype(default)
    assert [site.taken for site in done.sites] == [True, True, True, False]


# Whole models.


@pytest.mark.parametrize("name", TINY)
def test_a_model_computes_the_same_and_comes_back_as_it_was(name):
    model, batch = tiny(name)
    before = snapshot(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = output(model, batch)
    done = invref.convert(model)
    assert any(site.taken for site in done.sites)
    assert [entry[:2] for entry in snapshot(model)] == [entry[:2] for entry in before]
    assert [entry[3] for entry in snapshot(model)] == [entry[3] for entry in before]
    assert all(isinstance(m, was) for m, (_, _, was, _) in zip(model.modules(), before, strict=True))
    assert torch.equal(output(model, batch), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    again = invref.convert(model)
    assert {site.why for site in again.sites if site.formula != "tanh"} == {"inverted already"}
    done.undo()
    assert snapshot(model) == before
    done.undo()
    assert snapshot(model) == before
    assert torch.equal(output(model, batch), expected)


@pytest.mark.parametrize("name", TINY)
def test_every_activation_of_a_model_gets_a_gradient_within_its_verified_error(name):
    model, batch = tiny(name)
    native = {n: copy.deepcopy(m).double() for n, m in model.named_modules()}
    done = invref.convert(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for site in done.sites:
        if site.taken:

            def note(module, inputs, y, name=site.name):
                inputs[0].retain_grad()
                y.retain_grad()
                seen[name] = inputs[0], y

            model.get_submodule(site.name).register_forward_hook(note)
    y = output(model, batch)
    y.backward(torch.randn_like(y))
    formulas = {site.name: site.formula for site in done.sites if site.taken}
    assert seen.keys() == formulas.keys()
    for at, (x, y) in seen.items():
        leaf = x.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(native[at](leaf), leaf, y.grad.double())
        # The error is that of an incoming gradient of 1; the product with another is rounded once more.
        bound = WORST[formulas[at]] * y.grad.double().abs() + 2**-24 * x.grad.double().abs()
        assert ((x.grad.double() - exact).abs() <= bound).all()


def test_hooks_flags_and_parameters_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.GELU())
    model[1].weight.grad = torch.ones(1)
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append("forward"))
    model[2].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[2].eval()
    weight = model[1].weight
    invref.convert(model)
    model(torch.randn(2, 3))
    assert calls == ["before", "forward"]
    assert not model[2].training
    assert model[1].weight is weight
    assert torch.equal(weight.grad, torch.ones(1))


def test_a_shared_module_is_one_site_with_all_its_names():
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Sequential(nn.Linear(2, 2), act))
    done = invref.convert(model)
    (site,) = done.sites
    assert site.names == ("1", "2.1")
    assert re.search(r"^1 and 1 more +GELU", str(done), re.MULTILINE)
    assert type(model[1]) is invref.GELU


@settings(deadline=None, max_examples=25)
@given(st.recursive(st.sampled_from(["gelu", "silu", "linear"]), lambda s: st.lists(s, min_size=1, max_size=3)))
def test_nested_containers(tree):
    def made(node):
        leaves = {"gelu": nn.GELU, "silu": nn.SiLU, "linear": lambda: nn.Linear(2, 2)}
        return leaves[node]() if isinstance(node, str) else nn.Sequential(*map(made, node))

    model = made(tree)
    wanted = [type(m) for m in model.modules() if type(m) in (nn.GELU, nn.SiLU)]
    before = snapshot(model)
    done = invref.convert(model)
    assert len([site for site in done.sites if site.taken]) == len(wanted)
    assert not any(type(m) in (nn.GELU, nn.SiLU) for m in model.modules())
    done.undo()
    assert snapshot(model) == before


def test_a_converted_model_is_saved_loaded_and_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.PReLU())
    fresh = copy.deepcopy(model)
    invref.convert(model)
    fresh.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_converted_models_are_read_in_another_process(tmp_path):
    from transformers.activations import ACT2FN

    model = nn.Sequential(nn.Linear(2, 2), ACT2FN["gelu_new"], nn.GELU())
    invref.convert(model)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    program = "import pickle, sys; m = pickle.load(open(sys.argv[1], 'rb')); print(*[type(c).__module__ for c in m])"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["torch.nn.modules.linear", "invref.recognize", "invref.nn"]


def test_only_reaches_what_is_inside():
    model = nn.Sequential(nn.Sequential(nn.GELU(), nn.SiLU()), nn.GELU())
    done = invref.convert(model, only=["0"])
    assert [(site.name, site.taken) for site in done.sites] == [("0.0", True), ("0.1", True), ("1", False)]
    done.undo()
    assert all(site.taken for site in invref.convert(model, only=[""]).sites)


def test_a_module_that_holds_its_own_parent():
    model = nn.Sequential(nn.GELU(), nn.Linear(2, 2))
    model[1].parent = model
    (site,) = invref.convert(model).sites
    assert site.names == ("0",)


class Slotted(nn.GELU):
    __slots__ = ("more",)


def test_subclasses_that_are_laid_out_otherwise():
    model = nn.Sequential(nn.SiLU(), Slotted())
    done = invref.convert(model, subclasses=True)
    assert [site.taken for site in done.sites] == [True, True]
    assert isinstance(model[1], Slotted)
    done.undo()
    assert [type(m) for m in model] == [nn.SiLU, Slotted]


def test_swapping_is_all_or_nothing(monkeypatch):
    class Elsewhere(nn.Module):
        __slots__ = ("more",)

        def forward(self, x):
            return functional.silu(x)

    monkeypatch.setitem(recognize._TORCH, nn.SiLU, recognize.Known(Elsewhere, lambda _: "silu"))
    model = nn.Sequential(nn.GELU(), nn.SiLU())
    with pytest.raises(InputError, match="cannot swap a SiLU"):
        invref.convert(model)
    assert type(model[0]) is nn.GELU


class Mine(invref.GELU):
    """A subclass of ours."""


def test_subclasses_of_ours_are_inverted_already():
    (site,) = invref.convert(Mine("tanh")).sites
    assert (site.formula, site.taken, site.why) == ("gelu_tanh", False, "inverted already")


def test_confined_to_names_dry_and_switched_off():
    model = nn.Sequential(nn.GELU(), nn.GELU(), nn.GELU())
    assert not any(site.taken for site in invref.convert(model, activations=False).sites)
    assert all(site.taken for site in invref.convert(model, dry_run=True).sites)
    assert all(type(m) is nn.GELU for m in model)
    done = invref.convert(model, only=["1"])
    assert [type(m) for m in model] == [nn.GELU, invref.GELU, nn.GELU]
    assert "not among those asked for" in done.sites[0].why


def test_before_a_dropout_nothing_is_gained():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Dropout(0.1), nn.GELU(), nn.Dropout(0.0))
    done = invref.convert(model)
    assert [site.taken for site in done.sites] == [False, True]
    assert "a dropout follows" in done.sites[0].why
    assert invref.convert(model, force=True).sites[0].taken


@pytest.mark.parametrize("between", [[], [nn.Identity()], [nn.Dropout(0.0)]])
def test_a_dropout_follows_across_containers(between):
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.GELU()), *between, nn.Sequential(nn.Dropout(0.1)), nn.GELU()
    )
    assert [site.taken for site in invref.convert(model).sites] == [False, True]


@pytest.mark.parametrize("activation", ["gelu", functional.gelu, nn.GELU()])
def test_the_encoder_of_torch(activation):
    torch.manual_seed(3)
    model = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 8)
    trained, evaluated = model(x), copy.deepcopy(model).eval()(x)
    (site,) = invref.convert(model).sites
    assert (site.name, site.taken) == ("activation", isinstance(activation, nn.Module))
    assert torch.equal(model(x), trained)
    assert torch.equal(model.eval()(x), evaluated)


def test_functions_that_a_model_holds_are_named_with_the_remedy():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = functional.gelu

        def forward(self, x):
            return self.act(x)

    done = invref.convert(nn.Sequential(Block()))
    (site,) = done.sites
    assert (site.name, site.what, site.formula, site.taken) == ("0.act", "function", "gelu", False)
    assert "with invref.inverted():" in site.why


def test_the_table_says_where_what_and_why():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.ReLU())
    text = str(invref.convert(model))
    assert re.search(r"^1 +GELU +gelu +1 +inverted$", text, re.MULTILINE)
    assert re.search(r"^2 +ReLU +relu +native: torch keeps the output already", text, re.MULTILINE)
    assert text.endswith("1 of 2 run backward from their output")
    again = invref.convert(model)
    assert re.search(r"^1 +GELU +gelu +inverted already$", str(again), re.MULTILINE)
    assert str(again).endswith("1 of 2 run backward from their output")
    dry = invref.convert(nn.Sequential(nn.GELU()), dry_run=True)
    assert str(dry).endswith("1 of 1 would run backward from their output")
    undone = invref.convert(nn.Sequential(nn.GELU()))
    undone.undo()
    assert str(undone).endswith("1 of 1 ran, until undone, backward from their output")
    assert str(invref.convert(nn.Linear(2, 2))) == "no activations that invref knows"


# What is refused.


def test_undoing_after_others_have_changed_a_class_is_refused_whole():
    model = nn.Sequential(nn.GELU(), nn.SiLU())
    done = invref.convert(model)
    model[1].__class__ = nn.ReLU
    with pytest.raises(InputError, match="cannot undo: a SiLU has become a ReLU"):
        done.undo()
    assert type(model[0]) is invref.GELU


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m), lambda m: nn.Sequential(torch.compile(m))])
def test_a_compiled_model_is_refused(wrap):
    model = nn.Sequential(nn.GELU())
    with pytest.raises(InputError, match=r"convert before torch\.compile"):
        invref.convert(wrap(model))
    assert type(model[0]) is nn.GELU


def test_a_module_compiled_in_place_is_refused():
    model = nn.Sequential(nn.GELU())
    model.compile()
    with pytest.raises(InputError, match="too late: the model is compiled already"):
        invref.convert(model)


def test_a_scripted_model_is_refused():
    with pytest.raises(InputError, match=r"convert before torch\.jit"):
        invref.convert(torch.jit.script(nn.Sequential(nn.GELU())))


@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "laplace"])
def test_what_takes_the_place_of_transformers_classes_is_traced(name):
    from transformers.activations import ACT2FN

    module, x = ACT2FN[name], torch.randn(40, requires_grad=True)
    expected = module(x)
    invref.convert(module)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    word = "input"
    assert torch.equal(module(**{word: x}), expected)


def test_a_converted_model_is_compiled():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(3, 4)
    expected = model(x)
    invref.convert(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("gelu", {}),
        (nn.GELU, {}),
        (nn.Sequential(nn.GELU()), {"only": ["7"]}),
        (nn.Sequential(nn.GELU()), {"only": "0"}),
    ],
)
def test_bad_arguments_have_one_line(model, named):
    with pytest.raises(InputError) as raised:
        invref.convert(model, **named)
    assert "\n" not in str(raised.value)


def test_nothing_changes_where_parameters_have_no_numbers():
    (site,) = invref.convert(nn.PReLU(device="meta")).sites
    assert not site.taken
    assert "have no numbers yet" in site.why


def test_kernels_of_others_are_left_alone():
    from transformers.activations import ACT2FN

    module = ACT2FN["xielu"]
    module._xielu_cuda_obj = object()
    assert "a CUDA kernel of its own" in invref.convert(module).sites[0].why


# Wrapped models.


def test_a_model_that_accelerate_has_placed():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    hooks.add_hook_to_module(model[1], hooks.AlignDevicesHook(execution_device="cpu"))
    (site,) = invref.convert(model).sites
    assert "convert before accelerate places the model" in site.why


def test_a_model_with_adapters():
    peft = pytest.importorskip("peft")
    model, batch = tiny("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj", "up_proj"], r=2))
    loss = output(wrapped, batch)
    done = invref.convert(wrapped)
    assert [site.taken for site in done.sites] == [True, True]
    assert torch.equal(output(wrapped, batch), loss)
    output(wrapped, batch).sum().backward()
    done.undo()
    assert type(model.layers[0].mlp.act_fn).__module__ == "transformers.activations"


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["before wrapping", "after wrapping"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_models_wrapped_for_several_processes(process_group, how, before):
    def wrapped(model: nn.Module) -> nn.Module:
        if how == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model)

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.PReLU(8), nn.Linear(8, 4))
    x = torch.randn(5, 4)
    expected = model(x).detach()
    if before:
        invref.convert(model)
    model = wrapped(model)
    if not before:
        done = invref.convert(model)
        assert [site.taken for site in done.sites] == [True, how == "ddp"]
        if how == "fsdp2":
            assert "split over processes" in done.sites[1].why
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.sum().backward()
    assert any(type(m) is invref.GELU for m in model.modules())
