"""What was generated once is not generated again: a file per batch, named by all it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.files import clear_unfinished, write_with

Rows = list[dict[str, Any]]


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can write; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of batches. Several processes may use it at once.

    Attributes:
        folder: need not be there yet.
    """

    folder: Path

    def rows(self, key: dict[str, Any], size: int, make: Callable[[], Rows]) -> Rows:
        """The rows of a batch, made where they are not there.

        A file appears whole or not at all; one that is damaged, or holds another batch, is made
        again.

        Args:
            key: everything that the rows depend on.
            size: how many rows a batch has.
            make: generates them.

        Raises:
            UserError: the folder cannot be written.
        """
        name = digest(key)
        path = self.folder / name[:2] / f"{name}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == key and len(found["rows"]) == size:
                rows: Rows = found["rows"]
                return rows
        except (OSError, ValueError, TypeError, KeyError):
            pass
        rows = make()
        with runs.explained(self.folder, "free some space, or choose another --cache"):
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_unfinished(path.parent)
            text = json.dumps({"key": key, "rows": rows}, ensure_ascii=False)
            write_with(path, lambda to: _write(to, text))
        return rows


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
