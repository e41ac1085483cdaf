"""Programs that models write are run here, each in a process of its own: do they pass their tests?

Nothing runs before :func:`allow` was called, which a command does where the user says so, every
time anew. What the process may not do is asked of the operating system: limits of time, memory and
file size everywhere; no network, no other files, no other processes where seccomp, Landlock and
namespaces (Linux) or sandbox-exec (macOS) are there. What is missing is found out by a trial, and
told.

:mod:`mlx_fd.problems.program_worker` is the other side.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError

SECONDS = 8
"""Processor time of a program."""
# Wall-clock time for each second of processor time: other work on the machine decides little.
_PATIENCE = 3
MEMORY = 1 << 30
FILE_SIZE = 1 << 20
_WORKER = Path(__file__).with_name("program_worker.py")
_SANDBOX = (
    "(version 1)(allow default)(deny network*)(deny process-fork)(deny file-write*)"
    '(allow file-write* (subpath "{folder}") (literal "/dev/null"))'
    "(deny signal)(allow signal (target self))"
)
# Threads are refused as processes are, and NumPy's libraries begin some when they are imported.
_ONE_THREAD = dict.fromkeys(
    (
        *("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
        *("VECLIB_MAXIMUM_THREADS", "NUMEXPR_MAX_THREADS"),
    ),
    "1",
)
# What a program tries in the trial, and what it could do if it succeeds.
_TRIAL = """
import os, resource, socket
found = []
def could(what, attempt):
    try:
        attempt()
    except BaseException:
        return
    found.append(what)
could("the network", lambda: socket.create_connection(("127.0.0.1", {port}), 2))
could("files that you can read", lambda: open({path!r}).read())
could("files that you can write", lambda: open({path!r}, "a").close())
could("memory without a limit", lambda: bytearray(2 * {memory}))
could("files of any size", lambda: open("large", "wb").write(bytes(2 * {size})))
def fill():
    for number in range(16):
        open(str(number), "wb").write(bytes({size}))
could("disk space without a limit", fill)
could("signals to other processes", lambda: os.kill({pid}, 0))
could("limits of other processes", lambda: resource.prlimit({pid}, resource.RLIMIT_CORE))
def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()
could("further processes", fork)
"""


@dataclass
class _Permission:
    """Whether programs may be run, and what they can do that they should not."""

    given: bool = False
    not_isolated: tuple[str, ...] = field(default=())


_permission = _Permission()


def allow() -> None:
    """Permit to run programs in this process from now on, and try what they can do.

    Raises:
        UserError: a program cannot be run here.
    """
    if _permission.given:
        return
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(4)
        path = Path(scratch) / "theirs"
        path.write_text("something of the user's")
        program = _TRIAL.format(
            port=listening.getsockname()[1],
            path=str(path),
            memory=MEMORY,
            size=FILE_SIZE,
            pid=os.getpid(),
        )
        found = _run(program, "found")
    if found is None:
        raise UserError(
            "--allow-code-execution: a program cannot be run here in a process of its own with "
            "limits of time and memory"
        )
    _permission.given, _permission.not_isolated = True, tuple(found)


def check_allowed() -> None:
    """Refuse to go on where programs may not be run.

    Raises:
        UserError: nobody allowed it.
    """
    if not _permission.given:
        raise UserError(
            "these answers are programs, and judging them runs what a model writes: loop, distil, "
            "self-distill, eval and resume do so with --allow-code-execution, which has to be said "
            "anew each time"
        )


def isolation_note() -> str:
    """What to tell the user of how programs are run."""
    missing = _permission.not_isolated
    text = (
        f"programs that models write are run, each in a process of its own in an empty folder, for "
        f"at most {SECONDS} seconds"
    )
    if not missing:
        return f"{text}, without network, other files or further processes"
    return f"{text}; NOT kept from them on this machine: {', '.join(missing)}"


@functools.lru_cache(maxsize=4096)
def passes(program: str) -> bool:
    """Whether a program comes to its end without an exception, within the limits.

    A program that sets out to deceive its tests may succeed; one that fails, hangs, grows, or ends
    the process before its tests does not.

    Raises:
        UserError: nobody allowed to run programs.
    """
    check_allowed()
    return _run(program) is not None


def _run(program: str, wanted: str = "") -> list[str] | None:
    """Run a program.

    Args:
        program: its text.
        wanted: the name of a list that it leaves; empty: none is looked for.

    Returns:
        That list (nothing where it is not there); ``None``: it did not come to its end.
    """
    token = secrets.token_hex(16)
    job = {
        "program": program,
        "token": token,
        "wanted": wanted,
        "seconds": SECONDS,
        "memory": MEMORY,
        "file_size": FILE_SIZE,
        "readable": sorted({sys.prefix, sys.base_prefix, sys.exec_prefix}),
    }
    # What it says goes into a file: RLIMIT_FSIZE bounds that, and a pipe would fill our memory.
    with (
        tempfile.TemporaryDirectory(prefix="mlx-fd-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as said,
    ):
        process = subprocess.Popen(
            [*_prefix(folder), sys.executable, "-I", "-B", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **_ONE_THREAD},
            # Whatever it begins is ended with it, and a Ctrl-C is for us alone.
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(job).encode(), timeout=_PATIENCE * SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
        said.seek(0)
        return _result(said.read(FILE_SIZE), token)


def _prefix(folder: str) -> list[str]:
    sandbox = shutil.which("sandbox-exec")
    if sandbox is None:
        return []
    return [sandbox, "-p", _SANDBOX.format(folder=os.path.realpath(folder))]


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _result(said: bytes, token: str) -> list[str] | None:
    try:
        found: Any = json.loads(said)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("token") != token:
        return None
    told = found.get("found")
    return [str(one) for one in told] if isinstance(told, list) else None
