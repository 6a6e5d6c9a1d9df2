"""Models on two processes, started by torchrun as users start them: the programs are in `tests/distributed`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

PROGRAMS = Path(__file__).parent / "distributed"
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo: nothing can be started"
)


WRAPPED = ("ddp", "accumulation", "fsdp", "fsdp_mixed", "checkpointing")
SPLIT = ("tensors", "sequence", "pipeline")


@cache
def run(program: str, *arguments: str) -> dict[str, Any]:
    """What the program tells, by argument, after two processes of it have ended well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(PROGRAMS / program), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_layers_on_dtensors_compute_each_part_and_place_it_as_the_input():
    # 26 layers that are ours and have no parameters, a formula, five shapes and one of bfloat16, eleven placements.
    assert run("placements.py")["cases"] == 27 * (5 + 1) * 11


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_models_have_the_gradients_of_one_process_bit_for_bit(how):
    pytest.importorskip("transformers")
    saved = run("wrapped.py", *WRAPPED)[how]
    # Two layers' activations of 2 x 16 x 64 numbers, less a bit for each and a block for each site.
    itemsize = {"ddp": 4, "fsdp": 4, "fsdp_mixed": 2}.get(how)
    if itemsize:
        elements = 2 * 2 * 16 * 64
        assert min(saved.values()) >= elements * itemsize - elements // 8 - 2 * 64


@pytest.mark.parametrize("how", SPLIT)
def test_split_models_have_the_gradients_of_one_process(how):
    pytest.importorskip("transformers")
    assert run("parallel.py", *SPLIT)[how]
