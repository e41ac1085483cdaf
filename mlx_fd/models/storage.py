"""Where converted models are kept, and directories that appear complete or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.files import clear_unfinished, share, sync_file, sync_folder, working_folder

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# Of the 255 bytes that a file system takes, some are for what stands behind it.
_LONGEST_SLUG = 200


def cache_dir() -> Path:
    """Directory of this user's converted models.

    Returns:
        ``$MLX_FD_CACHE``, else ``$XDG_CACHE_HOME/mlx-fd``, else ``~/.cache/mlx-fd``; it need not
        exist yet.
    """
    if configured := os.environ.get("MLX_FD_CACHE"):
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-fd"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an empty one where there is no file.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    if not path.exists():
        return {}
    if not path.is_file():  # opening a FIFO would wait for ever
        raise UserError(f"{path}: is not a regular file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


@contextmanager
def new_directory(final: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yield an empty directory that becomes ``final`` when the block ends without an error.

    After an error nothing is left behind, and what killed processes left beside it is removed.

    Args:
        final: the directory to make; its parents are made where missing.
        shared: two processes may make the same directory at once, and both write the same thing:
            the first to end wins and the other's work is dropped. Otherwise a directory that came
            meanwhile is an error, unless it is empty.

    Yields:
        A directory beside ``final``, on the same file system.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(final.parent)
    with working_folder(final.parent) as working:
        yield working
        for file in working.rglob("*"):
            if file.is_file():
                sync_file(file)
        share(working)
        try:
            working.rename(final)
        except OSError:
            if not (shared and final.is_dir()):
                raise
        sync_folder(final.parent)


def slug(name: str) -> str:
    """A name made of letters, digits, dots, dashes and underscores; of a long one its end."""
    return _UNSAFE.sub("-", name)[-_LONGEST_SLUG:].strip("-.")
