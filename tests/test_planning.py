"""Plans: measured bytes, decisions with their reasons, and a model that nobody can tell was measured."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import invref
from invref import planning
from invref.errors import InputError
from invref.kernels import sidebits
from invref.planning import measured
from invref.storages import counting

ROWS, WIDTH = 512, 64
SIZE = ROWS * WIDTH * 4
"""Bytes of an activation."""
BITS = sidebits.size(ROWS * WIDTH)
"""Bytes of its side bits."""


def x() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def decisions(plan: invref.Plan) -> dict[str, str]:
    return {p.site.name: "taken" if p.taken else p.why for p in plan.sites}


# Decisions.


def test_a_site_between_two_linear_layers_is_taken_with_its_bytes():
    plan = invref.plan(nn.Sequential(linear(), nn.GELU(), linear()), x())
    (site,) = plan.sites
    assert (site.taken, site.before, site.after, site.saved) == (True, SIZE, BITS, SIZE - BITS)
    assert (plan.native, plan.planned, plan.forced) == (2 * SIZE, SIZE + BITS, SIZE + BITS)


class Call(nn.Module):
    """Submodules, and a forward that uses them."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.call = forward

    def forward(self, *args, **named):
        return self.call(self, *args, **named)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


REASONS = {
    "dropout": (
        lambda: nn.Sequential(linear(), nn.GELU(), nn.Dropout(0.1)),
        "nothing else keeps its output: a dropout follows, or a layer whose weight is frozen",
    ),
    "frozen consumer": (
        lambda: nn.Sequential(linear(), nn.GELU(), frozen(linear())),
        "nothing else keeps its output: a dropout follows, or a layer whose weight is frozen",
    ),
    "input kept by another": (
        lambda: Call(
            lambda m, x: m.last(m.act(h := m.first(x))) + m.other(h),
            first=linear(), act=nn.SiLU(), last=linear(), other=linear(),
        ),
        "its input stays: other keeps it too, or another part of its storage",
    ),
    "a part of its storage kept by another": (
        lambda: Call(
            lambda m, x: (lambda a, b: m.last(m.act(a)) * b)(*m.first(x).chunk(2, -1)),
            first=nn.Linear(WIDTH, 2 * WIDTH), act=nn.SiLU(), last=linear(),
        ),
        "its input stays: the model itself keeps it too, or another part of its storage",
    ),
    "never run": (
        lambda: Call(lambda m, x: m.first(x).exp(), first=linear(), act=nn.GELU()),
        "keeps nothing: it did not run, or nothing before it requires a gradient",
    ),
    "nothing before it learns": (
        lambda: Call(lambda m, x: m.last(m.act(x)), act=nn.GELU(), last=linear()),
        "keeps nothing: it did not run, or nothing before it requires a gradient",
    ),
    "keeps its output already": (
        lambda: nn.Sequential(linear(), nn.ReLU(), linear()),
        "torch keeps the output already: no gain, no harm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_a_site_that_gains_nothing_is_left_with_its_reason(name):
    make, why = REASONS[name]
    model = make()
    plan = invref.plan(model, x())
    assert list(decisions(plan).values()) == [why]
    assert plan.planned == plan.native
    assert not plan.convert()._swaps
    forced = plan.convert(force=True)
    # What was said to gain nothing gains nothing: forced, and measured once more.
    assert measured(model, x()).total == plan.forced >= plan.native
    forced.undo()


def test_sites_that_keep_one_input_are_decided_together():
    model = Call(
        lambda m, x: m.left(m.one(h := m.first(x))) + m.right(m.two(h)),
        first=linear(), one=nn.GELU(), two=nn.SiLU(), left=linear(), right=linear(),
    )  # fmt: skip
    plan = invref.plan(model, x())
    assert decisions(plan) == {"one": "taken", "two": "taken"}
    assert (plan.native, plan.planned) == (3 * SIZE, 2 * SIZE + 2 * BITS)
    plan.convert()
    assert measured(model, x()).total == plan.planned
    # Only one of them would let go of nothing.
    model = copy.deepcopy(model)
    model.right = nn.Dropout(0.5)
    plan = invref.plan(model, x())
    assert plan.planned <= plan.native


def test_a_module_used_twice_is_one_site():
    act = nn.GELU()
    plan = invref.plan(nn.Sequential(linear(), act, linear(), act, linear()), x())
    (site,) = plan.sites
    assert (site.before, site.after, site.taken) == (2 * SIZE, 2 * BITS, True)


ACTS = [nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Softplus, nn.Hardswish]
STEPS = st.one_of(
    st.sampled_from([("act", kind) for kind in ACTS]),
    st.sampled_from(
        [("linear",), ("frozen",), ("dropout",), ("norm",), ("exp",), ("double",), ("chunk",), ("branch",)]
    ),
)


class Random(nn.Module):
    """Steps of any kinds, some with a second use of what they are given."""

    def __init__(self, steps):
        super().__init__()
        made = {"linear": linear, "frozen": lambda: frozen(linear()), "dropout": lambda: nn.Dropout(0.3),
                "norm": lambda: nn.LayerNorm(WIDTH)}  # fmt: skip
        self.kinds = [step[0] for step in steps]
        self.parts = nn.ModuleList(
            step[1]() if step[0] == "act" else made.get(step[0], nn.Identity)() for step in steps
        )

    def forward(self, x):
        branch = x
        for kind, part in zip(self.kinds, self.parts, strict=True):
            if kind == "exp":
                x = x.clamp(max=2).exp()
            elif kind == "double":
                x = x * branch
            elif kind == "chunk":
                x = torch.cat([x.chunk(2, -1)[0].sin(), x.chunk(2, -1)[1]], -1)
            elif kind == "branch":
                branch = x
            else:
                x = part(x)
        return x


@settings(deadline=None, max_examples=30)
@given(st.lists(STEPS, min_size=1, max_size=9))
def test_a_plan_never_keeps_more_than_native_and_says_what_is_measured(steps):
    model = nn.Sequential(linear(), Random(steps))
    batch = torch.randn(128, WIDTH)
    plan = invref.plan(model, batch)
    assert plan.planned <= plan.native
    assert plan.native == measured(model, batch).total
    done = plan.convert()
    assert measured(model, batch).total == plan.planned
    assert {site.name for site in done.sites if site.taken} == set(plan.names)


# The model is as it was.


class Disturbing(nn.Module):
    """A forward that changes whatever a forward may."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.act = nn.GELU()
        self.last = linear()
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("changed", torch.zeros(3))
        self.register_buffer("nothing", None)
        self.fail = False

    def forward(self, x):
        self.replaced = torch.rand(3) + random.random() + float(np.random.rand())  # noqa: NPY002
        self.changed += 1
        self.nothing = torch.ones(1)
        y = self.last(self.act(self.norm(x)))
        if self.fail:
            raise ValueError("the forward failed")
        return y


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_nothing_of_the_model_or_of_random_numbers_changes(mode, fail):
    model = Disturbing()
    model(x()).sum().backward()
    model.train(mode != "eval")
    if mode == "mixed":
        model.norm.eval()
    model.fail = fail
    calls = []
    model.act.register_forward_hook(lambda *_: calls.append(1))
    before = {
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "state": {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        "grads": {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()},
    }
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    if fail:
        with pytest.raises(ValueError, match="the forward failed"):
            invref.plan(model, x())
    else:
        seen = []
        model.register_forward_pre_hook(lambda m, _: seen.append([s.training for s in m.modules()]))
        assert invref.plan(model, torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))).sites
        # All in evaluation mode is measured as in training; else each module in its mode.
        expected = [True] * 4 if mode != "mixed" else [True, False, True, True]
        assert set(map(tuple, seen)) == {tuple(expected)}
    assert [(name, id(m), type(m), m.training) for name, m in model.named_modules()] == before["modules"]
    assert [(name, id(b)) for name, b in model.named_buffers()] == [(n, i) for n, i, _ in before["buffers"]]
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before["state"][name][0]
        assert torch.equal(tensor, before["state"][name][1]), name
    for name, p in model.named_parameters():
        assert id(p.grad) == before["grads"][name][0]
        assert torch.equal(p.grad, before["grads"][name][1])
    # The example is not drawn from the default generator where that is compared.
    if not fail:
        assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])  # noqa: NPY002


def test_a_graph_made_before_can_still_run_backward():
    model = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.GELU(), linear())
    model[1].eval()
    loss = model(x()).sum()
    invref.plan(model, x())
    loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_without_gradients_do_not_hide_what_training_keeps(context):
    model = nn.Sequential(linear(), nn.GELU(), linear())
    batch = x()
    with context():
        plan = invref.plan(model, batch)
    assert plan.native == 2 * SIZE


def test_autocast_counts_in_its_format():
    model = nn.Sequential(linear(), nn.GELU(), linear())
    with torch.autocast("cpu", torch.bfloat16):
        plan = invref.plan(model, x())
    (site,) = plan.sites
    assert (site.before, site.after) == (SIZE // 2, BITS)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_examples_in_each_form(form):
    model = Call(lambda m, x, y=None: m.last(m.act(m.first(x))), first=linear(), act=nn.GELU(), last=linear())
    batch = x()
    examples = {"tensor": batch, "tuple": (batch,), "list": [batch, 3], "dict": {"x": batch, "y": None}}
    assert invref.plan(model, examples[form]).native == 2 * SIZE


def test_a_model_without_numbers_is_planned_before_it_is_made():
    with torch.device("meta"):
        model = nn.Sequential(linear(), nn.GELU(), linear())
        plan = invref.plan(model, x())
    assert (plan.native, plan.planned) == (2 * SIZE, SIZE + BITS)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.GELU()), "0.weight has no size yet"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.GELU()), "has no size yet"),
        (lambda: frozen(nn.Sequential(linear(), nn.GELU())), "model.requires_grad_(True)"),
        (lambda: lambda x: x, "not function: give it the model itself"),
    ],
)
def test_models_that_cannot_be_planned_say_why_in_a_line(model, words):
    with pytest.raises(InputError) as raised:
        invref.plan(model(), x())
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_each_module_is_tried_once(monkeypatch):
    from invref import recognize

    tried = []
    honest = recognize.differs
    monkeypatch.setattr(recognize, "differs", lambda *a: tried.append(1) or honest(*a))
    invref.plan(nn.Sequential(linear(), nn.GELU(), linear(), nn.SiLU(), nn.Dropout()), x())
    assert len(tried) == 2


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Tanh(), nn.Softmax(-1), invref.GELU(), nn.ReLU()])
def test_counting_frees_graphs_of_operations_that_keep_their_output(act):
    model = nn.Sequential(linear(), act, linear())
    outputs: list[weakref.ref[torch.Tensor]] = []
    act.register_forward_hook(lambda _module, _inputs, y: outputs.append(weakref.ref(y)))
    gc.disable()
    try:
        with counting(model):
            model(x())
        # Without a garbage collection: nothing keeps itself alive.
        assert [output() for output in outputs] == [None]
    finally:
        gc.enable()


def test_what_would_keep_more_together_is_not_converted(monkeypatch):
    # Whatever the decisions rest on, what counts is what is measured in the end.
    monkeypatch.setattr(planning, "_gaining", lambda able, native, forced: frozenset(able))
    model = nn.Sequential(linear(), nn.GELU(), nn.Dropout(0.1))
    plan = invref.plan(model, x())
    assert plan.forced > plan.native == plan.planned
    assert plan.names == ()
    assert type(model[1]) is nn.GELU
