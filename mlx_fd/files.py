"""Writing files so that nothing is ever half there, and nothing is written through a link.

A file is written under a temporary name that nobody can guess, flushed to the disk and then
renamed: a link in its place is replaced, not followed. Where a file grows or shrinks in place, it
has to be an ordinary one. What is being written is locked, so that the left-overs of killed
processes can be told from it and removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_fd.errors import UserError

_UNFINISHED = re.compile(r"\.tmp-[0-9a-f]{16}(\.[A-Za-z0-9]{1,16})?")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_with(path: Path, write: Callable[[Path], None]) -> str:
    """Let something that writes files itself write one, atomically.

    Args:
        path: where the file shall be.
        write: writes it to the path it is given, which has the same suffix.

    Returns:
        The file's SHA-256.
    """
    suffix = path.suffix if _SUFFIX.fullmatch(path.suffix) else ""
    temporary, descriptor = _new_file(path.parent, suffix)
    try:
        write(temporary)
        sync_file(temporary)
        digest = digest_of(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)
    sync_folder(path.parent)
    return digest


def failed_write(error: OSError | RuntimeError) -> str | None:
    """Why a write failed, in words; ``None`` where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # MLX reports a failed write of weights this way, and only this way.
    said = str(error).lower()
    return str(error) if "write" in said or "open" in said else None


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes a path's place when the block ends without an error.

    It is on the disk then. After an error what was there before is untouched.

    A link is replaced, and not followed.

    Raises:
        UserError: there is a pipe or a device in the file's place.
    """
    if not path.is_symlink() and not path.is_dir():
        check_replaceable(path)
    temporary, descriptor = _new_file(path.parent, "")
    file = os.fdopen(descriptor, "wb")
    try:
        yield file
        file.flush()
        os.fsync(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        # What could not be written is lost already, and that error is on its way.
        with contextlib.suppress(OSError):
            file.close()
    sync_folder(path.parent)


def check_replaceable(path: Path) -> None:
    """Make sure that nothing but an ordinary file is lost where a new one takes its place.

    Raises:
        UserError: there is a link, a pipe, a device or a folder.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _is_no_file(path)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows as JSON lines and flush them to the disk.

    Returns:
        The file's size in bytes afterwards.

    Raises:
        UserError: there is a link, a pipe or a device in the file's place.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with open_to_append(path) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def open_to_append(path: Path) -> BinaryIO:
    """Open an ordinary file in order to append to it; it is made where it is missing.

    Raises:
        UserError: there is a link, a pipe or a device in the file's place.
    """
    return os.fdopen(_open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def truncate(path: Path, size: int) -> None:
    """Cut a file to a size in bytes.

    Raises:
        UserError: there is a link, a pipe or a device in the file's place.
    """
    descriptor = _open_own(path, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_in_place(path: Path, flags: int) -> int:
    """Open an ordinary file in order to lock it or to change it where it is.

    Args:
        path: the file.
        flags: of :func:`os.open`.

    Returns:
        The descriptor.

    Raises:
        UserError: there is a link, a pipe or a device in the file's place.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise _is_no_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _is_no_file(path)
    return descriptor


def _open_own(path: Path, flags: int) -> int:
    """As :func:`open_in_place`; a file that has another name somewhere is replaced by a copy first.

    Behind the other name may be a backup, or somebody's file.
    """
    descriptor = open_in_place(path, flags)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        with open_to_read(path) as old, replacing(path) as new:
            shutil.copyfileobj(old, new, 1 << 20)
        descriptor = open_in_place(path, flags)
    return descriptor


def open_to_read(path: Path) -> BinaryIO:
    """Open an ordinary file, or a link to one, for reading; it never waits.

    Raises:
        UserError: it is a pipe, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _is_no_file(path)
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """An ordinary file's text, in UTF-8; it never waits.

    Raises:
        UserError: it is a pipe, a device or a folder.
    """
    with open_to_read(path) as file:
        return file.read().decode("utf-8")


def _is_no_file(path: Path) -> UserError:
    return UserError(
        f"{path}: this is not a regular file (but a link, a pipe, a device or a folder), and "
        "mlx-fd does not write or read it; move it away"
    )


def digest_of(path: Path) -> str:
    """A file's SHA-256."""
    with open_to_read(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with open_to_read(path) as file:
        os.fsync(file.fileno())


def subfolder(folder: Path, *names: str) -> Path:
    """A folder within one of ours, made where it is missing.

    Raises:
        UserError: a part of the way there is a link, which may lead out of the folder.
    """
    path = check_way(folder, *names)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_way(folder: Path, *names: str) -> Path:
    """Make sure that no part of the way from a folder of ours to one within is a link.

    Returns:
        The folder within, which need not be there.

    Raises:
        UserError: a part is a link, which may lead out of the folder.
    """
    path = folder
    for name in names:
        path = path / name
        if path.is_symlink():
            raise UserError(
                f"{path}: this is a link, and nothing is written through a link in a folder of "
                f"mlx-fd; put a folder in its place, or use another one than {folder}"
            )
    return path


# ------------------------------------------------------------------------------------- unfinished


@contextlib.contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder that only this user can open, for what becomes something else at the end.

    What is in it then is removed, and so is the folder, unless it was renamed.
    """
    path, descriptor = _new_folder(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def share(folder: Path) -> None:
    """Give a :func:`working_folder` the permissions that any new folder of this process gets."""
    new = _unfinished(folder)
    new.mkdir()
    mode = new.stat().st_mode
    new.rmdir()
    folder.chmod(stat.S_IMODE(mode))


def point(link: Path, target: str) -> None:
    """Make a symbolic link point to another target, atomically."""
    with working_folder(link.parent) as working:
        (working / "link").symlink_to(target)
        (working / "link").replace(link)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder.

    What a process is still writing is locked, and stays.
    """
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if _UNFINISHED.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    _remove_unused(path)


def _remove_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
    finally:
        os.close(descriptor)


def _unfinished(folder: Path, suffix: str = "") -> Path:
    return folder / f".tmp-{secrets.token_hex(8)}{suffix}"


def _new_file(folder: Path, suffix: str) -> tuple[Path, int]:
    """An empty temporary file of a new name, open and locked."""
    while True:
        path = _unfinished(folder, suffix)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
        if _locked(path, descriptor):
            return path, descriptor


def _new_folder(parent: Path) -> tuple[Path, int]:
    """An empty private folder of a new name, open and locked."""
    while True:
        path = _unfinished(parent)
        path.mkdir(mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            if _locked(path, descriptor):
                return path, descriptor


def lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock an open file or folder, for as long as it is open, where its file system has locks.

    Where it has none, :func:`clear_unfinished` takes nothing for a left-over.

    Raises:
        BlockingIOError: another one holds it, and this is not to ``wait``.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass


def _locked(path: Path, descriptor: int) -> bool:
    """Lock what was just made; false where it was taken for a left-over before that, and closed."""
    lock(descriptor)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(descriptor)):
            return True
    os.close(descriptor)
    return False
