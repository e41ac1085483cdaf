"""The logs of a run: files of JSON lines that only grow, with a running digest of all in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.files import open_to_append, open_to_read, truncate

_BLOCK = 1 << 20


class Log:
    """A log as far as it is known to be this run's, and appended to from there.

    Attributes:
        path: the file; it is made with its first line.
        size: bytes of it that are known.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()

    @classmethod
    def read(cls, path: Path, size: int) -> Log | None:
        """The first ``size`` bytes of a log; ``None`` where it is shorter."""
        log = cls(path)
        if not size:
            return log
        try:
            with open_to_read(path) as file:
                while log.size < size and (block := file.read(min(_BLOCK, size - log.size))):
                    log._digest.update(block)
                    log.size += len(block)
        except FileNotFoundError:
            return None
        return log if log.size == size else None

    @property
    def sha256(self) -> str:
        """The digest of the known bytes."""
        return self._digest.hexdigest()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as JSON lines and flush them to the disk.

        Raises:
            UserError: something else wrote to the file since the last line.
            OSError: it cannot be written.
        """
        data = "".join(
            json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows
        ).encode()
        with open_to_append(self.path) as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise UserError(
                    f"{self.path}: something else changed this log while the run was writing it. "
                    "Keep other programs away from it, then go on with mlx-fd resume."
                )
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(data)
        self.size += len(data)

    def cut(self) -> None:
        """Cut what the file has after the known bytes."""
        truncate(self.path, self.size)


def log_size(path: Path) -> int:
    """A log's size in bytes; 0 where it is not begun."""
    return path.stat().st_size if path.exists() else 0


def count_lines(path: Path) -> int:
    """How many whole lines a log has; 0 where it is not begun."""
    if not path.exists():
        return 0
    with open_to_read(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))
