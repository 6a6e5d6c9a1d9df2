"""Shards of the float32 inputs, and where the results of finished ones are kept.

Guarantees that the shards cover every finite input once, each inside one monotone piece; that a result on disk is
whole or absent; and that results are only reused by the same code on the same formula, target and framework: of layers
that were not written here nothing is kept, since their sources are not known.
Must not know what a result says.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

import invref
from invref.errors import InputError
from verify.oracle import Oracle, Range
from verify.scan import BLOCK, Tally
from verify.targets import Target

SIZE = 1 << 24
NOTE = "run.json"
"""In a folder of results: what they are of, for whoever puts them together elsewhere."""


@dataclass(frozen=True)
class Shard:
    """The float32 ordinals first ≤ o < stop, all on one monotone piece."""

    index: int
    part: Range
    first: int
    stop: int


@dataclass
class Result:
    """What a shard gave: its tally, and the hulls of its blocks of `BLOCK` inputs (the last may be shorter)."""

    tally: Tally
    hull_y: NDArray[np.int32]
    hull_slope: NDArray[np.float64]


def plan(oracle: Oracle, size: int = SIZE) -> list[Shard]:
    """All finite float32 inputs, from the left, in shards of at most `size` inputs; `BLOCK` must divide `size`."""
    starts = [(part, first) for part in oracle.ranges for first in range(part.first, part.stop, size)]
    return [Shard(i, part, first, min(first + size, part.stop)) for i, (part, first) in enumerate(starts)]


def part_of(shards: list[Shard], part: tuple[int, int]) -> list[Shard]:
    """Part I of N (from 1): every N-th shard, so that parts take about equally long. InputError for too many parts."""
    index, count = part
    if count > len(shards):
        raise InputError(f"cannot split into {count} parts: ask for {len(shards)} or fewer")
    return shards[index - 1 :: count]


class Store:
    """Results in a folder, one file a shard; with no folder nothing is kept."""

    def __init__(self, folder: Path | None, target: Target) -> None:
        self.folder = folder / folder_name(target) if folder and not target.foreign else None
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            note = json.dumps(made_by(target), indent=1) + "\n"
            if not _is(self.folder / NOTE, note):
                self._write(self.folder / NOTE, lambda file: file.write(note.encode()))

    def load(self, shard: Shard) -> Result | None:
        """The shard's result, None if it is not there (or not readable, after a crash of the disk)."""
        path = self.path(shard)
        if path is None or not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file) as data:
                tally = Tally(**{f.name: data[f.name] for f in fields(Tally)})
                tally.inputs = int(tally.inputs)
                result = Result(tally, data["hull_y"], data["hull_slope"])
                blocks = -(-(shard.stop - shard.first) // BLOCK)
                whole = tally.inputs == shard.stop - shard.first
                return result if whole and result.hull_y.shape == result.hull_slope.shape == (blocks, 2) else None
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            return None

    def save(self, shard: Shard, result: Result) -> None:
        """Keep the result; a reader sees all of it or nothing."""
        path = self.path(shard)
        if path is not None:
            arrays = {**vars(result.tally), "hull_y": result.hull_y, "hull_slope": result.hull_slope}
            self._write(path, lambda file: np.savez(file, **arrays))

    @staticmethod
    def _write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
                content(file)
            Path(file.name).replace(path)
        except OSError:
            # A full disk, or another run that has cleared the folder: the verdict does not depend on what is kept.
            return

    def clear(self) -> None:
        """Forget this target's results: the next run measures afresh."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, shard: Shard) -> Path | None:
        """Where the shard's result is, or will be."""
        return self.folder / f"shard-{shard.index:04d}.npz" if self.folder else None


def sources(target: Target) -> list[Path]:
    """The files whose content decides a result: both packages, the tables, and where the layer is written."""
    ours = Path(inspect.getfile(invref)).parent
    files = {*ours.rglob("*.py"), *ours.rglob("*.json"), *Path(__file__).parent.glob("*.py")}
    if inspect.isfunction(target.layer):
        files.add(Path(inspect.getfile(target.layer)))
    return sorted(files)


def folder_name(target: Target) -> str:
    """Of a target's float32 results: those of other code, another framework or processor have another one."""
    return f"{target.name}-float32-{fingerprint(target)}"


def made_by(target: Target) -> dict[str, str]:
    """What a folder says of its results: the words of the command line for the target, and what it ran on."""
    return {"request": target.options or target.name, "torch": torch.__version__, "forward": target.forward}


def fingerprint(target: Target) -> str:
    """A hash of all that a result depends on: sources and tables, framework and processor, formula and target."""
    digest = hashlib.sha256()
    for path in sources(target):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    meant = (target.formula, target.gradient, target.codes, target.role)
    for text in (repr(meant), target.label, target.forward, torch.__version__, str(SIZE), str(BLOCK)):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _is(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False
