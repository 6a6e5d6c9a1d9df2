"""`invref-verify training`: does training notice that gradients are decoded from the output?

Guarantees that whatever can be wrong with the arguments is found before the work starts, that what was done is on disk
after every seed, that an interrupted run's seeds are not lost to one that starts anew, and exit code 0 only where the
outcome is equivalent and every control was told apart. Must not know how arms are trained, nor what counts as equal.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from invref.errors import InputError
from verify import (
    devices,
    document,
    report,
    training_arms,
    training_findings,
    training_page,
    training_record,
    training_stats,
)
from verify.exits import PASSED, VIOLATED
from verify.progress import Bar, Step
from verify.training_findings import FEWEST, INVERTED, LEVELS, MEANING, Findings
from verify.training_models import SHAPES
from verify.training_record import Seed, Settings
from verify.training_run import Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEEDS = 8
MOST_STEPS, MOST_SEEDS = 1_000_000, 1000


def add_to(commands: Any) -> None:
    """Adds the subcommand's grammar to the parser's `commands`."""
    training = commands.add_parser("training", help="train with and without invref, and test whether it makes a change")
    training.add_argument("--model", default="gpt", metavar="MODEL", help=f"{', '.join(SHAPES)} (gpt)")
    training.add_argument("--dtype", default="float32", metavar="DTYPE", help=f"{', '.join(DTYPES)} (float32)")
    training.add_argument("--steps", type=int, metavar="N", help="steps of each run (each model has its own)")
    training.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"seeds, {FEWEST} or more ({SEEDS})")
    training.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    training.add_argument("--out", type=Path, metavar="DIR", help="write MODEL-DTYPE.json, .html and .svg")
    training.add_argument("--resume", action="store_true", help="go on from the seeds in --out's file")
    training.add_argument("--json", type=document.json_path, metavar="PATH", help="write the results to PATH")
    training.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit code."""
    trainer, settings = _asked(options)
    kept = options.out / f"{options.model}-{options.dtype}.json" if options.out else None
    if options.resume and kept is None:
        raise InputError("--resume has nothing to go on from: name the folder with --out")
    if options.json:
        document.check_writable(options.json)
    done = _done(kept, settings, options.resume) if kept else {}
    start = time.monotonic()
    try:
        with Bar() as bar:
            step = bar.job(f"{options.model}, {options.dtype}")
            for seed in range(options.seeds):
                if seed in done:
                    continue
                trainer.told = partial(_told, step, seed, options.seeds)
                done[seed] = trainer.seed(seed, settings.arms)
                if kept:
                    training_record.write(kept, settings, list(done.values()), None, time.monotonic() - start)
    except BaseException:
        if kept and done:
            training_page.write(kept)
        raise
    seeds = [done[seed] for seed in range(options.seeds)]
    found = training_findings.findings(seeds)
    # Seeds that a longer run left in the file stay there.
    everything = [done[seed] for seed in sorted(done)]
    if kept:
        training_record.write(kept, settings, everything, found.to_json(), sum(s.seconds for s in everything))
        training_page.write(kept)
    if options.json:
        training_record.write(options.json, settings, seeds, found.to_json(), sum(s.seconds for s in seeds))
    console = report.console()
    console.print(_table(found))
    print(*said(found, seeds), sep="\n")
    if kept:
        print(f"written to {options.out}: open {kept.with_suffix('.html')}")
    return PASSED if found.whole == "equivalent" else VIOLATED


def _done(kept: Path, settings: Settings, resume: bool) -> dict[int, Seed]:
    """The seeds to go on from; InputError where the file's would be lost."""
    training_page.prepare(kept)
    if resume:
        return {seed.seed: seed for seed in training_record.resumed(kept, settings)}
    if kept.exists() and (before := training_record.read(kept)).findings is None:
        raise InputError(f"{kept} has an interrupted run ({len(before.seeds)} done): say --resume, or remove it")
    return {}


def said(found: Findings, seeds: Sequence[Seed]) -> list[str]:
    """The verdicts in lines of text, the whole one last."""
    lines = [f"margin of {name}: {m.value:.3g}, {m.rule}" for name, m in found.margins.items()]
    middle = sorted(seeds, key=lambda seed: seed.batches)[len(seeds) // 2]
    lines.append(
        f"beside it, one step's gradient: bfloat16 against float32 {middle.precision:.2g}, "
        f"one batch against another {middle.batches:.2g}"
    )
    for control in found.controls:
        levels = ", ".join(found.told_apart(control)) or "no level: NOT TOLD APART"
        lines.append(f"{MEANING[control]}: told apart by {levels}")
    if not found.sensed:
        lines.append("the outcome told no control apart: taken alone it says that the margin holds, and no more")
    lines += [f"inverted, {level}: {found.verdict(INVERTED, level)}" for level in LEVELS]
    return [*lines, f"verdict: {found.whole}, {found.reasons}"]


def _told(step: Step, before: int, seeds: int, done: int, total: int) -> None:
    step(before * total + done, seeds * total)


def _asked(options: argparse.Namespace) -> tuple[Trainer, Settings]:
    if options.model not in SHAPES:
        raise InputError(f"unknown model {options.model!r}: use one of {', '.join(SHAPES)}")
    if options.dtype not in DTYPES:
        raise InputError(f"unknown dtype {options.dtype!r}: use one of {', '.join(DTYPES)}")
    shape = SHAPES[options.model]
    steps = shape.steps if options.steps is None else options.steps
    if not 1 <= steps <= MOST_STEPS:
        raise InputError(f"cannot train {steps} steps: ask for 1 or more, up to {MOST_STEPS:,}")
    if not FEWEST <= options.seeds <= MOST_SEEDS:
        raise InputError(f"cannot test {options.seeds} seeds: ask for {FEWEST} or more, up to {MOST_SEEDS:,}")
    device = devices.named(options.device)
    training_stats.students()  # says what is missing before the work starts
    trainer = Trainer(shape, DTYPES[options.dtype], device, steps)
    count = sum(p.numel() for p in trainer.model(training_arms.NATIVE, 0).parameters())
    return trainer, Settings(options.model, options.dtype, steps, devices.title(device), training_arms.ARMS, count,
                             shape.batch, shape.rate)  # fmt: skip


def _table(found: Findings) -> Table:
    table = Table(title="differences from native: ratios to the twin's, except outcomes")
    for name in ("arm", "level", "quantity", "verdict"):
        table.add_column(name)
    for name in ("mean", "90 % interval", "margin", "p", "power", "seeds needed"):
        table.add_column(name, justify="right")
    for line in found.lines:
        t = line.test
        needed = "" if t.needed is None or t.verdict != "undecided" else f"{t.needed:,}"
        table.add_row(line.arm, line.level, line.quantity, t.verdict, f"{t.mean:.3g}", f"{t.low:.3g} to {t.high:.3g}",
                      f"{t.margin:.3g}", f"{t.p:.2g}", f"{t.power:.2f}", needed)  # fmt: skip
    return table
