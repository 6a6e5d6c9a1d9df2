"""Entries on disk in the user's cache directory: written whole or not at all, checked when read, never relied upon.

One file an entry, named by a hash of what it was made from; its first line is the hash of the rest. A damaged entry
counts as missing. Where there is no place to write, nothing is kept and nothing fails. Processes may write the same
entry at the same time: each replaces it in one step. Must not know what the entries mean.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path


def directory() -> Path:
    """$INVREF_CACHE if set, else the platform's place for caches (XDG_CACHE_HOME is honoured), plus "invref"."""
    if own := os.environ.get("INVREF_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "invref"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "invref" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "invref"


def key(*parts: str) -> str:
    """A name for the entry made from these texts."""
    joined = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.sha256(joined.encode()).hexdigest()[:40]


@functools.cache
def hash_of(package: str, files: tuple[str, ...]) -> str:
    """A hash of files of a package: a part of the keys of what is made from them."""
    digest = hashlib.sha256()
    for file in files:
        digest.update((resources.files(package) / file).read_bytes())
    return digest.hexdigest()


def load(name: str) -> str | None:
    """The entry's text; None when it is missing, damaged or unreadable."""
    try:
        head, _, text = (directory() / f"{name}.json").read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError, RuntimeError):
        return None
    return text if head == _hash(text) else None


def store(name: str, text: str) -> bool:
    """Keep the entry; False where that is not possible."""
    try:
        place = directory()
        place.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=place)
    except (OSError, RuntimeError):
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(f"{_hash(text)}\n{text}")
        Path(temporary).replace(place / f"{name}.json")
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        return False
    return True


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
