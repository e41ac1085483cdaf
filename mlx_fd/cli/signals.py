"""How a long command stops."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """Work that a signal ended before its end, and that can go on."""

    def __init__(self, folder: Path, how: str, signals: list[int], command: str = "mlx-fd resume"):
        super().__init__(f"{how}; continue with: {command} {shlex.quote(str(folder))}")
        # What a shell reports of a process that such a signal ended.
        self.status = 128 + signals[0]


@contextlib.contextmanager
def stopping_on_signals(say: Callable[[str], None], text: str) -> Iterator[list[int]]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP ask for a stop, and a second of the first two kill.

    A terminal that closes sends SIGHUP more than once, and a logout SIGTERM with it, so SIGHUP only
    ever asks.

    Args:
        say: prints; called from another thread.
        text: what to print when the first comes.

    Yields:
        The signals that came so far; it grows.
    """
    signals: list[int] = []

    def take(number: int) -> None:
        signals.append(number)
        if len(signals) == 1:
            say(text)

    def handle(number: int, frame: Any) -> None:
        """Nothing: the watching thread has taken it already, also in the midst of a C call."""

    with _watched((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handle, take):
        yield signals


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let the first Ctrl-C raise ``KeyboardInterrupt``, as ever, and the second end the process."""

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with _watched((signal.SIGINT,), handle, lambda number: _show_cursor()):
        yield


def _show_cursor() -> None:
    """Give a terminal its cursor back, which a progress bar hides."""
    from rich.console import Console

    # With the second Ctrl-C nothing can be tidied up any more.
    Console(stderr=True).show_cursor()


@contextlib.contextmanager
def _watched(
    numbers: tuple[int, ...], handle: Callable[[int, Any], None], take: Callable[[int], None]
) -> Iterator[None]:
    """Handle signals; after the first SIGINT or SIGTERM the next has its default action.

    Python runs a handler between two of its own instructions only, which may be minutes away in a
    call of MLX or a BLAS. The thread here hears of a signal at once, and gives the next one to the
    kernel. Signals that are ignored (``nohup``, jobs in a shell's background) stay ignored.
    """
    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes, c_signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = {
        number: signal.getsignal(number)
        for number in numbers
        if signal.getsignal(number) not in (signal.SIG_IGN, None)  # None: not Python's to change
    }
    deadly = before.keys() & {signal.SIGINT, signal.SIGTERM}
    hears, tells = os.pipe()
    os.set_blocking(tells, False)

    def watch() -> None:
        while received := os.read(hears, 1):
            number = received[0]
            if number in deadly:
                for one in deadly:
                    # signal.signal is for the main thread only, which may be in that call.
                    c_signal(one, None)
            if number in before:
                take(number)

    for number in before:
        signal.signal(number, handle)
    wakeup = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(tells)
        thread.join()
        os.close(hears)
        for number, handler in before.items():
            signal.signal(number, handler)
