"""Problems that are kept to be learned from: what the expert had to answer, and corrections.

A file of JSON lines that `mlx-fd loop --problems` reads: ``question``, ``answer`` (a solution with
its final answer), ``id``, ``kept`` (why) and ``time``. It is the user's: it may be read, edited or
deleted at any time.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mlx_fd.files import append_lines, open_to_read, write_atomic
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import read_final

EXPERT, CORRECTION = "expert", "correction"


class Kept:
    """A file of at most so many problems, the newest; used by one thread at a time."""

    def __init__(self, path: Path, most: int, kind: str):
        """A file that need not be there.

        Args:
            path: where it is.
            most: problems that it holds; the oldest go first.
            kind: of the answers, as the student was trained on.

        Raises:
            UserError: there is something else in its place.
        """
        self.path, self._most, self._kind = path, most, kind
        self.rows()

    def rows(self) -> list[dict[str, Any]]:
        """What is kept, the oldest first; lines that are none are left out."""
        if not self.path.exists():
            return []
        with open_to_read(self.path) as file:
            lines = file.read().decode("utf-8", "replace").split("\n")
        found = []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("question"), str):
                found.append(row)
        return found

    def final(self, question: str, answer: str) -> str | None:
        """The final answer in a solution; ``None`` where none can be read."""
        return read_final(answer, Problem("", question, "", "", kind=self._kind))

    def add(self, question: str, answer: str, why: str) -> bool:
        """Keep a problem; whether its answer can be read and it is kept.

        A question is kept once; a correction takes the place of what the expert said, and not the
        other way round.
        """
        if self.final(question, answer) is None:
            return False
        rows, key = self.rows(), " ".join(question.split())
        same = [row for row in rows if " ".join(row["question"].split()) == key]
        if why == EXPERT and same:
            return False
        row = {
            "id": "kept-" + hashlib.sha256(key.encode()).hexdigest()[:16],
            "question": question,
            "answer": answer,
            "kept": why,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if same or len(rows) >= self._most or not self._is_ended():
            left = [one for one in rows if one not in same]
            self._write([*left, row][-self._most :])
        else:
            append_lines(self.path, [row])
        return True

    def _is_ended(self) -> bool:
        """Whether another line can be put behind the last: somebody may have edited the file."""
        if not self.path.exists() or not self.path.stat().st_size:
            return True
        with open_to_read(self.path) as file:
            file.seek(-1, os.SEEK_END)
            return bool(file.read(1) == b"\n")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
