"""`invref-verify merge`: parts of a float32 verification, run by many machines, put together into its records.

Guarantees that the record is that of one run over all inputs, none of which is run again; that a layer whose parts are
not all there, or come from other code, another torch or processor, is bad input that names what to run; and that the
folders of the parts stay as they are. Must not know how anything is measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invref.errors import InputError
from verify import document, gradient_command, report, shards, sweep
from verify.exits import PASSED, VIOLATED
from verify.progress import Bar
from verify.record import Record
from verify.targets import Target

MOST_NAMED = 8
_UNREADABLE = "cannot read {}: copy the folder of the part again"


@dataclass
class Parts:
    """A target, and the folders of its results."""

    target: Target
    folders: list[Path]


def add_to(commands: Any) -> None:
    """Adds the subcommand's grammar to the parser's `commands`."""
    merge = commands.add_parser("merge", help="put together the parts that gradient --shard I/N has kept")
    merge.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="the --state folder of one or more parts"
    )
    merge.add_argument("--name", nargs="+", metavar="NAME", help="activations to put together (all that are there)")
    merge.add_argument("--json", type=document.json_path, metavar="PATH", help="write the records to PATH")
    merge.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the subcommand and returns its exit code."""
    if options.json:
        document.check_writable(options.json)
    start = time.monotonic()
    found = _found(options.folders, options.name)
    results = [_results(parts) for parts in found]
    records: list[Record] = []
    with Bar() as bar:
        for parts, paths in zip(found, results, strict=True):
            step = bar.job(f"{parts.target.name} float32 ({len(records) + 1} of {len(found)})")
            with tempfile.TemporaryDirectory(prefix="invref-merge-") as folder:
                here = Path(folder) / shards.folder_name(parts.target)
                here.mkdir()
                for path in paths:
                    shutil.copyfile(path, here / path.name)
                records.append(sweep.run(parts.target, "float32", state_dir=Path(folder), progress=step))
    if options.json:
        document.write_records(options.json, records, time.monotonic() - start)
    report.show(records)
    return PASSED if all(record.passed for record in records) else VIOLATED


def _found(folders: Sequence[Path], names: Sequence[str] | None) -> list[Parts]:
    """What the folders hold, each target once; InputError where that is nothing, or not what is asked for."""
    notes = [note for folder in folders for note in sorted(folder.glob(f"*/{shards.NOTE}"))]
    found: dict[str, Parts] = {}
    strange: list[str] = []
    for path in notes:
        note = _read(path)
        try:
            (target,) = gradient_command.targets_of(shlex.split(note["request"]))
        except InputError as error:
            # Of an activation that this version does not know, or of a device that is not here.
            strange.append(f"{path.parent}: {error}")
            continue
        except ValueError:
            raise InputError(_UNREADABLE.format(path)) from None
        if names is not None and target.name not in names:
            continue
        if path.parent.name == shards.folder_name(target):
            found.setdefault(path.parent.name, Parts(target, [])).folders.append(path.parent)
        else:
            strange.append(f"{path.parent} is of {_differs(target, note)}: merge with what ran the parts")
    known = {parts.target.name for parts in found.values()}
    missing = [name for name in names or () if name not in known]
    if found and not missing:
        return sorted(found.values(), key=lambda parts: parts.target.name)
    if strange:
        raise InputError(strange[0])
    what = f" of {missing[0]}" if missing else ""
    where = ", ".join(map(str, folders))
    raise InputError(
        f"no parts{what} in {where}: invref-verify gradient NAME --dtype float32 --shard I/N --state FOLDER makes them"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(note["request"], str):
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(_UNREADABLE.format(path))


def _differs(target: Target, note: dict[str, Any]) -> str:
    """In what results differ from those that this machine would have."""
    here = shards.made_by(target)
    for key, value in here.items():
        if note.get(key) != value:
            return f"another {key}, {note.get(key)}, and not {value} as here"
    return "other sources of invref or of the layer"


def _results(parts: Parts) -> list[Path]:
    """A file for each shard, whole; InputError where one is missing or damaged."""
    stores = [shards.Store(folder.parent, parts.target) for folder in parts.folders]
    plan = shards.plan(sweep.oracle_of(parts.target.formula, parts.target.gradient))
    paths = [next((store.path(shard) for store in stores if store.load(shard)), None) for shard in plan]
    missing = [shard.index for shard, path in zip(plan, paths, strict=True) if path is None]
    if missing:
        shown = ", ".join(map(str, missing[:MOST_NAMED])) + (", …" if len(missing) > MOST_NAMED else "")
        words = f"invref-verify gradient {parts.target.options or parts.target.name} --dtype float32"
        raise InputError(
            f"{parts.target.name}: {len(missing)} of {len(plan)} results are missing ({shown}): run the parts that have"
            f" not finished, or all that is missing by `{words} --state {parts.folders[0].parent}`"
        )
    return [path for path in paths if path]
