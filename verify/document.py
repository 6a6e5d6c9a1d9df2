"""The JSON file of a verification: the records, and the machine and versions that they belong to.

Guarantees that a file is either whole or untouched, and that a path that cannot be written is found before the work
starts. Must not know how anything is measured or printed.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import invref
from invref.errors import InvrefError
from verify.record import Record

_PACKAGES = {
    "torch": "torch", "numpy": "numpy", "llvmlite": "llvmlite", "numba": "numba", "flint": "python-flint",
    "invref": "invref",
}  # fmt: skip


class OutputError(InvrefError, OSError):
    """A file that cannot be written."""


def environment(seconds: float) -> dict[str, Any]:
    """The run: versions, decoder tables, processor, cores, platform, date (UTC) and wall-clock seconds."""
    return {
        "python": platform.python_version(),
        **{name: installed(package) for name, package in _PACKAGES.items()},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "tables": tables(),
        "platform": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tables() -> dict[str, str]:
    """The hash of each decoder table that ships: results say which coefficients they belong to."""
    folder = Path(invref.__file__).parent / "tables"
    return {path.stem: json.loads(path.read_text())["sha256"] for path in sorted(folder.glob("*.json"))}


def make_folder(folder: Path) -> None:
    """Makes the folder that --out names, and those above it; OutputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}): name another with --out") from None


def check_writable(path: Path) -> None:
    """Raises OutputError where `write` would fail, so that nobody finds out after the work."""
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".invref-"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}): name a file in a folder you may write") from None


def json_path(text: str) -> Path:
    """The path after --json; OutputError where its name is that of a text."""
    if text.lower().endswith((".md", ".html")):
        raise OutputError(f"cannot write records to {text}: --json takes the name of a .json file")
    return Path(text)


def write(path: Path, content: Mapping[str, Any], seconds: float) -> None:
    """Writes `content` and the `run` in one step: a reader sees the old file or the new one."""
    document = {"run": environment(seconds), **content}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in one step, as `write`."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        # A device or a pipe is written to, never replaced.
        path.write_text(text, encoding="utf-8")
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".invref-", delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.close()
            # A temporary file is private to its owner; the result gets the rights of any other new file.
            mask = os.umask(0)
            os.umask(mask)
            Path(file.name).chmod(0o666 & ~mask)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def write_records(path: Path, records: Sequence[Record], seconds: float) -> None:
    """Writes `{"run": ..., "records": [...]}`."""
    write(path, {"records": [record.to_json() for record in records]}, seconds)


def read(path: Path) -> list[Record]:
    """The records of a file that `write_records` made."""
    return [Record.from_json(record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
