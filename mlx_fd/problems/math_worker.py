"""Compares formulas in a process of its own, which can be stopped and may not grow.

Reading ``9^{9^{9^9}}`` would take all memory, and no handler of a signal interrupts it. So the
process has a limit of memory, and each comparison one of processor time, which is the same however
busy the machine is; formulas that reach either are called different.

Run as a program, this module is that process: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError

_SECONDS = 5.0  # of processor time
# How many times as long, by the clock, is waited for a process that gets no processor.
_PATIENCE = 24
_START_SECONDS = 60.0
_BYTES = 4 << 30


class _Worker:
    """The process, begun when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, final: str) -> bool | None:
        """Whether two formulas mean the same; ``None``: that took too long or too much.

        Raises:
            UserError: no two formulas can be compared, as the process does not begin.
        """
        if self._process is None or self._process.poll() is not None:
            # Twice: what took too long on a busy machine is in its memory then.
            for _ in range(2):
                self._begin()
                # It says so when it has imported SymPy, which takes longer than a comparison may.
                if self._line(_START_SECONDS):
                    break
                self.end()
            else:
                raise UserError(
                    "no formulas can be compared, as the process that compares them does not "
                    "begin: see what `python -m mlx_fd.problems.math_worker` says"
                )
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps([gold, final]).encode() + b"\n")
            process.stdin.flush()
            line = self._line(_PATIENCE * _SECONDS)
        except BrokenPipeError:
            line = b""
        if not line:
            self.end()
            return None
        return bool(json.loads(line))

    def _line(self, seconds: float) -> bytes:
        """What the process says next; nothing where it ended, or says nothing for so long."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else b""

    def _begin(self) -> None:
        self.end()
        # -P: no module of the folder that the user is in; but the package itself must be found.
        root = str(Path(__file__).parents[2])
        search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlx_fd.problems.math_worker", str(_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search},
            # A Ctrl-C is for the run, which still wants its answers.
            start_new_session=True,
        )

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        self._process = None


_worker = _Worker()
atexit.register(_worker.end)


@functools.lru_cache(maxsize=4096)
def same(gold: str, final: str) -> bool:
    """Whether two formulas mean the same, as math-verify reads LaTeX.

    Args:
        gold: the right one.
        final: the other; which is which matters to math-verify for inequalities and units.

    Returns:
        False, too, where that cannot be told in five seconds of processor time and four gigabytes.

    Raises:
        UserError: nothing can be compared on this machine.
    """
    return bool(_worker.ask(gold, final))


def _compare(gold: str, final: str) -> bool:
    import math_verify

    config = [math_verify.LatexExtractionConfig()]

    def read(text: str) -> Any:
        # No signals: the deadline is the other process's.
        return math_verify.parse(f"${text}$", extraction_config=config, parsing_timeout=None)

    return bool(math_verify.verify(read(gold), read(final), timeout_seconds=None))


def main() -> None:
    """Answer lines ``[gold, final]`` with true or false until there are no more."""
    import resource
    import signal

    seconds = float(sys.argv[1]) if sys.argv[1:] else _SECONDS
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of memory
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    sys.stdout.write(json.dumps(_compare("1", "1")) + "\n")  # which makes the imports
    sys.stdout.flush()
    for line in sys.stdin:
        gold, final = json.loads(line)
        # By default this signal ends the process, in the middle of a power too.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = _compare(gold, final)
        except (Exception, MemoryError):
            # Whatever a stranger's formula does to a parser, it is not the right answer.
            answer = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
