"""The command in a process of its own: the installed one, or a fork of one that has its imports."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import multiprocessing
import os
import pty
import resource
import runpy
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import pytest

from mlx_fd.models.backend import backend
from support import ROOT

SCRIPT = str(Path(sysconfig.get_path("scripts")) / "mlx-fd")
SECONDS = 240  # of a busy machine
# Read by the package when it needs them; others can be read by what it imports.
_LATE = (
    *("MLX_FD_CACHE", "MLX_FD_KERNELS", "MLX_RANK", "MLX_HOSTFILE"),
    *("XDG_CACHE_HOME", "HOME", "COLUMNS", "TERM", "PYTEST_"),
)


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """What standard error says, on one line, however a table was wrapped."""
        return " ".join((self.out + self.err).split())


def shell(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
    program: Path | None = None,
) -> Done:
    """Run the command in a process of its own.

    The process is a fork of one that has made the imports, which are most of what a short command
    costs; on a GPU, and where a variable differs that an import could have read, it is `installed`.

    Args:
        *arguments: the command's.
        cwd: the current folder.
        env: variables beside this process's.
        before: called in the process before the command; of a module that can be imported by name.
        program: a file that Python runs in the command's place.
    """
    if before is None and program is None and not _can_fork(env):
        return installed(*arguments, cwd=cwd, env=env)
    return launch(*arguments, cwd=cwd, env=env, before=before, program=program).wait()


@dataclass(frozen=True)
class Running:
    """A command that was begun.

    Attributes:
        process: its process.
        folder: what it writes to its standard output and error.
    """

    process: BaseProcess
    folder: tempfile.TemporaryDirectory[str]

    def wait(self, seconds: float = SECONDS) -> Done:
        """What it did, when it is through."""
        status = _end(self.process, seconds)
        out, err = (Path(self.folder.name, name).read_text() for name in ("out", "err"))
        self.folder.cleanup()
        return Done(status, out, err)


def launch(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
    program: Path | None = None,
) -> Running:
    """Begin the command in a process of its own, as `shell` does, to be waited for or killed."""
    folder = tempfile.TemporaryDirectory()
    line = (str(program or SCRIPT), *map(str, arguments))
    out, err = (_written(Path(folder.name, name)) for name in ("out", "err"))
    return Running(_fork(line, cwd, env, (None, out, err), before), folder)


@dataclass(frozen=True)
class Piped:
    """A command that was begun and can be talked with.

    Attributes:
        process: its process.
        out: what it writes to its standard output, until that is closed here.
        err: to its standard error.
    """

    process: BaseProcess
    out: TextIO
    err: TextIO

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit status, when it is through; -2 where signal 2 ended it."""
        return _end(self.process, seconds)

    def rest(self, seconds: float = SECONDS) -> Done:
        """What it did, when it is through, and what of its output was not read yet."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.out, self.err)]
            status = self.wait(seconds)
            out, err = (text.result() for text in texts)
        return Done(status, out, err)


@contextlib.contextmanager
def piped(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
    errors: Path | None = None,
) -> Iterator[Piped]:
    """The command in a process of its own, from its start to its end or to this block's.

    With ``errors`` its standard error goes into that file.
    """
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    if errors is not None:
        os.close(err_end)
        err_end = _written(errors)
    with os.fdopen(out) as stdout, os.fdopen(err) as stderr:
        line = (SCRIPT, *map(str, arguments))
        process = _fork(line, cwd, env, (None, out_end, err_end), before)
        try:
            yield Piped(process, stdout, stderr)
        finally:
            process.kill()
            process.join()


def in_terminal(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
) -> tuple[BaseProcess, int]:
    """Begin the command in a pseudo-terminal of 100 columns; its process, and the terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    line = (SCRIPT, *map(str, arguments))
    unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "CI")
    streams = (os.dup(slave), os.dup(slave), slave)
    with pytest.MonkeyPatch.context() as patch:
        for name in unset:
            patch.delenv(name, raising=False)
        given = {"TERM": "xterm-256color", **(env or {})}
        return _fork(line, cwd, given, streams, before), master


def _fork(
    line: tuple[str, ...],
    cwd: Path,
    env: dict[str, str] | None,
    streams: tuple[int | None, int | None, int | None],
    before: Callable[[], object] | None,
) -> BaseProcess:
    """Begin the command with these descriptors as its standard streams, and close them here."""
    _start_forks()
    # As a connection a descriptor is passed on.
    sent = [None if stream is None else Connection(stream) for stream in streams]
    process = multiprocessing.get_context(_method()).Process(
        target=_command, args=(line, cwd, {**os.environ, **(env or {})}, sent, before)
    )
    process.start()
    for stream in filter(None, sent):
        stream.close()
    return process


def _written(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)


def _end(process: BaseProcess, seconds: float) -> int:
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(SCRIPT, seconds)
    return process.exitcode


def _method() -> str:
    # A GPU's driver outlives no fork.
    return "forkserver" if backend().on_cpu else "spawn"


def _can_fork(env: dict[str, str] | None) -> bool:
    """Whether a command with these variables can be a fork."""
    if _method() == "spawn":
        return False
    started, environment = _start_forks(), {**os.environ, **(env or {})}
    changed = {n for n in environment | started if environment.get(n) != started.get(n)}
    return all(name.startswith(_LATE) for name in changed)


def installed(*arguments: object, cwd: Path, env: dict[str, str] | None = None) -> Done:
    """Run the installed console script: where the start is asked about, or two starts compared."""
    done = subprocess.run(
        [SCRIPT, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@functools.cache
def _start_forks() -> dict[str, str]:
    """Start the process that commands are forked from, where they are; its environment."""
    if _method() == "spawn":
        return dict(os.environ)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["support.imported"])
    search = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        # It imports before it is told the parent's sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join(search))
        forkserver.ensure_running()
    return dict(os.environ)


def limit_file_size(size: int) -> None:
    """Let no file grow beyond this many bytes: the disk that is full."""
    # Python writes bytecode without looking whether all of it was written.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _command(
    line: tuple[str, ...],
    cwd: Path,
    environment: dict[str, str],
    streams: list[Connection | None],
    before: Callable[[], object] | None,
) -> None:
    """Be the installed script, or another program, in a fork."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        if stream is not None:
            os.dup2(stream.fileno(), number)
            stream.close()
    if streams[0] is not None:
        sys.stdin = os.fdopen(0, closefd=False)
    # As Python itself sets them up where it starts.
    lines = 1 if os.isatty(1) else -1
    sys.stdout = os.fdopen(1, "w", lines, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    sys.argv = [*line]
    try:
        import support.imported  # noqa: F401  # says why, where the server could not
        from mlx_fd.cli import main

        if before:
            before()
        if line[0] == SCRIPT:
            main()
        else:
            runpy.run_path(line[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        # Multiprocessing ends a fork without them.
        atexit._run_exitfuncs()


def failed(done: Done, *texts: str, status: int = 2) -> None:
    """The command said what was wrong, on standard error only, without a traceback."""
    assert done.status == status, done
    assert done.out == ""
    assert "Traceback" not in done.err and "a bug in mlx-fd" not in done.err
    for text in texts:
        assert text in done.err
