"""Verdicts on a training run, from its record alone: each arm at three levels, the controls, and the whole.

Guarantees that a control that no level tells apart makes the run worthless, whatever else was found, and that native's
outcomes alone fix the margins. Must not know how anything was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from verify import training_stats as stats
from verify.training_record import Run, Seed
from verify.training_stats import Margin, Test, Verdict

NATIVE, INVERTED, TWIN = "native", "inverted", "twin"
Level = Literal["one step", "trajectory", "outcome"]
LEVELS: tuple[Level, ...] = ("one step", "trajectory", "outcome")
WORTHLESS = "worthless"
FEWEST = 2
"""Seeds without which nothing has a spread."""


@dataclass(frozen=True)
class Line:
    """One quantity of one arm: at which level, what, and what the test of it says."""

    arm: str
    level: Level
    quantity: str
    test: Test


@dataclass(frozen=True)
class Findings:
    """All lines, the margins of the outcomes, and the controls that nothing told apart."""

    lines: tuple[Line, ...]
    margins: dict[str, Margin]
    controls: tuple[str, ...]

    def verdict(self, arm: str, level: Level) -> Verdict:
        """The worst of the arm's at a level: one difference makes a difference, one doubt a doubt."""
        found = {line.test.verdict for line in self.lines if (line.arm, line.level) == (arm, level)}
        return next(word for word in ("different", "undecided", "equivalent") if word in found)

    def told_apart(self, control: str) -> list[Level]:
        """The levels at which a control was found different."""
        return [level for level in LEVELS if self.verdict(control, level) == "different"]

    @property
    def escaped(self) -> list[str]:
        """The controls that no level told apart."""
        return [control for control in self.controls if not self.told_apart(control)]

    @property
    def sensed(self) -> list[str]:
        """The controls that the outcome told apart: where none is, the outcome alone says only what its margin does."""
        return [control for control in self.controls if "outcome" in self.told_apart(control)]

    @property
    def whole(self) -> str:
        """The inverted arm's verdict on the outcome; WORTHLESS where there is no control or one escaped."""
        return WORTHLESS if self.escaped or not self.controls else self.verdict(INVERTED, "outcome")

    def needed(self, arm: str) -> int | None:
        """Seeds that would decide the outcome, as far as these seeds tell; None where no number was found."""
        open_ = [line.test.needed for line in self.lines
                 if line.arm == arm and line.level == "outcome" and line.test.verdict == "undecided"]  # fmt: skip
        known = [n for n in open_ if n is not None]
        return max(known) if known and len(known) == len(open_) else None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "verdict": self.whole,
            "escaped": self.escaped,
            "told_apart": {control: self.told_apart(control) for control in self.controls},
            "margins": {name: m.to_json() for name, m in self.margins.items()},
            "lines": [
                {"arm": line.arm, "level": line.level, "quantity": line.quantity, **line.test.to_json()}
                for line in self.lines
            ],
        }


def findings(seeds: Sequence[Seed]) -> Findings:
    """The verdicts on at least FEWEST seeds that have the arms native, inverted, twin and any controls."""
    native = [seed.run(NATIVE) for seed in seeds]
    margins = {
        "loss": stats.margin([run.loss for run in native]),
        "accuracy": stats.margin([run.accuracy for run in native]),
    }
    names = [run.arm for run in seeds[0].runs if run.arm != NATIVE]
    lines = [line for arm in names for line in _lines(arm, seeds, margins)]
    return Findings(tuple(lines), margins, tuple(name for name in names if name not in (INVERTED, TWIN)))


def _lines(arm: str, seeds: Sequence[Seed], margins: dict[str, Margin]) -> list[Line]:
    runs, natives = [seed.run(arm) for seed in seeds], [seed.run(NATIVE) for seed in seeds]
    losses = [a.loss - b.loss for a, b in zip(runs, natives, strict=True)]
    rights = [a.accuracy - b.accuracy for a, b in zip(runs, natives, strict=True)]
    found = [
        Line(arm, "outcome", "validation loss", stats.paired(losses, margins["loss"].value)),
        Line(arm, "outcome", "accuracy", stats.paired(rights, margins["accuracy"].value)),
    ]
    if arm == TWIN:  # which is the measure of the other two levels
        return found
    twins = [seed.run(TWIN) for seed in seeds]
    apart = [_apart(a, b) for a, b in zip(runs, natives, strict=True)]
    twins_apart = [_apart(a, b) for a, b in zip(twins, natives, strict=True)]
    ratio = stats.ratio
    return [
        Line(arm, "one step", "gradient, first weights",
             ratio([r.first.difference for r in runs], [r.first.difference for r in twins])),
        Line(arm, "one step", "gradient, last weights",
             ratio([r.last.difference for r in runs], [r.last.difference for r in twins])),
        Line(arm, "trajectory", "loss of each step", ratio(apart, twins_apart)),
        Line(arm, "trajectory", "distance of parameters",
             ratio([fmean(r.distances) for r in runs], [fmean(r.distances) for r in twins])),
        *found,
    ]  # fmt: skip


def _apart(run: Run, native: Run) -> float:
    """The mean distance of two runs' losses over the steps."""
    return fmean(abs(a - b) for a, b in zip(run.losses, native.losses, strict=True))
