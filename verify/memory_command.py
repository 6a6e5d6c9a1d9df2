"""`invref-verify memory`: what converting a model saves, beside what else saves memory.

Guarantees that whatever can be wrong with the arguments is found before the work starts, and exit code 1 where a
conversion by plan kept more than native. Must not know how anything is measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import invref
from invref.errors import InputError, InvrefError
from verify import devices, document, memory_measure, memory_models, memory_table, report
from verify.exits import PASSED, VIOLATED
from verify.memory_measure import OURS, PEERS, PLANNED, Case, Result
from verify.memory_models import FAMILIES, Sizes
from verify.progress import Bar

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = 2.0
MOST = 1 << 20


def add_to(commands: Any) -> None:
    """Adds the subcommand's grammar to the parser's `commands`."""
    memory = commands.add_parser("memory", help="measure what converting a model saves, beside other ways")
    memory.add_argument(
        "--model", nargs="+", default=list(FAMILIES), metavar="MODEL",
        help=f"{', '.join(FAMILIES)}, or module:factory, which returns a model and an example (all)",
    )  # fmt: skip
    memory.add_argument("--config", type=Path, metavar="JSON", help="transformers' arguments, for one model")
    memory.add_argument("--dtype", nargs="+", default=["float32"], metavar="DTYPE", help="float32, bfloat16 (float32)")
    memory.add_argument("--batch", type=int, default=4, metavar="N", help="examples in the batch (4)")
    memory.add_argument("--seq", type=int, default=128, metavar="N", help="tokens of each (128)")
    memory.add_argument("--hidden", type=int, metavar="N", help="width of the layers (256)")
    memory.add_argument("--layers", type=int, metavar="N", help="number of layers (2)")
    memory.add_argument("--no-dropout", action="store_true", help="with every dropout rate 0")
    memory.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    memory.add_argument("--peers", action="store_true", help="measure checkpointing and torch.compile, too")
    memory.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S",
        help=f"for the time of each contestant's step, 0 for no times ({SECONDS:g})",
    )  # fmt: skip
    memory.add_argument("--json", type=document.json_path, metavar="PATH", help="write the results to PATH")
    memory.add_argument("--markdown", type=Path, metavar="PATH", help="write them as a page to PATH")
    memory.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit code."""
    sizes, device = _asked(options)
    for path in (options.json, options.markdown):
        if path:
            document.check_writable(path)
    start = time.monotonic()
    results: list[Result] = []
    wanted = [(name, dtype) for name in options.model for dtype in options.dtype]
    names = OURS + (PEERS if options.peers else ())
    screen = report.console()
    with Bar() as bar:
        step = bar.job("memory")
        for done, (name, dtype) in enumerate(wanted):
            step(done, len(wanted))
            model, example = memory_models.built(name, sizes, DTYPES[dtype], device)
            case = Case(model, example, _planned(name, model, example))
            count = sum(p.numel() for p in model.parameters())
            lines = memory_measure.measure(case, names, options.seconds, device)
            results.append(
                Result(name, dtype, devices.title(device), options.batch, options.seq, sizes.dropout, count,
                       case.plan.to_json(), lines)
            )  # fmt: skip
        step(len(wanted), len(wanted))
    for result in results:
        screen.print(memory_table.sites(result))
        screen.print(memory_table.screen(result))
    about = document.environment(time.monotonic() - start)
    about |= {"transformers": document.installed("transformers")}
    if device.type == "cuda":
        about["gpu"] = devices.title(device)
    if options.json:
        content = {"run": about, "results": [result.to_json() for result in results]}
        document.write_text(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if options.markdown:
        document.write_text(options.markdown, memory_table.markdown(results, _command(options), about))
    print(*map(memory_table.said, results), sep="\n")
    return VIOLATED if any(_worse(result) for result in results) else PASSED


def _planned(name: str, model: nn.Module, example: Any) -> invref.Plan:
    """The plan; what somebody else's model raises on its example is bad input."""
    try:
        return invref.plan(model, example)
    except InvrefError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} raised {type(error).__name__} on its example: {error}; run the model on it by itself"
        ) from error


def _worse(result: Result) -> bool:
    """Whether the conversion kept more than native, measured either way."""
    line = result.line(PLANNED)
    kept = result.plan["planned"] if line is None or line.kept is None else max(line.kept, result.plan["planned"])
    return bool(kept > result.plan["native"])


def _asked(options: argparse.Namespace) -> tuple[Sizes, torch.device]:
    for dtype in options.dtype:
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    for name in options.model:
        if name not in FAMILIES and ":" not in name:
            raise InputError(f"unknown model {name!r}: use {', '.join(FAMILIES)}, or module:factory")
    for what in ("batch", "seq", "hidden", "layers"):
        value = getattr(options, what)
        if value is not None and not 1 <= value <= MOST:
            raise InputError(f"cannot measure --{what} {value}: ask for 1 or more, up to {MOST:,}")
    if not 0 <= options.seconds <= 3600:
        raise InputError(f"cannot spend {options.seconds:g} seconds: ask for 0 to 3600")
    if options.config and len(options.model) != 1:
        raise InputError("--config belongs to one model: name it with --model")
    config = memory_models.read(options.config) if options.config else {}
    sizes = Sizes(options.batch, options.seq, options.hidden, options.layers, not options.no_dropout, config)
    return sizes, devices.named(options.device)


def _command(options: argparse.Namespace) -> str:
    words = ["invref-verify", "memory"]
    if options.model != list(FAMILIES):
        words += ["--model", *options.model]
    words += ["--dtype", *options.dtype]
    for flag in ("no_dropout", "peers"):
        words += [f"--{flag.replace('_', '-')}"] if getattr(options, flag) else []
    for what, usual in (("batch", 4), ("seq", 128), ("hidden", None), ("layers", None), ("seconds", SECONDS)):
        value = getattr(options, what)
        words += [] if value == usual else [f"--{what}", f"{value:g}"]
    if options.config:
        words += ["--config", str(options.config)]
    if options.device != "cpu":
        words += ["--device", options.device]
    return shlex.join(words)
