"""The command line: `invref-verify`, the same as `python -m verify`.

Guarantees the exit codes: 0 when every bound holds, 1 when one is violated, 2 on bad input with one line that names the
remedy, 130 when interrupted. Whatever can be wrong with the arguments is found before the work starts.
Must not know how anything is measured.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from invref import formats
from invref.errors import InputError, InvrefError
from verify import document, mutants, report, shards, single, sweep, targets
from verify.progress import Bar
from verify.record import Record
from verify.targets import Target

PASSED, VIOLATED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, with a remedy."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


MOST_SAMPLES = 100_000_000
Result = TypeVar("Result")


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    result = _Parser(prog="invref-verify", description="How far a layer's gradient is from the truth, on every input.")
    result.add_argument("--version", action="version", version=f"invref {version('invref')}")
    commands = result.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")

    gradient = commands.add_parser("gradient", help="verify the gradient of layers over all inputs of a format")
    gradient.add_argument(
        "names", nargs="*", metavar="NAME", help="activation, as in gelu; or one in one format, as in gelu:float32"
    )
    gradient.add_argument("--all", action="store_true", help="every activation")
    gradient.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float16", "float32"], metavar="DTYPE",
        help=f"formats ({', '.join(formats.FORMATS)}; default: bfloat16 float16 float32)",
    )  # fmt: skip
    gradient.add_argument("--device", default="cpu", help="where the layer runs (cpu)")
    gradient.add_argument("--samples", type=int, metavar="N", help="check N inputs instead of all")
    gradient.add_argument("--shard", default="1/1", metavar="I/N", help="check the I-th of N parts of the inputs")
    gradient.add_argument("--input", metavar="BITS", help="show one input, given by its bits as in 0xbf40")
    gradient.add_argument("--target", metavar="MODULE:CALLABLE", help="verify this function instead of our layer")
    gradient.add_argument("--json", type=Path, metavar="PATH", help="write the records to PATH")
    gradient.add_argument("--state", type=Path, metavar="DIR", help="where finished parts of a run are kept")
    gradient.add_argument("--fresh", action="store_true", help="forget the finished parts of an interrupted run")
    gradient.set_defaults(run=_gradient)

    faults = commands.add_parser("mutants", help="verify the verifier: every planted fault must be caught")
    faults.add_argument("names", nargs="*", metavar="NAME", help="faults to plant (default: all)")
    faults.add_argument("--json", type=Path, metavar="PATH", help="write the results to PATH")
    faults.set_defaults(run=_mutants)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a pipe that cannot spell ≤ must not lose the verdict
    try:
        options = parser().parse_args(arguments)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("invref-verify: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return VIOLATED
    except (InvrefError, OSError) as error:
        print(f"invref-verify: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


def _gradient(options: argparse.Namespace) -> int:
    requests = _requests(options)
    shard = _shard(options.shard)
    if options.samples is not None and not 1 <= options.samples <= MOST_SAMPLES:
        raise InputError(f"cannot check {options.samples} samples: ask for 1 or more, up to {MOST_SAMPLES:,}")
    if options.device != "cpu":
        raise InputError(f"unknown device {options.device!r}: use cpu")
    if options.json:
        document.check_writable(options.json)
    if options.input is not None:
        if options.json:
            raise InputError("--input shows one input and writes no records: leave out --json")
        for target, dtype in requests:
            show = partial(single.show, target, dtype, options.input)
            print("\n".join(_foreign(show) if options.target else show()))
        return PASSED

    state = _state(options, requests)
    start = time.monotonic()
    records: list[Record] = []
    try:
        with _one_interrupt(), Bar() as bar:
            for target, dtype in requests:
                step = bar.job(f"{target.name} {dtype} ({len(records) + 1} of {len(requests)})")
                run = partial(
                    sweep.run, target, dtype, shard=shard, samples=options.samples, state_dir=state, keep=True
                )
                records.append(_foreign(partial(run, progress=step)) if options.target else run(progress=step))
    except KeyboardInterrupt:
        kept = f"finished parts are kept in {state}: the same command resumes" if state else "nothing was kept"
        print(f"invref-verify: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        document.write_records(options.json, records, time.monotonic() - start)
    report.show(records)
    if state and shard == (1, 1) and options.samples is None:
        # Only now: a run interrupted at its last activation must not lose the first ones.
        for target, dtype in requests:
            if dtype == "float32":
                shards.Store(state, target).clear()
    if shard != (1, 1) and state:
        print(f"the part is kept in {state}; once all {shard[1]} have run, run without --shard to put them together")
    return PASSED if all(record.passed for record in records) else VIOLATED


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first Ctrl-C interrupts; more of them must not break into the saving of parts under way."""

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _foreign(run: Callable[[], Result]) -> Result:
    """A run of somebody else's function: whatever that raises is bad input, not a crash of ours."""
    try:
        return run()
    except InvrefError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"the target raised {type(error).__name__}: {error}; try it on a tensor by itself") from error


