"""Standard output and error that outlive their reader: a closed pipe ends no run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)


class _Lasting(io.FileIO):
    """A file that takes what is written after its reader is gone, and drops it."""

    def write(self, data: Any) -> int:
        """As of any file, but for ``| head`` and for a terminal that was closed."""
        try:
            return super().write(data) or 0
        except OSError as error:
            # A closed terminal cannot be asked whether it is one; a disk that fails is a file.
            gone = (errno.EPIPE,) if stat.S_ISREG(os.fstat(self.fileno()).st_mode) else _GONE
            if error.errno not in gone:
                name = "standard output" if self.fileno() == 1 else "standard error"
                raise OSError(error.errno, error.strerror, name) from error
        # From here on for all who write there, child processes too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(memoryview(data).cast("B"))


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let everything be printed through files that drop what nobody reads any more.

    A character that a terminal cannot show is replaced: it is no reason to end a run either. A
    stream that was closed before the start (``>&-``) takes everything and drops it.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk, which was said already
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed() -> None:
    """Open the standard streams that this process was started without.

    Otherwise the next file that is opened has the number of one, and what a library or a child
    process prints goes into it.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _lasting(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="replace")
    # With PYTHONUNBUFFERED the buffer is the file itself.
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
        return stream  # what a test put there
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering or stream.write_through,
    )
