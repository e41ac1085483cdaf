"""How a long command stops: signals, and what MLX says when the machine gives out."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError


class Stopped(Exception):
    """Work that a signal ended before its end, and that can go on."""

    def __init__(self, folder: Path, how: str, signals: list[int], command: str = "mlx-fd resume"):
        super().__init__(f"{how}; go on with: {command} {shlex.quote(str(folder))}")
        # What a shell reports of a process that such a signal ended.
        self.status = 128 + signals[0]


def explained(error: RuntimeError, folder: Path) -> Exception:
    """What MLX says when the GPU or the memory gives out, with what to do about it."""
    text = str(error)
    signs = ("kIOGPUCommandBuffer", "Command buffer execution failed", "allocate")
    if not any(sign in text for sign in signs):
        return error
    return UserError(
        f"a computation was too large ({text.splitlines()[0]}). Memory ran out, or macOS ended a "
        "long one because a display was on (let it sleep). Set micro_batch = 1 and "
        f"checkpoint_layers = true in {folder}/config.toml, then: mlx-fd resume {folder}; or begin "
        "a new run with a smaller --batch-size."
    )


@contextlib.contextmanager
def stopping_on_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Let the first Ctrl-C (or SIGTERM) ask for a stop, and the second stop at once.

    Yields:
        The signals that came so far; it grows.
    """
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        # From a thread: the signal may have come in the middle of another print.
        text = "stopping after this batch; press Ctrl-C again to stop at once"
        threading.Thread(target=say, args=(text,)).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