def _mutants(options: argparse.Namespace) -> int:
    wanted = list(mutants.chosen(options.names))
    if options.json:
        document.check_writable(options.json)
    start = time.monotonic()
    outcomes = []
    with Bar() as bar:
        step = bar.job("mutants")
        for mutant in wanted:
            outcomes.append(mutant.run())
            step(len(outcomes), len(wanted))
    if options.json:
        document.write(options.json, {"mutants": [o.to_json() for o in outcomes]}, time.monotonic() - start)
    report.console().print(mutants.table(outcomes))
    escaped = [outcome for outcome in outcomes if not outcome.caught]
    for outcome in escaped:
        print(mutants.escaped(outcome))
    print(f"{len(outcomes) - len(escaped)} of {len(outcomes)} as they must be")
    return VIOLATED if escaped else PASSED


def _requests(options: argparse.Namespace) -> list[tuple[Target, str]]:
    """The (target, format) pairs asked for, each once, grouped by activation."""
    names = [*(targets.TARGETS if options.all else ()), *options.names]
    if not names:
        raise InputError(f"nothing to verify: name activations ({', '.join(targets.TARGETS)}) or say --all")
    pairs: dict[str, dict[str, None]] = {}
    for name in names:
        activation, colon, dtype = name.partition(":")
        for wanted in [dtype] if colon else options.dtype:
            pairs.setdefault(_known("activation", activation, targets.TARGETS), {})[
                _known("dtype", wanted, formats.FORMATS)
            ] = None
    if options.target and len(pairs) > 1:
        raise InputError(f"--target {options.target} is one function: name the one activation that it computes")
    order = list(formats.FORMATS)
    return [
        (targets.external(name, options.target) if options.target else targets.TARGETS[name], dtype)
        for name, dtypes in pairs.items()
        for dtype in sorted(dtypes, key=order.index)
    ]


def _known(what: str, name: str, names: Iterable[str]) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"unknown {what} {name!r}: {remedy}There are {', '.join(names)}")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if len(text) < 20 and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise InputError(f"bad shard {text[:30]!r}: write I/N with 1 ≤ I ≤ N, as in 2/8")


def _state(options: argparse.Namespace, requests: Sequence[tuple[Target, str]]) -> Path | None:
    """The folder for finished parts, or None (and a line that says so) where none can be written."""
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder: Path = options.state or Path(cache) / "invref-verify"
        folder.mkdir(parents=True, exist_ok=True)
        document.check_writable(folder / "state")
    except (OSError, RuntimeError) as error:
        print(f"invref-verify: {error}; an interrupted run will start over: keep it with --state DIR", file=sys.stderr)
        return None
    if options.fresh:
        for target, dtype in requests:
            for finished in folder.glob(f"{target.name}-{dtype}-{'[0-9a-f]' * 16}"):
                shutil.rmtree(finished)
    return folder
