"""Verdicts on a training run, from its record alone: each arm at three levels, the controls, the whole in a sentence.

Guarantees that a control that no level tells apart makes the run worthless, whatever else was found, and that native's
outcomes alone fix the margins. Must not know how anything was trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from invref.errors import InputError
from verify import report
from verify import training_stats as stats
from verify.training_record import Run, Seed
from verify.training_stats import Margin, Test, Verdict

NATIVE, INVERTED, TWIN = "native", "inverted", "twin"
MEANING = {
    NATIVE: "torch's own activation",
    INVERTED: "invref's",
    TWIN: "native, its gradient with independent noise of the error floor's size and of one rounding",
    "coarse": "control: a decoder with an error of up to 2e-2",
    "flipped": "control: the side bit flipped in 1 % of the elements that have two sides",
    "wrong": "control: the gradient of another activation",
}
"""The arms in words."""
Level = Literal["one step", "trajectory", "outcome"]
LEVELS: tuple[Level, ...] = ("one step", "trajectory", "outcome")
WORTHLESS = "worthless"
PLACE = {"equivalent": "within", "different": "outside", "undecided": "neither within nor outside"}
"""Where the interval of an outcome lies beside the margin, by verdict."""
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

    def of(self, arm: str, level: Level) -> list[Line]:
        """An arm's lines at a level."""
        return [line for line in self.lines if (line.arm, line.level) == (arm, level)]

    @property
    def reasons(self) -> str:
        """What the verdict rests on, in one sentence to be read after it."""
        if self.whole == WORTHLESS:
            missed = ", ".join(self.escaped)
            return f"since no level tells apart: {missed}" if missed else "since it has no control"
        outcome = self.of(INVERTED, "outcome")
        told = f"over {outcome[0].test.seeds} seeds: {'; '.join(map(_interval, outcome))}"
        if self.whole != "undecided":
            return told
        needed = self.needed(INVERTED)
        return f"{told}; " + ("how many seeds would decide is not known" if needed is None else
                              f"about {needed:,} seeds would decide")  # fmt: skip

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


def shown(value: float) -> str:
    """A number to three digits, in words where it is not finite."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    return f"{value:#.3g}".rstrip(".") if 0.01 <= abs(value) < 999.5 else report.number(value)


def from_json(found: dict[str, Any]) -> Findings:
    """What `Findings.to_json` gave; what was not finite comes back as NaN. InputError where it is something else."""
    try:
        lines = [Line(line["arm"], line["level"], line["quantity"], _test(line)) for line in found["lines"]]
        margins = {name: Margin(_number(m["value"]), m["rule"]) for name, m in found["margins"].items()}
        return Findings(tuple(lines), margins, tuple(found["told_apart"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the findings of this training record cannot be read ({error}): train again") from error


def _test(found: dict[str, Any]) -> Test:
    mean, low, high, margin, p, power = (_number(found[key]) for key in ("mean", "low", "high", "margin", "p", "power"))
    return Test(found["verdict"], found["seeds"], mean, low, high, margin, p, power, found["needed"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _interval(line: Line) -> str:
    t = line.test
    if not math.isfinite(t.mean):
        return f"the difference in {line.quantity} is not finite"
    return (f"the difference in {line.quantity}, {shown(t.low)} to {shown(t.high)} at 90 %, "
            f"is {PLACE[t.verdict]} ±{shown(t.margin)}")  # fmt: skip


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
