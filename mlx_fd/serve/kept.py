"""Problems that are kept to be learned from: what the expert had to answer, and corrections.

A file of JSON lines that `mlx-fd loop --problems` reads: ``question``, ``choices`` where there are
any, ``answer`` (the final one), ``solution`` (the reply), ``id``, ``kept`` (why) and ``time``.
Earlier versions had the reply in ``answer``. It is the user's: it may be read, edited or deleted at
any time, and may have lines of the user's own, which are left as they are.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.feedback.tutoring import as_asked
from mlx_fd.files import append_lines, open_to_append, open_to_read, replacing
from mlx_fd.problems.columns import COLUMNS
from mlx_fd.problems.kinds import KINDS, is_right, read_final
from mlx_fd.problems.kinds.choice import listed
from mlx_fd.problems.questions import question_key
from mlx_fd.problems.rows import problem_of

EXPERT, CORRECTION = "expert", "correction"


class Kept:
    """A file with at most so many kept problems, the newest; used by one thread at a time."""

    def __init__(self, path: Path, most: int, kind: str):
        """A file that need not be there; it is made, so that what is to be kept can be.

        Args:
            path: where it is.
            most: problems that are kept in it; the oldest of them go first.
            kind: of the answers, as the student was trained on.

        Raises:
            UserError: it cannot be read and written, there is something else in its place, or no
                loop could learn from such answers.
        """
        _check_kind(path, kind)
        self.path, self._most, self._kind = path, most, kind
        try:
            with open_to_append(path):
                self.rows()
            # A line is taken out by way of a new file beside this one.
            allowed = os.access(path.parent, os.W_OK | os.X_OK)
            why = "" if allowed else "its folder cannot be written"
        except OSError as error:
            why = error.strerror or type(error).__name__
        if why:
            raise UserError(
                f"{path}: problems cannot be kept there ({why}); name a file in a folder that "
                "is there and can be written"
            )

    def rows(self) -> list[dict[str, Any]]:
        """What was kept, the oldest first; the user's own lines are left out."""
        return [row for _, row in self._lines() if _is_kept(row)]

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Each line as it is, and its row; an empty one where it has none."""
        if not self.path.exists():
            return []
        with open_to_read(self.path) as file:
            return [(line, _row(line)) for line in file]

    def final(self, question: str, answer: str) -> str | None:
        """The final answer in a solution; ``None`` where none can be read, or no loop reads it."""
        row = self._row_of(question, answer)
        return None if row is None else str(row["answer"])

    def _row_of(self, question: str, answer: str) -> dict[str, Any] | None:
        """The columns by which a loop has the same problem, with the same answer."""
        asked = as_asked(question, self._kind)
        final = read_final(answer, asked)
        if final is None:
            return None
        row: dict[str, Any] = {"question": question, "answer": final, "solution": answer}
        if asked.choices:
            stem = _stem(question, asked.choices)
            row = {**row, "question": stem, "choices": list(asked.choices)}
        try:
            found = problem_of(row, self._kind)
        except ValueError:
            return None
        same = question_key(found.question) == question_key(question) and is_right(final, found)
        return row if same else None

    def add(self, question: str, answer: str, why: str) -> bool:
        """Keep a problem; whether its answer can be read and it is kept.

        A question is kept once; a correction takes the place of what the expert said, and not the
        other way round. No line goes that was not kept by a server.
        """
        columns = self._row_of(question, answer)
        if columns is None:
            return False
        lines, key = self._lines(), question_key(question)
        asked = [_asked(row) for _, row in lines]
        if why == EXPERT and key in asked:
            return False
        row = {
            "id": "kept-" + hashlib.sha256(key.encode()).hexdigest()[:16],
            **columns,
            "kept": why,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        places = [place for place, (_, one) in enumerate(lines) if _is_kept(one)]
        others = [place for place in places if asked[place] != key]
        left = others[max(0, len(others) + 1 - self._most) :]
        is_ended = not lines or lines[-1][0].endswith(b"\n")
        if is_ended and left == places:
            append_lines(self.path, [row])
            return True
        gone = set(places) - set(left)
        stay = [line for place, (line, _) in enumerate(lines) if place not in gone]
        self._write(stay, json.dumps(row, ensure_ascii=False).encode())
        return True

    def _write(self, lines: list[bytes], new: bytes) -> None:
        """Put lines, and a new one behind them, in the file's place; who may read it stays."""
        if lines and not lines[-1].endswith(b"\n"):  # somebody edited the file
            lines = [*lines, b"\n"]
        with replacing(self.path) as file:
            os.fchmod(file.fileno(), stat.S_IMODE(self.path.stat().st_mode))
            file.writelines([*lines, new, b"\n"])


def _check_kind(path: Path, kind: str) -> None:
    """Refuse answers that say too little to learn from.

    Raises:
        UserError: they are programs, whose tests no request has, or none of them is right or wrong.
    """
    why = ""
    if kind == "code":
        why = "the student's answers are programs, and requests come without their tests"
    elif not KINDS[kind].graded:
        why = f"the student's answers are of the kind {kind}, of which none can be read as right"
    if why:
        raise UserError(
            f"--keep {path}: {why}, so that no loop could learn from them; leave --keep out"
        )


def _stem(question: str, choices: Sequence[str]) -> str:
    """A question without the choices below it."""
    lines = question.rstrip().splitlines()
    return "\n".join(lines[: len(lines) - len(choices)])


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _is_kept(row: dict[str, Any]) -> bool:
    """Whether a server wrote it, not the user."""
    return isinstance(row.get("question"), str) and row.get("kept") in (EXPERT, CORRECTION)


def _asked(row: dict[str, Any]) -> str | None:
    """What tells a row's question, under any name that a column of questions has."""
    found = (row[name] for name in COLUMNS["question"] if isinstance(row.get(name), str))
    text, choices = next(found, None), row.get("choices")
    if text is None:
        return None
    if isinstance(choices, list) and all(isinstance(one, str) for one in choices):
        text = listed(text, choices)  # one and the same question may be asked of several choices
    return question_key(text)
