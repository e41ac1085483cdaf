"""Runs one program that a model wrote, after giving up whatever it may not have.

Run as a program by itself (``python -I program_worker.py``), so that it imports nothing but the
standard library. It reads a job as JSON, isolates itself as far as it is let, runs the program, and
writes the job's token, which the program does not know, where that came to its end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any

# linux/sched.h, linux/prctl.h, sys/mount.h, linux/landlock.h
_NEW_NS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    *(0x00020000, 0x08000000, 0x10000000),
    *(0x20000000, 0x40000000),
)
_PRIVATE = 0x40000 | 0x4000
_PARENT_DIES, _NO_NEW_PRIVILEGES = 1, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE = 1 << 2
_READ = 1 << 0 | _READ_FILE | 1 << 3  # execute, read files and folders
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc")
_DEVICES = ("/dev/null", "/dev/urandom")
# linux/seccomp.h: of each machine its mark, and the calls for new processes, for signals to others
# and for sockets; then shared memory, tracing, new sessions, queued signals, limits and memory of
# other processes, and io_uring, which can do what other calls may not.
_FILTER, _ALLOW, _REFUSE = 2, 0x7FFF0000, 0x00050001
_SET_SECCOMP = 22
_REFUSED = {
    "x86_64": (
        0xC000003E,
        (
            *(56, 57, 58, 59, 322, 435, 62, 200, 234, 424, 41),
            *(29, 101, 109, 112, 129, 297, 302, 310, 311, 425),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(220, 221, 281, 435, 129, 130, 131, 424, 198),
            *(117, 138, 154, 157, 194, 240, 261, 270, 271, 425),
        ),
    ),
}
# Rights on files that each version of Landlock knows.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}


def main() -> None:
    """Read the job, run its program, say how that ended."""
    job = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    _isolate(job)
    _limit(job)
    _close_others(answer)
    _stay_alone()
    # Not __main__, so that what a reply has for when it is run by itself is left alone; a module,
    # so that dataclasses and pickle find what it defines.
    program = sys.modules["program"] = types.ModuleType("program")
    exec(compile(job.pop("program"), "program", "exec"), vars(program))
    found = vars(program).get(job["wanted"], [])
    os.write(answer, json.dumps({"token": job["token"], "found": found}).encode())
    # Not at the mercy of what the program left to be done at the end.
    os._exit(0)


def _isolate(job: dict[str, Any]) -> None:
    """Leave the network, other processes and other files, where the system lets us."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    own = os.getuid(), os.getgid()
    spaces = _NEW_NET | _NEW_PID | _NEW_IPC | _NEW_NS
    # With a user namespace no privilege outside of it is left; root may need none.
    inside = libc.unshare(_NEW_USER | spaces) == 0
    if inside:
        with contextlib.suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
        with contextlib.suppress(OSError):
            Path("/proc/self/uid_map").write_text(f"{own[0]} {own[0]} 1")
            Path("/proc/self/gid_map").write_text(f"{own[1]} {own[1]} 1")
    if inside or libc.unshare(spaces) == 0:
        # The first process of a space: with it all others end.
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        libc.prctl(_PARENT_DIES, signal.SIGKILL, 0, 0, 0)
        # All files in the folder together stay as small as one may be.
        folder = str(Path.cwd()).encode()
        libc.mount(b"none", b"/", None, _PRIVATE, None)
        size = f"size={4 * job['file_size']}".encode()
        if libc.mount(b"tmpfs", folder, b"tmpfs", 0, size) == 0:
            os.chdir(folder)
    _keep_to(libc, job["readable"])


def _keep_to(libc: Any, readable: list[str]) -> None:
    """With Landlock: write in this folder alone, read what Python is made of alone."""
    version = libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    every = (1 << _RIGHTS.get(version, 16)) - 1
    rights = struct.pack("Q", every)
    rules = libc.syscall(_CREATE_RULESET, rights, len(rights), 0)
    if rules < 0:
        return
    for path in (*readable, *_SYSTEM, *_DEVICES, "."):
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = every if path == "." else _READ_FILE if path in _DEVICES else _READ
            libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    libc.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _limit(job: dict[str, Any]) -> None:
    """Limits of time, memory, file size, open files and processes; hard ones."""
    limits = {
        "RLIMIT_CPU": job["seconds"],
        "RLIMIT_AS": job["memory"],
        "RLIMIT_DATA": job["memory"],
        "RLIMIT_FSIZE": job["file_size"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
    }
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (most, most))
    # A file that grows too large is an error of the program, not its end.
    with contextlib.suppress(AttributeError):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _stay_alone() -> None:
    """With seccomp: no further processes, no signals to others, no sockets."""
    found = _REFUSED.get(os.uname().machine)
    libc = ctypes.CDLL(None, use_errno=True)
    if found is None or not hasattr(libc, "prctl"):
        return
    machine, calls = found
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, machine), (0x06, 0, 0, _REFUSE), (0x20, 0, 0, 0)]
    lines += [(0x35, len(calls) + 1, 0, 0x40000000)]  # calls of x32 have other numbers
    lines += [(0x15, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    lines += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("@HP", len(lines), ctypes.addressof(code))
    libc.prctl(_SET_SECCOMP, _FILTER, program, 0, 0)


def _close_others(kept: int) -> None:
    """Close what was open but the answer's pipe."""
    for low, high in ((3, kept), (kept + 1, 64)):
        os.closerange(low, high)


if __name__ == "__main__":
    main()
