"""The command in several processes, as `mlx.launch` starts them: on MLX's ring, on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from support.shell import Done, shell


def launch(
    count: int,
    *arguments: object,
    cwd: Path | Sequence[Path],
    before: Mapping[int, Callable[[], object]] | None = None,
    program: Path | None = None,
) -> list[Done]:
    """Run the command as so many ranks.

    Args:
        count: how many.
        *arguments: the command's.
        cwd: the current folder of all, or of each.
        before: what some ranks call before the command.
        program: a file that Python runs in the command's place.

    Returns:
        What became of each rank.
    """
    folders = [cwd] * count if isinstance(cwd, Path) else cwd
    hosts = folders[0] / f"hosts-{time.monotonic_ns()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))

    def one(rank: int) -> Done:
        env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        act = (before or {}).get(rank, _nothing)
        return shell(*arguments, cwd=folders[rank], env=env, before=act, program=program)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def _nothing() -> None:
    """A fork, whatever the variables."""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def killed_after(path: Path, lines: int) -> Callable[[], object]:
    """What lets a process be killed as soon as a file has so many lines."""
    return partial(_watch, path, lines)


def _watch(path: Path, lines: int) -> None:
    def wait() -> None:
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
