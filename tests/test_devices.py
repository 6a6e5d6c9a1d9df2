"""The verifier on another device, with the processor standing in for it where there is no GPU."""

from dataclasses import replace

import pytest
import torch

from invref.errors import InputError
from verify import cli, devices, moving, sweep, targets

CPU = torch.device("cpu")


class Spy:
    """Counts what is sent there and back; as many as inputs went, outputs and gradients must come."""

    def __init__(self, layer):
        self.layer, self.inputs = layer, 0

    def __call__(self, x):
        self.inputs += x.numel()
        return self.layer(x)


def test_a_device_that_is_not_there_is_bad_input_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gradient", "gelu", "--device", "cuda"]) == cli.BAD_INPUT
    assert capsys.readouterr().err.endswith("finds no GPU here, so there is no cuda: use --device cpu\n")


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x", "", "meta"])
def test_a_device_that_the_verifier_does_not_know_is_bad_input(name):
    with pytest.raises(InputError, match="use cpu, cuda or cuda:N"):
        devices.named(name)


def test_a_device_number_beyond_those_there_are_is_bad_input(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.named("cuda") == torch.device("cuda", 0)
    assert devices.named("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="finds 2 GPUs here, so there is no cuda:2"):
        devices.named("cuda:2")


def test_on_the_processor_a_target_stays_as_it_is():
    target = targets.TARGETS["gelu"]
    assert moving.moved(target, devices.named("cpu")) is target


def test_a_target_on_a_device_says_so_in_all_that_is_kept_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    moved = moving.moved(targets.TARGETS["gelu"], torch.device("cuda", 1))
    assert moved.device == "cuda"
    assert moved.options == "gelu --device cuda"
    assert moved.forward == f"torch {torch.__version__} gelu, Card 1"


def test_what_goes_to_a_device_is_verified_as_what_stays(monkeypatch):
    # With the processor as the other device every wrapper runs, and the record must be that of a run without them.
    target = targets.TARGETS["gelu"]
    spy = Spy(target.layer)
    there = moving.wrapped(replace(target, layer=spy), CPU)
    moved = sweep.run(there, "bfloat16").to_json()
    plain = sweep.run(target, "bfloat16").to_json()
    assert spy.inputs >= 2 * plain["inputs"]
    differing = {"seconds", "forward", "reproduce"}
    assert {k: v for k, v in moved.items() if k not in differing} == {
        k: v for k, v in plain.items() if k not in differing
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", targets.TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_layer_holds_its_bounds_on_a_gpu(name, dtype):
    record = sweep.run(moving.moved(targets.TARGETS[name], devices.named("cuda")), dtype)
    assert record.passed, record.failures
