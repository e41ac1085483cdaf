"""The command in a process of its own: the installed one, or a fork of one that has its imports."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

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
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(SCRIPT, seconds)
        out, err = (Path(self.folder.name, name).read_text() for name in ("out", "err"))
        self.folder.cleanup()
        return Done(self.process.exitcode, out, err)


def launch(
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
    program: Path | None = None,
) -> Running:
    """Begin the command in a process of its own, as `shell` does, to be waited for or killed."""
    _start_forks()
    folder = tempfile.TemporaryDirectory()
    outputs = (Path(folder.name, "out"), Path(folder.name, "err"))
    process = multiprocessing.get_context(_method()).Process(
        target=_command,
        args=(
            (program or SCRIPT, *map(str, arguments)),
            cwd,
            {**os.environ, **(env or {})},
            outputs,
            before,
        ),
    )
    process.start()
    return Running(process, folder)


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
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _command(
    line: tuple[Path | str, ...],
    cwd: Path,
    environment: dict[str, str],
    outputs: tuple[Path, Path],
    before: Callable[[], object] | None,
) -> None:
    """Be the installed script, or another program, in a fork."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [*map(str, line)]
    try:
        import support.imported  # noqa: F401  # says why, where the server could not
        from mlx_fd.cli import main

        if before:
            before()
        if line[0] == SCRIPT:
            main()
        else:
            runpy.run_path(str(line[0]), run_name="__main__")
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
