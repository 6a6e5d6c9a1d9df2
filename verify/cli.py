"""The command line: `invref-verify`, the same as `python -m verify`.

Guarantees the exit codes: 0 when every bound holds, 1 when one is violated, 2 on bad input with one line that names the
remedy, 130 when interrupted. Whatever can be wrong with the arguments is found before the work starts, and a package
that is not installed stops only the subcommands that need it. Must not know how anything is measured.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

from invref.errors import InputError, InvrefError, MissingError, needing
from verify import document
from verify.exits import BAD_INPUT, INTERRUPTED, PASSED, VIOLATED


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, with a remedy."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    result = _Parser(prog="invref-verify", description="How far a layer's gradient is from the truth, on every input.")
    result.add_argument("--version", action="version", version=f"invref {version('invref')}")
    commands = result.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")

    for name in ("gradient", "merge", "report", "speed", "memory", "training"):
        _add(commands, name)

    faults = commands.add_parser("mutants", help="verify the verifier: every planted fault must be caught")
    faults.add_argument("names", nargs="*", metavar="NAME", help="faults to plant (default: all)")
    faults.add_argument("--json", type=document.json_path, metavar="PATH", help="write the results to PATH")
    faults.set_defaults(run=_mutants)
    return result


def _add(commands: Any, name: str) -> None:
    """Adds a subcommand's grammar; where it lacks a package, one that takes anything and says what to install."""
    try:
        with needing(f"invref-verify {name}"):
            importlib.import_module(f"verify.{name}_command").add_to(commands)
    except MissingError as error:
        # No character can start an option here.
        barred = commands.add_parser(name, help=str(error), add_help=False, prefix_chars="\0")
        barred.add_argument("anything", nargs="*")
        barred.set_defaults(run=partial(_refuse, error))


def _refuse(error: MissingError, _options: argparse.Namespace) -> NoReturn:
    raise error


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


def _mutants(options: argparse.Namespace) -> int:
    with needing("invref-verify mutants"):
        from verify import mutants, report
        from verify.progress import Bar
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
