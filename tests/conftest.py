"""What tests of several modules share: a float32 that is small enough to be run whole."""

from dataclasses import replace
from pathlib import Path

import pytest

from verify import shards


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
