"""Whose folder it is: a file of ours in it says what it holds, and no name of any other file does.

The mark is the first that is written into a new folder. A folder that holds something and no mark
of the right kind is somebody's, and is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.files import clear_unfinished, lock, open_in_place, sync_folder

MARK = ".mlx-fd"
RUN, EVALUATION, COMPARISON, ADVANTAGE = "run", "eval", "compare", "advantage"
_HOLDS = {
    RUN: "a run",
    EVALUATION: "an evaluation",
    COMPARISON: "a comparison",
    ADVANTAGE: "an analysis of advantages",
}
_FORMAT = 1
_MAX_BYTES = 1 << 16


def read_mark(folder: Path) -> dict[str, Any]:
    """What a folder's mark says: its ``kind``; empty where there is no mark of ours."""
    try:
        descriptor = os.open(folder / MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return _parsed(file.read(_MAX_BYTES))
    except OSError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if isinstance(found, dict) and found.get("format") == _FORMAT and found.get("kind") in _HOLDS:
        return found
    return {}


def check_free(folder: Path, kind: str, advice: str = "choose another --out") -> None:
    """Make sure that something may be written into a folder, without making it.

    Args:
        folder: it is missing, empty, or has a mark.
        kind: of the mark that it has to have, one of this module's.
        advice: what to do where it has none.

    Raises:
        UserError: it is a file, holds something of another kind, or something that is not ours.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: this link leads nowhere; {advice}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: this is a file, not a folder; {advice}")
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {advice}") from error
    # A mark that a kill left empty is nobody's work.
    if not names or (names == {MARK} and (folder / MARK).lstat().st_size == 0):
        return
    found = read_mark(folder).get("kind")
    if found is None:
        raise UserError(
            f"{folder}: there is something in this folder, and no mark of mlx-fd ({MARK}) says "
            f"that it holds {_HOLDS[kind]}, so it was left alone; {advice}"
        )
    if found != kind:
        raise UserError(
            f"{folder}: this folder holds {_HOLDS[found]}, and {_HOLDS[kind]} is not written into "
            f"it; {advice}"
        )


def write_mark(folder: Path, kind: str) -> None:
    """Mark a folder that :func:`check_free` let through, where it has no mark yet.

    Raises:
        UserError: it has a mark of another kind, or one that is not ours.
        OSError: it cannot be written.
    """
    with _marked(folder, kind):
        pass


@contextlib.contextmanager
def claimed(folder: Path, kind: str, advice: str = "choose another --out") -> Iterator[None]:
    """Make a folder ours, and hold it so that no other process of ours writes into it.

    Raises:
        UserError: it is not ours, another process holds it, or it cannot be written.
    """
    check_free(folder, kind, advice)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_marked(folder, kind, wait=False))
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another mlx-fd process is writing into this folder; wait for it, stop "
                f"it, or {advice}"
            ) from error
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); {advice}") from error
        clear_unfinished(folder)
        yield


@contextlib.contextmanager
def claimed_for_later(folder: Path, kind: str) -> Iterator[None]:
    """:func:`claimed`, where what is written comes after hours of work: it is tried at once.

    Raises:
        UserError: as there.
    """
    with claimed(folder, kind):
        try:
            # Permissions do not tell of a file system that is read-only.
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); choose another --out"
            ) from error
        yield


@contextlib.contextmanager
def _marked(folder: Path, kind: str, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder's mark, which is written where there is none."""
    descriptor = open_in_place(folder / MARK, os.O_RDWR | os.O_CREAT)
    try:
        lock(descriptor, wait=wait)
        content = os.read(descriptor, _MAX_BYTES)
        if not content:
            mark = json.dumps({"kind": kind, "format": _FORMAT}) + "\n"
            # One call: a kill leaves all of it or nothing.
            os.write(descriptor, mark.encode())
            os.fsync(descriptor)
            sync_folder(folder)
        elif _parsed(content).get("kind") != kind:
            raise UserError(f"{folder / MARK}: this is no mark of {_HOLDS[kind]}; move it away")
        yield
    finally:
        os.close(descriptor)
