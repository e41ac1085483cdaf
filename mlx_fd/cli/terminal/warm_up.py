"""What a loop with a warm-up looks like: a run of distillation, and after it the loop."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mlx_fd.cli.terminal.run import Display
from mlx_fd.cli.terminal.self_distillation import SelfDisplay
from mlx_fd.runs.events import Event, WarmedUp


class _WarmUp(SelfDisplay):
    title = "mlx-fd loop: warm-up"
    counted = "warm-up problems"


class WarmUpDisplay:
    """The display of the warm-up until that is over, then the loop's; used as each of them is.

    Args:
        console: where to print; a terminal gets a live panel.
        quiet: print warnings only.
    """

    def __init__(self, console: Console, *, quiet: bool = False):
        self._loop = Display(console, quiet=quiet)
        self._now: Display = _WarmUp(console, quiet=quiet)

    def __enter__(self) -> WarmUpDisplay:
        self._now.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._now.__exit__(*failure)

    def __call__(self, event: Event) -> None:
        """Take an event."""
        self._now(event)
        if isinstance(event, WarmedUp):
            self._now.__exit__(None, None, None)
            self._now = self._loop
            self._now.__enter__()
