"""A file of answers judged into another file, whole or not at all.

What is judged so far stands in ``OUT.partial``, whose first line says of what: the same command
goes on after it, another one is refused. At the end it becomes ``OUT`` at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import runs
from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.feedback.judge import Judge, Judgement, ModelRef, adapter_hash
from mlx_fd.files import (
    append_lines,
    check_replaceable,
    lock,
    open_in_place,
    open_to_read,
    truncate,
    write_atomic,
)
from mlx_fd.models.fingerprint import content_hash
from mlx_fd.problems.files import AnswerFile
from mlx_fd.runs.checked import content_digest

COLUMNS = ("head_score", "written_score", "readable", "feedback")
RESERVED = (*COLUMNS, "thought")
"""Names that judging may write, and no row to judge may have."""


def judged_columns(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON has it: scores with four decimals, ``None`` where there is none.

    ``readable`` says whether a score could be read in the text; ``head_score`` is there for a
    student only, ``thought`` where something was thought.
    """
    head = judgement.head_score
    return {
        **({} if head is None else {"head_score": round(head, 4)}),
        "written_score": judgement.written_score,
        "readable": judgement.written_score is not None,
        "feedback": judgement.text,
        **({"thought": judgement.thought} if judgement.thought else {}),
    }


def partial_of(out: Path) -> Path:
    """Where the rows stand until all are judged."""
    return out.with_name(f"{out.name}.partial")


def check_out_file(out: Path, source: Path, *, overwrite: bool) -> None:
    """Make sure that a file can be written, before anything is loaded.

    Raises:
        UserError: it is there already and is not to be overwritten, is the file that is read, is
            no ordinary file, or has no folder.
    """
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it")
    check_replaceable(out)
    if not out.exists():
        return
    if out.samefile(source):
        raise UserError(f"{out} is the file of answers itself; choose another --out")
    if not overwrite:
        raise UserError(f"{out} is there already; choose another --out, or say --overwrite")


@dataclass(frozen=True)
class Judging:
    """How the answers of a file are judged.

    Attributes:
        max_tokens: most tokens of a criticism.
        batch_size: criticisms that are written side by side.
        temperature: of the sampling; 0 is greedy.
    """

    max_tokens: int
    batch_size: int
    temperature: float = 0.0


def judge_file(
    judge: Callable[[], Judge],
    ref: ModelRef,
    answers: AnswerFile,
    out: Path,
    how: Judging,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Judge a file's answers.

    Args:
        judge: loads the judge; called where something is left to judge.
        ref: what it loads.
        answers: the file's rows.
        out: where to write them, each with :data:`COLUMNS`, as JSON lines.
        how: lengths, batch size and temperature.
        on_progress: called with the number of answers judged so far.

    Returns:
        The rows of ``out``.

    Raises:
        UserError: ``OUT.partial`` is of another judging, or of another process; or nothing can be
            written.
    """
    header = {"judge": _fingerprint(ref), "answers": answers.sha256, "max_tokens": how.max_tokens}
    if ref.thinking.on:
        header["max_thinking_tokens"] = ref.thinking.limit
    if how.temperature:
        # What is drawn depends on where a batch begins.
        header["temperature"], header["batch_size"] = how.temperature, how.batch_size
    partial = partial_of(out)
    with runs.wrap_write_errors(out, "free some space; the same command goes on."), _held(partial):
        together = how.batch_size if how.temperature else 1
        rows = _continued(partial, header, answers, together)
        on_progress(len(rows))
        judging = judge() if len(rows) < len(answers.rows) else None
        while judging is not None and len(rows) < len(answers.rows):
            part = slice(len(rows), len(rows) + how.batch_size)
            pairs = zip(answers.problems[part], answers.answers[part], strict=True)
            found = judging.judge(pairs, **dataclasses.asdict(how), first=len(rows))
            new = [
                {**row, **judged_columns(judgement)}
                for row, judgement in zip(answers.rows[part], found, strict=True)
            ]
            append_lines(partial, new)
            rows += new
            on_progress(len(rows))
        write_atomic(out, "".join(_line(row) for row in rows))
        partial.unlink(missing_ok=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _fingerprint(ref: ModelRef) -> str:
    run = ref.config or Config()
    adapter = None if ref.adapter_folder is None else adapter_hash(ref.adapter_folder, run)
    template = None if ref.template is None else ref.template.digest()
    asked: list[Any] = [ref.answer_kind, run.models.dequantize]
    if ref.head is not None:
        asked += [ref.head.weight.tolist(), ref.head.bias.tolist(), dict(ref.head.about)]
    return content_digest([content_hash(ref.model), adapter, template, *asked])


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Hold the file of rows, so that no other process writes it; it is made where it is missing."""
    descriptor = open_in_place(partial, os.O_RDWR | os.O_CREAT)
    try:
        try:
            lock(descriptor, wait=False)
        except BlockingIOError as error:
            raise UserError(
                f"{partial}: another mlx-fd process is writing this file; wait for it or stop it"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _continued(
    partial: Path, header: dict[str, Any], answers: AnswerFile, together: int
) -> list[dict[str, Any]]:
    """The rows judged so far; from one on that is half there, or of another answer, they are cut.

    Args:
        partial: where they are.
        header: its first line.
        answers: what is judged.
        together: rows of a batch; of one that is not whole nothing is left.

    Raises:
        UserError: they are of another judging, or the file is none of ours.
    """
    first = _line(header).encode()
    with open_to_read(partial) as file:
        content = file.read()
    if first.startswith(content):  # a kill left all, some or nothing of it
        truncate(partial, 0)
        append_lines(partial, [header])
        return []
    if not content.startswith(first):
        raise UserError(
            f"{partial} is of another model, another file of answers, or other options (--tokens, "
            "--temperature, --max-thinking-tokens; --batch-size where tokens are drawn): finish "
            "that first, delete it, or choose another --out"
        )
    rows: list[dict[str, Any]] = []
    lines = content[len(first) :].splitlines(keepends=True)[: len(answers.rows)]
    for line, answer in zip(lines, answers.rows, strict=False):
        row = _judged_row(line, answer)
        if row is None:
            break
        rows.append(row)
    if len(rows) < len(answers.rows):
        del rows[len(rows) // together * together :]
    truncate(partial, len(first) + sum(map(len, lines[: len(rows)])))
    return rows


def _judged_row(line: bytes, given: dict[str, Any]) -> dict[str, Any] | None:
    """What a line says of a row of the file of answers; ``None`` where it is no such line."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not row.keys() >= {*given, *COLUMNS[1:]}:
        return None
    return row if {name: row[name] for name in given} == given else None
