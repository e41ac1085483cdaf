"""Solved problems before each question (few-shot): the first of the source's train split."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import is_right, read_final
from mlx_fd.problems.questions import question_key
from mlx_fd.registry import SOURCES

_SPLIT = "train"


def examples(
    source: str,
    split: str,
    count: int,
    *,
    asked: Collection[str] = (),
    kind: str = "auto",
    columns: str = "",
) -> str:
    """What stands before each question; empty for no examples.

    Args:
        source: of the problems, as :func:`mlx_fd.problems.load` takes it.
        split: which of them are asked.
        count: how many examples: the first of the train split whose solution ends in its answer.
        asked: questions of that other split; one that the train split has, too, is no example.
        kind: of the answers.
        columns: as for a run.

    Raises:
        UserError: the source has no other split to take them from, or too few solutions.
    """
    if not count:
        return ""
    is_file = source not in SOURCES and Path(source).expanduser().is_file()
    parts = problems.split_parts(split)
    if is_file or any(part == "all" or part.startswith(_SPLIT) for part in parts):
        raise UserError(
            f"--shots takes its examples from the train split of the problems' source, and of "
            f"{source} all is evaluated; leave --shots out, or choose another --split"
        )
    found = problems.load(source, _SPLIT, kind=kind, columns=columns, skip_bad_rows=True)
    keys = {question_key(question) for question in asked}
    others = (one for one in found.problems if question_key(one.question) not in keys)
    taken = list(itertools.islice(_solved(others), count))
    if len(taken) < count:
        raise UserError(
            f"--shots {count}: {source}, split {_SPLIT}, has {len(taken)} solutions that end in "
            "their answers"
        )
    solved = [f"Problem: {one.question.strip()}\n\n{one.solution.strip()}" for one in taken]
    return "\n\n".join([*solved, "Problem: "])


def _solved(found: Iterator[Problem]) -> Iterator[Problem]:
    return (one for one in found if one.solution and is_right(read_final(one.solution, one), one))
