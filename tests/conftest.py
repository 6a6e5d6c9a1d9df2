"""What tests of several modules share: a float32 that is small enough to be run whole, and the committed results."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from verify import document, shards

REPORTS = Path(__file__).parents[1] / "reports"


def near_turning_point(part, size):
    """The part of the piece's range next to the turning point that holds `size` inputs."""
    return replace(part, first=part.stop - size) if part.piece.index == 0 else replace(part, stop=part.first + size)


@pytest.fixture
def small(monkeypatch):
    """A float32 with few inputs: the plan holds four small shards next to the turning point."""
    shrink(monkeypatch)


def shrink(monkeypatch):
    """Makes float32 small, as in `small`, as long as the patch holds."""

    def plan(oracle):
        parts = [near_turning_point(part, 1 << 15) for part in oracle.ranges]
        starts = [(part, first) for part in parts for first in (part.first, part.first + (1 << 14))]
        return [shards.Shard(i, part, first, first + (1 << 14)) for i, (part, first) in enumerate(starts)]

    monkeypatch.setattr(shards, "plan", plan)
    # Whoever edits the packages while their tests run must not make these fail.
    monkeypatch.setattr(shards, "sources", lambda target: [Path(__file__)])


@cache
def records():
    """The committed results of the layers here, by (activation, dtype): those of torch's kernels for this processor.

    With its kernels for AVX2 torch's float32 GELU is off by up to 7.4 units in the last place around its turning point,
    and the floor is 1.68e-4 in place of 1.04e-4.
    """
    widest = torch.backends.cpu.get_cpu_capability() == "AVX512"
    files = ["gradient.json", *([] if widest else ["avx2/gradient.json"])]
    found = [record for file in files for record in document.read(REPORTS / file)]
    return {(record.activation, record.dtype): record for record in found if record.device == "cpu"}
