"""A progress line for work of several steps."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mlx_fd.text import strip_control_chars


class Steps:
    """A progress line for work of several steps. Use as a context manager, and call with each.

    Args:
        console: where to show it; nothing is shown where that is no terminal.
        quiet: show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool = False):
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_interactive,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Steps:
        self._bar.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._bar.__exit__(*failure)

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take the state of a step."""
        if step not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[step] = self._bar.add_task(strip_control_chars(step))
        self._bar.update(self._tasks[step], completed=done, total=total)
