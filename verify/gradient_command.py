"""The subcommand `gradient`: which layers, in which formats, how, and what becomes of the records.

Guarantees that whatever can be wrong with the arguments is found before the work starts, that an interrupted run keeps
its finished parts, and that what somebody else's function raises is bad input. Must not know how anything is measured.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from invref import formats
from invref.errors import InputError, InvrefError
from verify import devices, document, foreign, moving, native, report, shards, single, sweep, targets
from verify.exits import INTERRUPTED, PASSED, VIOLATED
from verify.progress import Bar
from verify.record import Record
from verify.targets import Target

MOST_SAMPLES = 100_000_000
DTYPES = ["bfloat16", "float16", "float32"]
NATIVE_RESULTS = Path("reports") / "native.json"
Result = TypeVar("Result")


def add_to(commands: Any) -> None:
    """Adds the subcommand's grammar to the parser's `commands`."""
    gradient = commands.add_parser("gradient", help="verify the gradient of layers over all inputs of a format")
    gradient.add_argument(
        "names", nargs="*", metavar="NAME", help="activation, as in gelu; or one in one format, as in gelu:float32"
    )
    gradient.add_argument("--all", action="store_true", help="every activation")
    gradient.add_argument(
        "--dtype", nargs="+", default=DTYPES, metavar="DTYPE",
        help=f"formats ({', '.join(formats.FORMATS)}; default: bfloat16 float16 float32)",
    )  # fmt: skip
    gradient.add_argument("--device", default="cpu", help="where the layer runs: cpu, cuda or cuda:N (cpu)")
    gradient.add_argument("--samples", type=int, metavar="N", help="check N inputs instead of all")
    gradient.add_argument("--shard", default="1/1", metavar="I/N", help="check the I-th of N parts of the inputs")
    gradient.add_argument("--input", metavar="BITS", help="show one input, given by its bits as in 0xbf40")
    gradient.add_argument(
        "--target", metavar="MODULE:CALLABLE", help="verify this function or torch.nn.Module instead of our layer"
    )
    gradient.add_argument("--formula", metavar="TEXT", help="verify our layer, or --target, for this formula in x")
    gradient.add_argument(
        "--gradient-formula", metavar="TEXT", help="what the gradient of --target is meant to be, if not f'"
    )
    gradient.add_argument(
        "--native", action="store_true", help="measure the framework's own layers; all by default: reports/native.md"
    )
    gradient.add_argument("--json", type=document.json_path, metavar="PATH", help="write the records to PATH")
    gradient.add_argument("--state", type=Path, metavar="DIR", help="where finished parts of a run are kept")
    gradient.add_argument("--fresh", action="store_true", help="forget the finished parts of an interrupted run")
    gradient.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit code."""
    requests = _requests(options)
    shard = _shard(options.shard)
    whole = _whole_native(options)
    path = NATIVE_RESULTS if whole else options.json
    if options.samples is not None and not 1 <= options.samples <= MOST_SAMPLES:
        raise InputError(f"cannot check {options.samples} samples: ask for 1 or more, up to {MOST_SAMPLES:,}")
    if path:
        document.check_writable(path)
    if options.input is not None:
        if path:
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
                verify = partial(
                    sweep.run, target, dtype, shard=shard, samples=options.samples, state_dir=state, keep=True
                )
                records.append(_foreign(partial(verify, progress=step)) if options.target else verify(progress=step))
    except KeyboardInterrupt:
        kept = f"finished parts are kept in {state}: the same command resumes" if state else "nothing was kept"
        print(f"invref-verify: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    if path:
        document.write_records(path, records, time.monotonic() - start)
    if whole:
        native.write(NATIVE_RESULTS, NATIVE_RESULTS.with_suffix(".md"))
    report.show(records)
    if state and shard == (1, 1) and options.samples is None:
        # Only now: a run interrupted at its last activation must not lose the first ones.
        for target, dtype in requests:
            if dtype == "float32":
                shards.Store(state, target).clear()
    ours = any(dtype == "float32" and not target.foreign for target, dtype in requests)
    if shard != (1, 1) and state and ours and options.samples is None:
        print(
            f"the part is kept in {state}; once all {shard[1]} have run: invref-verify merge {shlex.quote(str(state))}"
        )
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
        with warnings.catch_warnings():
            # The framework's, before the error that follows.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True to a scalar")
            return run()
    except InvrefError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"the target raised {type(error).__name__}: {error}; try it on a tensor by itself") from error


def _whole_native(options: argparse.Namespace) -> bool:
    """Whether this is the run behind the framework's table, whose place is reports/: everything, on every input."""
    moved = options.shard != "1/1" or options.device != "cpu"
    partial = options.names or options.json or options.input is not None or options.samples is not None
    return options.native and options.all and not partial and options.dtype == DTYPES and not moved


def targets_of(words: Sequence[str]) -> list[Target]:
    """The targets that these words of a command line choose; ValueError where they choose none of this library's."""
    grammar = argparse.ArgumentParser(exit_on_error=False)
    add_to(grammar.add_subparsers())
    try:
        options, left = grammar.parse_known_args(["gradient", *words, "--dtype", "float32"])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if left or options.target:
        raise ValueError(f"no words for a target: {words}")
    return [target for target, _ in _requests(options)]


def _requests(options: argparse.Namespace) -> list[tuple[Target, str]]:
    """The (target, format) pairs asked for, each once, grouped by activation, on the device asked for."""
    device = devices.named(options.device)
    return [(moving.moved(target, device), dtype) for target, dtype in _pairs(options)]


def _pairs(options: argparse.Namespace) -> list[tuple[Target, str]]:
    for option in ("target", "formula", "gradient_formula"):
        if getattr(options, option) is not None and not getattr(options, option).strip():
            raise InputError(f"--{option.replace('_', '-')} is empty: give a text after it, or leave it out")
    if options.native and (options.target or options.formula):
        raise InputError("--native measures the framework's own layers: leave out --target and --formula")
    if options.gradient_formula and not options.target:
        raise InputError("--gradient-formula says what a --target is meant to do: name that, too")
    names = [*(targets.TARGETS if options.all else ()), *options.names]
    if names and options.formula:
        raise InputError("--formula takes the place of a name: leave out one of the two")
    if options.formula or (options.target and not names):
        dtypes, unnamed = _formats(options.dtype), _unnamed(options)
        return [(unnamed, dtype) for dtype in dtypes]
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
    chosen = {name: _named(name, options) for name in pairs}
    return [(chosen[name], dtype) for name, dtypes in pairs.items() for dtype in _formats(dtypes)]


def _formats(names: Iterable[str]) -> list[str]:
    """The formats named, each once, from the narrowest."""
    known = {_known("dtype", name, formats.FORMATS) for name in names}
    return [name for name in formats.FORMATS if name in known]


def _unnamed(options: argparse.Namespace) -> Target:
    if options.target:
        return foreign.external(options.target, formula=options.formula, gradient=options.gradient_formula)
    return foreign.from_text(options.formula)


def _named(name: str, options: argparse.Namespace) -> Target:
    if options.target:
        return foreign.external(options.target, name=name, gradient=options.gradient_formula)
    return targets.native_of(name) if options.native else targets.TARGETS[name]


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
