"""The progress bar: on a terminal one line with the share done and the time left, in a pipe nothing.

Must not know what is being done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Step = Callable[[int, int], None]
"""Told (done, total) as the work goes on."""


class Bar:
    """A bar on standard error over several jobs, one after the other; shows nothing where that is not a terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not self._shown)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def job(self, description: str) -> Step:
        """Starts the next job's line; the one before is done."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        task = self._progress.add_task(description, total=None)

        def step(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        return step
