"""What was generated once is not generated again: a file per batch, named by all it depends on.

Each carries the digest of all that is in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.files import clear_unfinished, write_with
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import kind_of
from mlx_fd.runs.checked import ChangedFile, content_digest, read_checked, with_digest

Rows = list[dict[str, Any]]


def asked(problems: Iterable[Problem]) -> list[list[Any]]:
    """What a batch's key holds of its problems: each one's kind of answer and its question.

    The kind is what it is called, how a reply is asked for, and its code where that is not ours.
    """
    return [
        [problem.kind, *dataclasses.astuple(kind.form), code_of(kind.read), problem.question]
        for problem in problems
        for kind in [kind_of(problem)]
    ]


def code_of(function: Callable[..., Any]) -> str:
    """What a key says of a function that is registered from outside; empty for our own."""
    own = getattr(function, "__module__", "").partition(".")[0] == __name__.partition(".")[0]
    return "" if own else _file_digest(function)


@functools.cache
def _file_digest(function: Callable[..., Any]) -> str:
    """A digest of the file that a function is in; one of its own where there is no such file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (TypeError, OSError):
        # In a notebook, say. Nobody can tell later whether it is still the same.
        return uuid.uuid4().hex


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


@dataclass(frozen=True)
class Cache:
    """A folder of batches. Several processes may use it at once.

    Attributes:
        folder: need not be there yet.
        warn: called with a sentence about each file that cannot be used.
    """

    folder: Path
    warn: Callable[[str], None] = _warn

    def rows(self, key: dict[str, Any], size: int, make: Callable[[], Rows]) -> Rows:
        """The rows of a batch, made where they are not there.

        A file appears whole or not at all; one that is damaged, or holds another batch, is made
        again.

        Args:
            key: everything that the rows depend on.
            size: how many rows a batch has.
            make: generates the rows; called where the file is not there or damaged.

        Raises:
            UserError: the folder cannot be written.
        """
        name = content_digest(key)
        path = self.folder / name[:2] / f"{name}.json"
        try:
            content, digested = read_checked(path)
            if digested and content["key"] == key and len(content["rows"]) == size:
                kept: Rows = content["rows"]
                return kept
            fault = "it is of another batch, or has no digest"
        except FileNotFoundError:
            fault = ""
        except (ChangedFile, OSError) as error:
            fault = str(error)
        except (TypeError, KeyError):
            fault = "it is no batch"
        if fault:
            self.warn(f"{path}: passed over ({fault}); what it was to hold is generated again")
        rows = make()
        with runs.wrap_write_errors(self.folder, "free some space, or choose another --cache"):
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_unfinished(path.parent)
            text = json.dumps(with_digest({"key": key, "rows": rows}), ensure_ascii=False)
            write_with(path, lambda to: _write(to, text))
        return rows


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
