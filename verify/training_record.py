"""What a training run was asked for and what came of it, seed by seed: the data that verdicts, page and picture share.

Guarantees that a file on disk is whole after every seed, that a run goes on only from results of the same settings, and
that numbers that are not finite survive as text. Must not know models, nor statistics.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from invref.errors import InputError
from verify import document

DIGITS = 9
"""Significant digits kept of a number: as many as bring every float32 back."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run but its number of seeds; a seed's results are the same under the same settings."""

    model: str
    dtype: str
    steps: int
    device: str
    arms: tuple[str, ...]
    parameters: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Step:
    """One step's gradient beside native's on the same weights and batch.

    difference: of the whole gradient, relative to native's norm; worst: of one parameter, relative to its own; name:
    which; cosine: between the two, less 1.
    """

    difference: float
    worst: float
    name: str
    cosine: float


@dataclass(frozen=True)
class Run:
    """One arm from one seed.

    first, last: a step's gradient at native's first and last weights; losses: of each step; distances: of the
    parameters to native's at the marks, relative to native's norm; loss, accuracy: on the validation data at the end.
    """

    arm: str
    first: Step
    last: Step
    losses: tuple[float, ...]
    distances: tuple[float, ...]
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Seed:
    """All arms from one seed.

    marks: the steps after which parameters were compared; precision: native's gradient under bfloat16 beside float32;
    batches: native's gradients of two batches beside each other; both as a step's difference, at the first weights.
    """

    seed: int
    marks: tuple[int, ...]
    precision: float
    batches: float
    seconds: float
    runs: tuple[Run, ...]

    def run(self, arm: str) -> Run:
        """An arm's run."""
        return next(run for run in self.runs if run.arm == arm)


@dataclass(frozen=True)
class Record:
    """A file's content. run: versions, machine and date; findings: as JSON values, None until the last seed is done."""

    settings: Settings
    seeds: tuple[Seed, ...]
    findings: dict[str, Any] | None
    run: dict[str, Any]


def content(settings: Settings, seeds: list[Seed]) -> dict[str, Any]:
    """Settings and results as JSON values."""
    return {"settings": asdict(settings), "seeds": [_plain(asdict(seed)) for seed in seeds]}


def write(path: Path, settings: Settings, seeds: list[Seed], findings: dict[str, Any] | None, seconds: float) -> None:
    """Writes the file in one step; findings are None until the last seed is done."""
    body = {"run": document.environment(seconds), "findings": findings, **content(settings, seeds)}
    document.write_text(path, json.dumps(body, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path) -> Record:
    """What `write` wrote; InputError where the file is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**{**found["settings"], "arms": tuple(found["settings"]["arms"])})
        return Record(settings, tuple(map(_seed, found["seeds"])), found["findings"], found["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a training record ({error}): remove it, or name another folder") from error


def resumed(path: Path, settings: Settings) -> list[Seed]:
    """The seeds done before under the same settings; InputError where the settings differ."""
    if not path.exists():
        return []
    before = read(path)
    ours, theirs = asdict(settings), asdict(before.settings)
    if wrong := [name for name in ours if ours[name] != theirs[name]]:
        name = wrong[0]
        raise InputError(f"{path} has {name} {theirs[name]}, not {ours[name]}: ask for the same, or leave out --resume")
    return list(before.seeds)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _seed(found: dict[str, Any]) -> Seed:
    runs = tuple(
        Run(
            arm=run["arm"], first=_step(run["first"]), last=_step(run["last"]),
            losses=tuple(map(float, run["losses"])), distances=tuple(map(float, run["distances"])),
            loss=float(run["loss"]), accuracy=float(run["accuracy"]),
        )
        for run in found["runs"]
    )  # fmt: skip
    return Seed(found["seed"], tuple(found["marks"]), float(found["precision"]), float(found["batches"]),
                float(found["seconds"]), runs)  # fmt: skip


def _step(found: dict[str, Any]) -> Step:
    return Step(float(found["difference"]), float(found["worst"]), found["name"], float(found["cosine"]))
