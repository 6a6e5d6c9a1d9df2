"""The GPU kernels held to the readable decoder without a GPU: Triton's interpreter runs them operation by operation."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from invref.kernels import gpu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SIXTEEN = ("bfloat16", "float16")
PATTERNS = 1 << 16


def run(name: str, case: str, formats: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """One case in a process whose kernels are interpreted: per format what was compared and what differs."""
    script = Path(__file__).with_name("gpu_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, script, name, case, *formats], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", gpu.OWN)
def test_every_sixteen_bit_output_with_either_side_bit_decodes_to_the_bits_of_the_readable_decoder(name: str) -> None:
    found = run(name, "codes", SIXTEEN)
    assert found == {fmt: {"compared": 2 * PATTERNS, "differing": 0} for fmt in SIXTEEN}


@pytest.mark.parametrize("name", gpu.OWN)
def test_every_sixteen_bit_input_gets_its_side_bit_in_both_kernels(name: str) -> None:
    found = run(name, "inputs", SIXTEEN)
    assert found == {fmt: {"compared": PATTERNS, "differing": 0, "far": 0} for fmt in SIXTEEN}


@pytest.mark.parametrize("name", gpu.OWN)
def test_float32_around_all_landmarks_and_in_a_sample(name: str) -> None:
    (found,) = run(name, "float32", ("float32",)).values()
    assert found["compared"] > 40_000
    assert found["differing"] == 0
    (found,) = run(name, "inputs", ("float32",)).values()
    assert found["compared"] > 20_000
    assert (found["differing"], found["far"]) == (0, 0)


def test_lengths_around_those_of_blocks_at_any_alignment() -> None:
    for fmt, found in run("gelu", "lengths", (*SIXTEEN, "float32")).items():
        assert found["compared"] > 29_000, fmt
        assert found["differing"] == 0, fmt


def test_outputs_next_to_the_turning_value_decode_to_what_is_given_for_them() -> None:
    (found,) = run("mish", "lowest", ("float32",)).values()
    assert found["compared"] > 40_000
    assert found["differing"] == 0


def test_every_sixteen_bit_output_is_looked_up_with_either_side_code_and_without() -> None:
    found = run("silu", "table", SIXTEEN)
    assert found == {fmt: {"compared": 4 * PATTERNS, "differing": 0} for fmt in SIXTEEN}
