r"""ProcessBench (Zheng et al., arXiv 2412.06559): who finds the first wrong step of a solution?

A solution is a list of steps; its label is the index from 0 of the first wrong one, or -1. A critic
names an index in its last ``\boxed{}``. All shares here are from 0 to 1; the paper prints per cent.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.evaluation.statistics import (
    Rows,
    mean,
)
from mlx_fd.problems.files import json_rows
from mlx_fd.runs.summary import wilson

ALL_RIGHT = -1
_FIELDS: dict[str, type] = {
    "id": str,
    "generator": str,
    "problem": str,
    "steps": list,
    "final_answer_correct": bool,
    "label": int,
}
_KINDS = {str: "text", list: "a list", bool: "true or false", int: "a whole number"}
_BOXED = re.compile(r"\\boxed\{([^}]*)\}")


@dataclass(frozen=True)
class Item:
    """A solution to judge; the fields are those of ProcessBench's files.

    Attributes:
        id: unique in its file.
        generator: what wrote the solution.
        problem: the question.
        steps: the solution.
        final_answer_correct: whether its last number is right, which a wrong step may not prevent.
        label: index from 0 of the first wrong step; -1: there is none.
    """

    id: str
    generator: str
    problem: str
    steps: tuple[str, ...]
    final_answer_correct: bool
    label: int


# ------------------------------------------------------------------------------------------ files


def read(path: Path) -> tuple[Item, ...]:
    """The items of a ProcessBench file: a JSON array, or an object per line.

    Raises:
        UserError: the file cannot be read, is empty, or has a row that is no item; the message
            names file and line.
    """
    items: dict[str, Item] = {}
    for where, row in json_rows(path):
        try:
            item = _item(row)
        except ValueError as error:
            raise UserError(
                f"{where}: {error}. A ProcessBench row has {', '.join(_FIELDS)}"
            ) from None
        if item.id in items:
            raise UserError(f"{where}: the id {item.id!r} is there a second time")
        items[item.id] = item
    if not items:
        raise UserError(f"{path} has no item")
    return tuple(items.values())


def _item(row: dict[str, Any] | str) -> Item:
    """One row; ``ValueError`` with the reason where it is no item."""
    if isinstance(row, str):
        raise ValueError(row)
    for name, kind in _FIELDS.items():
        if name not in row:
            raise ValueError(f"no {name!r}")
        # JSON's true is no number, though Python's is.
        if type(row[name]) is not kind:
            raise ValueError(f"{name!r} is not {_KINDS[kind]} but {type(row[name]).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("not UTF-8 text") from None
    steps, label = row["steps"], row["label"]
    if not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError("'steps' is not a list of texts with at least one of them")
    if not ALL_RIGHT <= label < len(steps):
        raise ValueError(f"'label' {label} is not from -1 to {len(steps) - 1}, the last step")
    return Item(**{**{name: row[name] for name in _FIELDS}, "steps": tuple(steps)})


# ---------------------------------------------------------------------------------------- critics


def critique_prompt(item: Item) -> str:
    r"""What a critic is asked: each step between tags with its index, the answer in ``\boxed{}``.

    The task and its form are the paper's and the words are ours.
    """
    steps = "\n\n".join(
        f"<paragraph_{k}>\n{step}\n</paragraph_{k}>" for k, step in enumerate(item.steps)
    )
    return (
        f"Problem:\n{item.problem.strip()}\n\nSolution, in paragraphs numbered from 0:\n{steps}\n\n"
        "Go through the paragraphs one by one. Find the first one that has an error. End with its "
        "number in \\boxed{}, or with \\boxed{-1} if no paragraph has an error."
    )


def predicted_step(text: str) -> int | None:
    r"""What a critic says: the whole number in its last closed ``\boxed{}``; ``None``: none."""
    # Behind the last brace nothing closes; without that part every box is read once.
    boxes = _BOXED.findall(text[: text.rfind("}") + 1])
    try:
        return int(boxes[-1]) if boxes else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------- numbers


def f1(hits: Rows, wrong: Rows) -> float:
    """The harmonic mean of the shares found among the wrong and among the right solutions.

    Args:
        hits: 1 where the first wrong step (or that there is none) was named rightly.
        wrong: 1 where the solution had an error.

    Returns:
        In [0, 1]; NaN where there are no wrong, or no right solutions.
    """
    return _harmonic(mean(hits[wrong == 1]), mean(hits[wrong == 0]))


def wilson_limits_of_f1(hits: Rows, wrong: Rows) -> tuple[float, float]:
    """The harmonic means of the lower and of the upper 95 % Wilson limits of the two shares.

    Args:
        hits: as for :func:`f1`.
        wrong: likewise.
    """
    sides = (hits[wrong == 1], hits[wrong == 0])
    low, high = zip(*(wilson(float(side.sum()), len(side)) for side in sides), strict=True)
    return _harmonic(*low), _harmonic(*high)


def _harmonic(one: float, other: float) -> float:
    if math.isnan(one + other):
        return math.nan
    return 2 * one * other / (one + other) if one + other else 0.0
