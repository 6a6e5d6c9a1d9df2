"""The programs of docs/training.md, each run as a user runs it, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "training.md"
CODE = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
PROGRAMS = {re.match(r"# (\S+\.py): ", code)[1]: code for code in CODE}


def run(folder: Path, name: str, *launcher: str) -> str:
    (folder / name).write_text(PROGRAMS[name], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *launcher, name], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_every_program_is_run_here():
    assert set(PROGRAMS) == {"trainer.py", "fsdp.py", "loop.py"}


def test_fine_tuning_with_the_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    told = run(tmp_path, "trainer.py")
    assert "2 of 2 run backward from their output" in told
    losses = numbers(r"'loss': '?([\d.]+)", told)
    # Characters drawn evenly cost ln 256 = 5.5 each.
    assert len(losses) == 3
    assert losses[-1] < losses[0] < 5.5
    # What was saved is read without invref's classes, and computes what it did.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(model.transformer.h[0].mlp.act).__module__ == "transformers.activations"


def test_a_plain_loop_with_fsdp2(tmp_path):
    told = run(tmp_path, "fsdp.py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "2 of 2 run backward from their output" in told
    losses = numbers(r"loss ([\d.]+)", told)
    assert len(losses) == 3
    assert losses[-1] < losses[0] < 5.5


def test_an_accelerate_loop(tmp_path):
    pytest.importorskip("accelerate")
    told = run(tmp_path, "loop.py")
    assert "2 of 2 run backward from their output" in told
    rights = numbers(r"([\d.]+)% right", told)
    # One in ten is right by chance.
    assert len(rights) == 4
    assert rights[-1] > max(rights[0], 50)
