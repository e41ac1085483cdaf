"""Writing files so that nothing is ever half there.

A file is written under a temporary name, flushed to the disk and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

UNFINISHED = ".tmp-"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_with(path: Path, write: Callable[[Path], None]) -> str:
    """Let something that writes files itself write one, atomically.

    Args:
        path: where the file shall be.
        write: writes it to the path it is given, which has the same suffix.

    Returns:
        The file's SHA-256.
    """
    # Another process may be writing the same file.
    temporary = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    try:
        write(temporary)
        sync_file(temporary)
        digest = digest_of(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return digest


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Append rows as JSON lines and flush them to the disk.

    Returns:
        The file's size in bytes afterwards.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def digest_of(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
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
    with path.open("rb") as file:
        os.fsync(file.fileno())
