"""`invref-verify memory`: real models, and what converting them must save."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import invref
from invref.planning import measured
from verify import cli, memory_measure, memory_models, memory_table
from verify.memory_measure import NATIVE, OURS, PEERS, PLANNED, Case, Result
from verify.memory_models import FAMILIES, Sizes

# torch.compile's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

CPU = torch.device("cpu")
REPORTS = Path(__file__).parents[1] / "reports"
TINY = ["--batch", "2", "--seq", "16", "--hidden", "32", "--layers", "1", "--seconds", "0"]

REFERENCES = {
    ("bert", torch.float32): 0.21, ("gpt2", torch.float32): 0.40, ("gpt2", torch.bfloat16): 0.31,
    ("llama", torch.float32): 0.13, ("llama", torch.bfloat16): 0.11, ("mistral", torch.float32): 0.13,
    ("mistral", torch.bfloat16): 0.11, ("vit", torch.float32): 0.22, ("clip", torch.float32): 0.37,
}  # fmt: skip
"""Measured for the activations alone, without dropout, before these layers were: two layers of width 256, 4 x 128."""


@pytest.mark.parametrize(("name", "dtype"), REFERENCES, ids=str)
def test_at_least_as_much_is_saved_as_was_measured_for_the_activations_alone(name, dtype):
    model, example = memory_models.built(name, Sizes(dropout=False), dtype, CPU)
    plan = invref.plan(model, example)
    assert 1 - plan.planned / plan.native >= REFERENCES[name, dtype]
    plan.convert()
    assert measured(model, example).total == plan.planned


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_model_is_built_runs_and_never_keeps_more(name, dropout):
    sizes = Sizes(batch=2, length=16, hidden=32, layers=1, dropout=dropout)
    model, example = memory_models.built(name, sizes, torch.float32, CPU)
    assert model.training
    active = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert not active or dropout
    plan = invref.plan(model, example)
    assert plan.sites
    assert plan.planned <= plan.native
    if name == "modernbert":
        # Its gate and its value are halves of one storage, which the product keeps.
        assert plan.planned == plan.native
        assert all("its input stays" in site.why for site in plan.sites)
    else:
        assert plan.planned < plan.native
    again, _ = memory_models.built(name, sizes, torch.float32, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_contestants_compute_the_same_gradients_and_their_bytes_are_those_of_a_count():
    sizes = Sizes(batch=2, length=16, hidden=32, layers=2, dropout=False)
    model, example = memory_models.built("bert", sizes, torch.float32, CPU)
    case = Case(model, example, invref.plan(model, example))
    gradients = {}
    for name in OURS + PEERS:
        around, call = memory_measure.contestant(name, case)
        with around():
            output = call(**example)
        output.last_hidden_state.square().mean().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.encoder.parameters()])
        model.zero_grad(set_to_none=True)
    native = gradients.pop(NATIVE)
    for name, gradient in gradients.items():
        # Each of two activations is off by 1.05e-4 |dy| at most (reports/gradient.json), of |dx| by twice that: f' is
        # about 1/2 at these small inputs. Others round in the 24th bit, which is far less.
        assert torch.linalg.norm(gradient - native) <= 4 * 1.05e-4 * torch.linalg.norm(native), name
    lines = {line.name: line for line in memory_measure.measure(case, OURS + PEERS, 0, CPU)}
    assert [line.note for line in lines.values()] == [""] * len(lines)
    assert lines[NATIVE].kept == case.plan.native
    assert lines[PLANNED].kept == case.plan.planned < case.plan.native
    assert all(lines[name].kept < case.plan.native for name in PEERS[:2])


def test_a_contestant_that_fails_has_a_line_that_says_why():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5))
    case = Case(model, torch.randn(4, 8), invref.plan(model, torch.randn(4, 8)))
    lines = {line.name: line for line in memory_measure.measure(case, OURS + PEERS[:2], 0, CPU)}
    assert all(lines[name].kept is not None for name in OURS)
    assert lines[NATIVE].kept == case.plan.native > 0
    assert "no activation goes straight into a linear layer" in lines[PEERS[0]].note


# The command.


def test_the_command_writes_what_it_says(tmp_path, capsys):
    data, page = tmp_path / "memory.json", tmp_path / "memory.md"
    arguments = ["memory", "--model", "bert", "modernbert", *TINY, "--dtype", "float32", "bfloat16", "--no-dropout"]
    assert cli.main([*arguments, "--json", str(data), "--markdown", str(page)]) == cli.PASSED
    written = json.loads(data.read_text())
    results = [Result.from_json(r) for r in written["results"]]
    assert [(r.model, r.dtype) for r in results] == [
        (model, dtype) for model in ("bert", "modernbert") for dtype in ("float32", "bfloat16")
    ]
    out = capsys.readouterr().out
    for result in results:
        assert memory_table.said(result) in out
        assert f"## {result.model}, {result.dtype}, without dropout" in page.read_text()
    assert written["run"]["torch"] == torch.__version__
    told = (
        "memory --model bert modernbert --dtype float32 bfloat16 --no-dropout --batch 2 --seq 16 --hidden 32 --layers 1"
    )
    assert f"`invref-verify {told} --seconds 0`" in page.read_text()
    assert "2 of 2 activations converted" not in out.partition("modernbert, float32:")[2]


def test_a_configuration_from_a_file_is_used(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hidden_act": "silu", "architectures": ["BertModel"], "hidden_dropout_prob": 0.0}))
    assert cli.main(["memory", "--model", "bert", *TINY, "--config", str(config)]) == cli.PASSED
    assert "silu" in capsys.readouterr().out


FACTORY = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(8, 32), nn.Mish(), nn.Linear(32, 8)), torch.randn(64, 8)

def wrong():
    return 3

def worse():
    raise RuntimeError("no weights here")

def unfit():
    return nn.Linear(8, 8), torch.randn(64, 7)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "models_of_mine.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("models_of_mine", None)


def test_a_factory_gives_any_other_model(factory, capsys):
    assert cli.main(["memory", "--model", "models_of_mine:build", "--seconds", "0"]) == cli.PASSED
    assert "1 of 1 activations converted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "elmo"], "unknown model 'elmo': use bert,"),
        (["--model", "models_of_mine:nothing"], "cannot find models_of_mine:nothing"),
        (["--model", "no_such_module:build"], "cannot find no_such_module:build"),
        (["--model", "models_of_mine:wrong"], "return model, example"),
        (["--model", "models_of_mine:worse"], "no weights here"),
        (["--model", "models_of_mine:unfit"], "models_of_mine:unfit raised RuntimeError on its example: mat1"),
        (["--model", ":build"], "cannot find :build"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--batch", "0"], "--batch 0"),
        (["--seq", "-3"], "--seq -3"),
        (["--model", "bert", "--hidden", "30"], "use a multiple of 4"),
        (["--seconds", "nan"], "ask for 0 to 3600"),
        (["--config", "nowhere.json"], "--config belongs to one model"),
        (["--model", "bert", "--config", "nowhere.json"], "cannot read the configuration nowhere.json"),
        (["--device", "tpu"], "tpu"),
        (["--json", "/no/such/folder/x.json"], "cannot write"),
        (["--markdown", "/no/such/folder/x.md"], "cannot write"),
    ],
)
def test_bad_arguments_are_one_line(factory, arguments, words, capsys):
    assert cli.main(["memory", *arguments]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_model_that_keeps_more_when_converted_exits_1(factory, monkeypatch, capsys):
    class Worse(invref.Plan):
        def to_json(self):
            return {**super().to_json(), "planned": self.native + 1}

    honest = invref.plan
    monkeypatch.setattr(invref, "plan", lambda *a: Worse(**vars(honest(*a))), raising=False)
    assert cli.main(["memory", "--model", "models_of_mine:build", "--seconds", "0"]) == cli.VIOLATED


@pytest.mark.parametrize("name", ["memory", "memory-bfloat16", "memory-dropout"])
def test_a_committed_page_is_that_of_its_results_and_none_keeps_more(name):
    data = json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))
    page = (REPORTS / f"{name}.md").read_text(encoding="utf-8")
    results = [Result.from_json(result) for result in data["results"]]
    assert {result.model for result in results} == FAMILIES.keys()
    (command,) = re.findall("Made by `(.*)` with", page)
    assert page == memory_table.markdown(results, command, data["run"])
    assert all(result.plan["planned"] <= result.plan["native"] for result in results)
